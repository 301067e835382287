"""The text in which needles are hidden: whole sentences from random places, measured in tokens."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from megatron_meap.errors import UsageError
from megatron_meap.evaluation.tasks.files import lines, rows
from megatron_meap.evaluation.tasks.options import GENERATED_TOKENS, Options, Unsuitable, counter
from megatron_meap.preprocessing.corpus import documents

FLAG = "--haystack"
MAX_CHARACTERS = 4_000_000  # as much as 128K tokens need, several times over
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_LONGEST = 200  # characters; a longer "sentence" is a table or code, and would make depths coarse
_DEFAULT_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class Piece:
    """Consecutive sentences and their lengths in tokens, int64 [sentences]."""

    sentences: Sequence[str]
    tokens: np.ndarray

    def shortened(self, count: int) -> "Piece":
        """Without the last `count` sentences."""
        kept = len(self.sentences) - count
        return Piece(self.sentences[:kept], self.tokens[:kept])


@dataclass(frozen=True)
class Haystack:
    """The sentences of one text."""

    name: str
    whole: Piece

    def piece(self, budget: int, generator: Random) -> Piece:
        """Consecutive sentences of at most `budget` tokens, from a random place.

        Raises:
            UsageError: the whole text is shorter than that.
        """
        ends = np.concatenate([[0], np.cumsum(self.whole.tokens)])
        if ends[-1] < budget:
            raise UsageError(
                f"--haystack {self.name}: holds about {ends[-1]} tokens, the context asked for needs {budget}; "
                "give a longer text, or shorter context lengths"
            )
        last_start = int(np.searchsorted(ends, ends[-1] - budget, side="right")) - 1
        start = generator.randrange(last_start + 1)
        end = int(np.searchsorted(ends, ends[start] + budget, side="right")) - 1
        return Piece(self.whole.sentences[start:end], self.whole.tokens[start:end])


@cache
def load(path: str | None, tokenizer: str) -> Haystack:
    """The haystack of a file, or Python's own documentation if none is given.

    Raises:
        UsageError: the file cannot be read or holds no text.
    """
    texts = _from_python() if path is None else _from_file(path)
    special = counter(tokenizer).tokenizer.all_special_tokens
    sentences = [part for text in texts for part in split(text) if not any(token in part for token in special)]
    if not sentences:
        raise UsageError(f"--haystack {path}: holds no text")
    lengths = np.array(counter(tokenizer).each(sentences), dtype=np.int64)
    return Haystack(path or "(Python's documentation)", Piece(sentences, lengths))


def split(text: str) -> list[str]:
    """Sentences of a text with single spaces; overlong ones are cut between words."""
    found = []
    for sentence in _SENTENCE_END.split(" ".join(text.split())):
        words: list[str] = []
        for word in sentence.split(" "):
            if words and sum(map(len, words)) + len(words) + len(word) > _LONGEST:
                found.append(" ".join(words))
                words = []
            words.append(word)
        found.append(" ".join(words))
    return [sentence for sentence in found if sentence]


def _from_python() -> list[str]:
    """The demo corpus' prose: the help topics and docstrings of this Python."""
    return _up_to(_DEFAULT_CHARACTERS, (text for _, text in documents()))


def _from_file(path: str) -> list[str]:
    """Texts of a plain or JSON Lines file."""
    if ".json" in Path(path).name:
        return _up_to(MAX_CHARACTERS, _json_texts(path))
    return ["".join(_up_to(MAX_CHARACTERS, (line for _, line in lines(path, FLAG))))]


def _up_to(characters: int, texts: Iterable[str]) -> list[str]:
    """The first texts, until they have more than so many characters together."""
    found, size = [], 0
    for text in texts:
        found.append(text)
        size += len(text)
        if size > characters:
            break
    return found


def _json_texts(path: str) -> Iterator[str]:
    for place, row in rows(path, FLAG):
        if not isinstance(row.get("text"), str):
            raise UsageError(f"{FLAG} {place}: expected a JSON object with the field text")
        yield row["text"]


def bury(build: Callable[[Piece], str], options: Options, length: int, generator: Random) -> tuple[str, int]:
    """A prompt of (nearly) `length` tokens.

    Args:
        build: the prompt around a piece of the haystack, needles and question included.
        options: tokenizer and haystack.
        length: tokens of the prompt and the room for the answer together.
        generator: chooses the place in the haystack.

    Returns:
        The prompt, and the tokens that it and the room take.

    Raises:
        UsageError: the haystack is too short, or there is no room for it.
    """
    haystack, count = load(options.haystack, options.tokenizer), options.count
    budget = length - GENERATED_TOKENS - count(build(haystack.whole.shortened(len(haystack.whole.sentences))))
    if budget < 1:
        raise Unsuitable(
            f"context length {length}: the question and {GENERATED_TOKENS} tokens of room for the answer alone "
            f"take {length - budget}; use longer contexts"
        )
    piece = haystack.piece(budget, generator)
    while (taken := count(prompt := build(piece)) + GENERATED_TOKENS) > length:
        piece = piece.shortened(1)
    return prompt, taken


def insert(piece: Piece, needles: Sequence[tuple[float, str]]) -> str:
    """The context: each needle at the sentence border that is nearest to its depth, measured in tokens.

    Args:
        piece: of the haystack.
        needles: pairs of (depth in percent, sentence).
    """
    ends = np.concatenate([[0], np.cumsum(piece.tokens)])
    places = sorted((int(np.abs(ends - depth / 100 * ends[-1]).argmin()), i) for i, (depth, _) in enumerate(needles))
    parts: list[str] = []
    before = 0
    for place, i in places:
        parts += [*piece.sentences[before:place], needles[i][1]]
        before = place
    return " ".join([*parts, *piece.sentences[before:]])


def generator_of(options: Options, *cell: Any) -> Random:
    """The random generator of one sample, which depends only on the seed and the cell."""
    return Random("/".join(map(str, (options.seed, *cell))))
