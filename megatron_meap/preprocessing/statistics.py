"""Inspect a dataset: does it match its manifest, and what does it contain?"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_meap.errors import UsageError
from megatron_meap.preprocessing.index import CHUNK, Index, read_index
from megatron_meap.preprocessing.manifest import check_contents, read_manifest

_LARGEST_ID = 1 << 24
"""Counting takes eight bytes for each id up to the largest, and a damaged file may contain any number."""


@dataclass(frozen=True)
class Statistics:
    """What a dataset contains."""

    documents: int
    tokens: int
    counts: np.ndarray
    """[largest id + 1] How often each id occurs."""

    histogram: list[tuple[int, int, int]]
    """(shortest, longest, number of documents) for each range of lengths in tokens, in powers of two."""

    lengths: tuple[int, float, int]
    """Shortest, mean and longest length of a document in tokens."""

    def count(self, token: int | None) -> int:
        """How often an id occurs."""
        return int(self.counts[token]) if token is not None and 0 <= token < len(self.counts) else 0


def inspect(prefix: str) -> tuple[Statistics, dict[str, Any] | None]:
    """Read a whole dataset and compare it with its manifest.

    Args:
        prefix: the dataset, without `.bin` and `.idx`.

    Returns:
        Statistics, and the manifest (None if there is none to compare with).

    Raises:
        UsageError: a file is missing, damaged or not what the manifest says; the message names it.
    """
    index, manifest = read_index(prefix), read_manifest(prefix)
    if not index.tokens:
        raise UsageError(f"{prefix}: holds no tokens ({index.documents} documents); make the dataset again")
    counts, digest = _read_tokens(prefix, index, manifest["max_token_id"] if manifest else None)
    statistics = Statistics(index.documents, index.tokens, counts, *_lengths(index))
    if manifest:
        facts = {
            "documents": index.documents,
            "tokens": index.tokens,
            "max_token_id": len(counts) - 1,
            "dtype": index.dtype.name,
        }
        check_contents(prefix, manifest, digest, facts)
    return statistics, manifest


def _read_tokens(prefix: str, index: Index, largest: int | None) -> tuple[np.ndarray, str]:
    """How often each id occurs, and the sha256 of the file. Impossible ids are refused before they are counted."""
    counts, digest = np.zeros(0, np.int64), hashlib.sha256()
    with open(prefix + ".bin", "rb") as file:
        while chunk := file.read(CHUNK * 8):
            digest.update(chunk)
            ids = np.frombuffer(chunk, index.dtype)
            if ids.min() < 0:
                raise UsageError(f"{prefix}.bin: holds the negative id {ids.min()}; make the dataset again")
            if ids.max() > (_LARGEST_ID if largest is None else largest):
                known = (
                    "no vocabulary is that large" if largest is None else f"its manifest says max_token_id {largest}"
                )
                raise UsageError(f"{prefix}.bin: holds the id {ids.max()}, but {known}; make the dataset again")
            found = np.bincount(ids)
            if len(found) > len(counts):
                counts = np.pad(counts, (0, len(found) - len(counts)))
            counts[: len(found)] += found
    return counts, digest.hexdigest()


def _lengths(index: Index) -> tuple[list[tuple[int, int, int]], tuple[int, float, int]]:
    """Histogram of the documents' lengths in tokens; shortest, mean and longest length."""
    histogram = np.zeros(64, np.int64)
    shortest, longest = np.iinfo(np.int64).max, 0
    for lengths in _document_lengths(index):
        # Bin k holds the lengths with k binary digits: 2^(k-1) to 2^k - 1.
        histogram += np.bincount(np.frexp(lengths)[1], minlength=64)[:64]
        shortest, longest = min(shortest, int(lengths.min())), max(longest, int(lengths.max()))
    bins = [(2**k // 2, 2**k - 1, int(count)) for k, count in enumerate(histogram) if count]
    return bins, (int(shortest), index.tokens / index.documents, longest)


def _document_lengths(index: Index) -> Iterator[np.ndarray]:
    """Lengths of the documents in tokens, in pieces."""
    total = np.concatenate((index.offsets // index.dtype.itemsize, [index.tokens]))
    for first in range(0, index.documents, CHUNK):
        yield np.diff(total[index.boundaries[first : first + CHUNK + 1]])


def read_documents(prefix: str, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number, ids) of `count` documents, spread evenly over the dataset."""
    index = read_index(prefix)
    count = min(count, index.documents)
    with open(prefix + ".bin", "rb") as file:
        for number in (index.documents * step // count for step in range(count)):
            first, last = index.boundaries[number], index.boundaries[number + 1]
            if first == last:
                yield number, np.zeros(0, index.dtype)
                continue
            file.seek(int(index.offsets[first]))
            size = int(index.lengths[first:last].sum(dtype=np.int64)) * index.dtype.itemsize
            yield number, np.frombuffer(file.read(size), index.dtype)


def unigram_entropy(prefix: str) -> float:
    """Entropy of a dataset's token distribution in nats: the loss of the best model that ignores the context."""
    counts, _ = _read_tokens(prefix, read_index(prefix), None)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
