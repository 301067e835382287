"""What the attention of models is measured on: masked samples of text, and prompts with a fact hidden in them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_meap.errors import UsageError, refuse
from megatron_meap.meap.masking import Masking, RatioSchedule
from megatron_meap.preprocessing.documents import BadDocumentError, documents
from megatron_meap.preprocessing.readers import InputFile, InputOptions

SEGMENTS = ("before", "answer", "after", "query")
"""Parts of a prompt: the context up to the answer, the answer's own tokens, the context after it, the question."""

NEEDLE = " The secret number of {key} is {value}. "
QUESTION = " The secret number of {key} is"
_KEYS = ("Paris", "Lima", "Oslo", "Cairo", "Quito", "Seoul", "Rome", "Delhi", "Accra", "Riga")

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Inputs:
    """The same for every model that is measured."""

    texts: Tokens
    """[n, s]: consecutive pieces of the packed text."""

    masked: npt.NDArray[np.bool_]
    """[n, s], True at the positions that are replaced by the mask token."""

    prompts: Tokens
    """[n, s]: the text as a haystack, with the needle in it and the question at its end."""

    segments: Tokens
    """[n, s]: index into `SEGMENTS` of every token of a prompt."""


@dataclass(frozen=True)
class Recipe:
    """How the inputs are made; flags of `tools/analyze_attention.py`."""

    length: int
    """Tokens of every sample and of every prompt."""
    samples: int = 20
    """Samples, and as many prompts; over these the depth of the needle goes from 0 to 100%."""
    mask_ratio: float = 0.15
    seed: int = 1234
    needle: str = NEEDLE
    """Sentence to hide, with {key} and {value}."""
    question: str = QUESTION
    """What stands at the end of a prompt, with {key}; the value would be the next token."""

    def __post_init__(self) -> None:
        """Refuse what makes no inputs."""
        refuse(
            (self.samples < 1, f"--samples {self.samples}: must be at least 1"),
            (not 0 < self.mask_ratio < 1, f"--mask-ratio {self.mask_ratio}: must lie between 0 and 1"),
            (not 0 <= self.seed < 2**64, f"--seed {self.seed}: must lie between 0 and 2**64 - 1"),
            (
                "{key}" not in self.needle or "{value}" not in self.needle,
                "--needle: must contain {key} and {value}",
            ),
            ("{key}" not in self.question, "--question: must contain {key}"),
        )


def make_inputs(path: str, tokenizer: Any, recipe: Recipe) -> Inputs:
    """The samples and prompts of a recipe in a tokenizer's ids.

    Args:
        path: JSON lines with a key `text`, Parquet, or plain text; compressed or not.
        tokenizer: of transformers.
        recipe: what to make.

    Raises:
        UsageError: the file cannot be read, or holds less text than is asked for; a needle that does not fit.
    """
    texts = _packed(path, tokenizer, recipe.samples, recipe.length)
    masking = Masking(RatioSchedule(recipe.mask_ratio), seed=recipe.seed)
    masked = np.zeros(texts.shape, bool)
    for index, row in enumerate(masked):
        row[masking.positions(index, recipe.length)] = True
    prompts, segments = zip(
        *(_prompt(index, texts[index], tokenizer, recipe) for index in range(recipe.samples)), strict=True
    )
    return Inputs(texts, masked, np.stack(prompts), np.stack(segments))


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text alone, which is taken literally: no special token, neither parsed nor added."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def beginning(tokenizer: Any) -> list[int]:
    """BOS, if this tokenizer puts it before a text; what it puts after one is left out."""
    whole, text = tokenizer("a", split_special_tokens=True)["input_ids"], encode(tokenizer, "a")
    return next(whole[:i] for i in range(len(whole)) if whole[i : i + len(text)] == text)


def _packed(path: str, tokenizer: Any, samples: int, length: int) -> Tokens:
    """Pieces [samples, length] of the documents one after the other with EOS between them, as in pretraining."""
    start, end = beginning(tokenizer), tokenizer.eos_token_id
    ids: list[int] = []
    for text in _texts(path):
        ids += [*start, *encode(tokenizer, text), *([] if end is None else [end])]
        if len(ids) >= samples * length:
            return np.array(ids[: samples * length], np.int64).reshape(samples, length)
    raise UsageError(
        f"--text {path}: has {len(ids):,} tokens, {samples} samples of {length} need {samples * length:,}; "
        "give more text, or lower --samples or --length"
    )


def _texts(path: str) -> Iterator[str]:
    """The documents of a file, one after the other."""
    options = InputOptions()
    file = InputFile(path, options)
    number = 0
    for block in file.blocks():
        for document in documents(file.kind, block, options):
            number += 1
            if isinstance(document, BadDocumentError):
                raise UsageError(f"--text {path}: document {number}: {document}")
            if document is not None:
                yield document[0]
    file.close()


def _prompt(index: int, haystack: Tokens, tokenizer: Any, recipe: Recipe) -> tuple[Tokens, Tokens]:
    """Tokens and segments of one prompt, each [s]: the needle at its depth in the haystack, then the question."""
    random = np.random.Generator(np.random.PCG64([recipe.seed, index]))
    key, value = str(random.choice(_KEYS)), str(random.integers(10_000, 100_000))
    needle, answer = _needle(tokenizer, recipe.needle, key, value)
    question = encode(tokenizer, recipe.question.replace("{key}", key))
    start = beginning(tokenizer)
    room = recipe.length - len(start) - len(needle) - len(question)
    if room < 1:
        raise UsageError(f"--length {recipe.length}: too short for the needle and the question, give {3 * -room} more")
    depth = round(room * index / max(1, recipe.samples - 1))
    before = [*start, *haystack[:depth]]
    tokens = [*before, *needle, *haystack[depth:room], *question]
    segments = np.full(recipe.length, SEGMENTS.index("after"))
    segments[: len(before) + answer.start] = SEGMENTS.index("before")
    segments[len(before) + answer.start : len(before) + answer.stop] = SEGMENTS.index("answer")
    segments[recipe.length - len(question) :] = SEGMENTS.index("query")
    return np.array(tokens, np.int64), segments


def _needle(tokenizer: Any, template: str, key: str, value: str) -> tuple[list[int], slice]:
    """Ids of the needle, and which of them are the value."""
    text = template.replace("{key}", key)
    first = text.index("{value}")
    encoded = tokenizer(
        text.replace("{value}", value), add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if b > first and a < first + len(value)]
    return encoded["input_ids"], slice(inside[0], inside[-1] + 1)
