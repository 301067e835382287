"""What the attention of models is measured on: masked samples of text, and prompts with a fact hidden in them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_meap.errors import UsageError
from megatron_meap.evaluation.attention.recipe import Recipe
from megatron_meap.meap.masking import Masking, RatioSchedule
from megatron_meap.preprocessing.documents import BadDocumentError, documents
from megatron_meap.preprocessing.readers import InputFile, InputOptions
from megatron_meap.tokenization.huggingface import around_text, plain_ids

SEGMENTS = ("before", "answer", "after", "query")
"""Parts of a prompt: the context up to the answer, the answer's own tokens, the context after it, the question."""

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


def make_inputs(path: str, tokenizer: Any, recipe: Recipe) -> Inputs:
    """The samples and prompts of a recipe in a tokenizer's ids.

    Args:
        path: JSON lines with a key `text`, Parquet, or plain text; compressed or not.
        tokenizer: of transformers.
        recipe: what to make, its length settled.

    Raises:
        UsageError: the file cannot be read, or holds less text than is asked for; a needle that does not fit.
    """
    assert recipe.length is not None
    texts = _packed(path, tokenizer, recipe.samples, recipe.length)
    masking = Masking(RatioSchedule(recipe.mask_ratio), seed=recipe.seed)
    masked = np.zeros(texts.shape, bool)
    for index, row in enumerate(masked):
        row[masking.positions(index, recipe.length)] = True
    prompts, segments = zip(
        *(_prompt(index, texts[index], tokenizer, recipe) for index in range(recipe.samples)), strict=True
    )
    return Inputs(texts, masked, np.stack(prompts), np.stack(segments))


def _packed(path: str, tokenizer: Any, samples: int, length: int) -> Tokens:
    """Pieces [samples, length] of the documents one after the other with EOS between them, as in pretraining."""
    start, end = around_text(tokenizer)[0], tokenizer.eos_token_id
    ids: list[int] = []
    for text in _texts(path):
        ids += [*start, *plain_ids(tokenizer, text), *([] if end is None else [end])]
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
    question = plain_ids(tokenizer, recipe.question.replace("{key}", key))
    start = around_text(tokenizer)[0]
    length = len(haystack)
    room = length - len(start) - len(needle) - len(question)
    if room < 1:
        raise UsageError(f"--length {length}: too short for the needle and the question, give {3 * -room} more")
    depth = round(room * index / max(1, recipe.samples - 1))
    before = [*start, *haystack[:depth]]
    tokens = [*before, *needle, *haystack[depth:room], *question]
    segments = np.full(length, SEGMENTS.index("after"))
    segments[: len(before) + answer.start] = SEGMENTS.index("before")
    segments[len(before) + answer.start : len(before) + answer.stop] = SEGMENTS.index("answer")
    segments[length - len(question) :] = SEGMENTS.index("query")
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
