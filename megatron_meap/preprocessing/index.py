"""The `.idx` file of Megatron's indexed dataset, written and read in bounded memory.

After a header come the lengths of all sequences in tokens (int32), their offsets in the `.bin` file in bytes (int64),
and the document boundaries (int64): the index of the first sequence of every document, and finally the number of
sequences. Preprocessing writes one sequence per document.
"""

import difflib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_meap.errors import UsageError

CHUNK = 1 << 18
"""Numbers handled at a time."""

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, boundaries
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES: dict[int, type[np.number]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


def token_dtype(vocab_size: int) -> type[np.number]:
    """The type that Megatron uses for a vocabulary: uint16 below 65,500 ids, else int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


def index_bytes(
    dtype: np.dtype,
    sequences: int,
    lengths: Callable[[], Iterator[np.ndarray]],
    boundaries: Iterator[np.ndarray] | None = None,
    documents: int | None = None,
) -> Iterator[bytes]:
    """The bytes of an index, in pieces.

    Args:
        dtype: type of the ids in the `.bin` file.
        sequences: number of sequences.
        lengths: returns their lengths in tokens, in pieces; called twice.
        boundaries: document boundaries, in pieces, including the last one; None: one sequence per document.
        documents: number of documents, with `boundaries`.
    """
    code = next(code for code, known in _DTYPES.items() if known == dtype)
    yield _HEADER.pack(_MAGIC, 1, code, sequences, (sequences if documents is None else documents) + 1)
    for piece in lengths():
        yield piece.astype(np.int32).tobytes()
    offset = 0
    for piece in lengths():
        ends = offset + np.cumsum(piece, dtype=np.int64) * dtype.itemsize
        yield np.concatenate(([offset], ends[:-1])).astype(np.int64).tobytes()
        offset = int(ends[-1])
    for piece in boundaries or _counting(sequences + 1):
        yield piece.astype(np.int64).tobytes()


def _counting(end: int) -> Iterator[np.ndarray]:
    for first in range(0, end, CHUNK):
        yield np.arange(first, min(first + CHUNK, end))


@dataclass(frozen=True)
class Index:
    """A dataset's index; the arrays are views of the file."""

    dtype: np.dtype
    lengths: np.ndarray
    offsets: np.ndarray
    boundaries: np.ndarray

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.boundaries) - 1

    @property
    def tokens(self) -> int:
        """Number of tokens of all sequences."""
        return int(self.lengths.sum(dtype=np.int64))


def _hint(prefix: str) -> str:
    """The hint for a missing dataset: which one may be meant."""
    place = Path(prefix)
    there = {path.stem for path in place.parent.glob("*.idx")} - {place.name}
    likely = [place.name.removesuffix(".bin").removesuffix(".idx"), f"{place.name}_text_document"]
    meant = [name for name in likely if name in there] or difflib.get_close_matches(place.name, there, 1, 0.8)
    if meant:
        return f"did you mean {place.with_name(meant[0])}?"
    if place.is_file():
        return f"{prefix} is not a dataset; tools/preprocess_data.py makes one from text"
    return "a dataset is named by its path without .bin and .idx"


def read_index(prefix: str) -> Index:
    """Open `PREFIX.idx` and check that it is complete and belongs to `PREFIX.bin`.

    Raises:
        UsageError: a file is missing or damaged, or the two do not belong together.
    """
    path, data = Path(prefix + ".idx"), Path(prefix + ".bin")
    for file in (path, data):
        if not file.is_file():
            raise UsageError(f"{file}: no such file; {_hint(prefix)}")
    with open(path, "rb") as opened:
        header = opened.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise UsageError(f"{path}: not the index of a Megatron dataset")
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    size = _HEADER.size + 12 * sequences + 8 * boundaries
    if version != 1 or code not in _DTYPES or not boundaries or path.stat().st_size != size:
        raise UsageError(f"{path}: damaged, or not a text dataset ({path.stat().st_size} bytes, expected {size})")
    view = np.memmap(path, np.uint8, "r", _HEADER.size)
    index = Index(
        np.dtype(_DTYPES[code]),
        view[: 4 * sequences].view(np.int32),
        view[4 * sequences : 12 * sequences].view(np.int64),
        view[12 * sequences :].view(np.int64),
    )
    stamps = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_ino) for file in (path, data))
    if stamps not in _consistent:  # a start opens each index half a dozen times
        problem = _inconsistency(index, data.stat().st_size)
        if problem:
            raise UsageError(f"{prefix}: {problem}; make the dataset again")
        _consistent.add(stamps)
    return index


_consistent: set[tuple[tuple[str, int, int], ...]] = set()
"""Pairs of files, with the time of their last change, that this process has found to belong together."""


def _inconsistency(index: Index, bin_bytes: int) -> str | None:
    """What does not fit together; None if everything does."""
    offset = 0
    for first in range(0, len(index.lengths), CHUNK):
        lengths = index.lengths[first : first + CHUNK].astype(np.int64)
        ends = offset + np.cumsum(lengths) * index.dtype.itemsize
        if (lengths < 0).any() or (index.offsets[first : first + CHUNK] != ends - lengths * index.dtype.itemsize).any():
            return f"lengths and offsets in the .idx file disagree near sequence {first}"
        offset = int(ends[-1])
    if offset != bin_bytes:
        return f"the .idx file describes {offset} bytes, but the .bin file has {bin_bytes}: they do not belong together"
    ends_right = index.boundaries[0] == 0 and index.boundaries[-1] == len(index.lengths)
    if not ends_right or (np.diff(index.boundaries) < 0).any():
        return "the document boundaries in the .idx file are not in order"
    return None
