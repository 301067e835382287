"""Input files: found, recognised by their content, and cut into blocks of whole documents.

A block is the unit of work: about 2 MB of JSON lines, of text or of Parquet rows, as bytes that travel to a worker
unparsed. Never more than a block is read ahead, or than the one document that does not fit in it.
"""

import glob
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, BinaryIO, Literal

from megatron_meap.errors import UsageError
from megatron_meap.preprocessing.streams import DAMAGED, CountingReader, cut, decompressed

STDIN = "-"
BLOCK_BYTES = 2 << 20
"""Size of a block: large enough that its overhead is nothing, small enough that many fit into memory."""

Kind = Literal["jsonl", "text", "parquet"]

_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_COMPRESSION_SUFFIXES = (".gz", ".zst", ".xz", ".bz2")


@dataclass(frozen=True)
class InputOptions:
    """How inputs are read, the same for all files of a job."""

    keys: tuple[str, ...] = ("text",)
    """JSON keys or Parquet columns, each of which becomes a dataset of its own."""

    kind: Kind | None = None
    """What the files are; None recognises each by its content."""

    separator: str | None = None
    """What stands between the documents of a plain text file; None makes each file one document."""


def find_inputs(patterns: list[str]) -> list[str]:
    """Paths of the input files: files, globs, folders (all files below, hidden ones aside), or `-`.

    The order is that of the patterns, and by name within a glob or a folder.

    Raises:
        UsageError: a pattern that matches nothing, a file named twice, or `-` beside other inputs.
    """
    if STDIN in patterns:
        if len(patterns) > 1:
            raise UsageError("--input: '-' (standard input) cannot be combined with files")
        return [STDIN]
    found: dict[str, None] = {}
    for pattern in patterns:
        if os.path.isdir(pattern):
            matches = sorted(_files_under(pattern))
        elif os.path.exists(pattern):
            matches = [pattern]
        else:
            matches = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
        if not matches:
            raise UsageError(f"--input {pattern}: nothing there; give a file, a glob or a folder")
        for path in matches:
            if path in found:
                raise UsageError(f"--input: {path} is named twice, so its documents would be in the dataset twice")
            if not os.path.isfile(path):  # a pipe could be read only once, and the job looks at its files before
                raise UsageError(
                    f"--input {path}: not a file; leave it out, or pipe it into standard input (--input -)"
                )
            found[path] = None
    return list(found)


def _files_under(folder: str) -> Iterator[str]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(root, name) for name in names if not name.startswith("."))


class InputFile:
    """One input, opened and recognised; iterate over `blocks()` once, then `close()`."""

    def __init__(self, path: str, options: InputOptions) -> None:
        """Open the file and look at its first bytes.

        Raises:
            UsageError: it cannot be read, or is neither JSON lines, Parquet nor text.
        """
        self.name = "standard input" if path == STDIN else path
        self._options = options
        self._blocks: Iterator[bytes] | None = None
        try:
            self._raw: BinaryIO = sys.stdin.buffer if path == STDIN else open(path, "rb")  # noqa: SIM115
            self.size = 0 if path == STDIN else os.fstat(self._raw.fileno()).st_size
            self._counted = CountingReader(self._raw)
            self._stream, self.compression = decompressed(io.BufferedReader(self._counted, 1 << 20))
            self.kind: Kind = options.kind or self._recognise(self._stream.peek(1 << 16)[: 1 << 16])
        except (OSError, *DAMAGED) as error:
            raise self._unreadable(error) from error

    @property
    def position(self) -> int:
        """Bytes of the file consumed so far (compressed bytes, for a compressed file)."""
        return self._counted.position

    def first_block(self) -> bytes:
        """The first block, which `blocks` gives once more; empty where the file is."""
        blocks = self._read_blocks()
        first = next(blocks, b"")
        self._blocks = chain([first] if first else [], blocks)
        return first

    def blocks(self) -> Iterator[bytes]:
        """The file's blocks in order: lines, text, or Arrow record batches (IPC stream format).

        Raises:
            UsageError: damaged data, or a Parquet file without the columns.
        """
        return self._blocks or self._read_blocks()

    def _read_blocks(self) -> Iterator[bytes]:
        if self.kind == "text" and len(self._options.keys) > 1:
            raise UsageError(f"{self.name}: plain text has one key only; give one (--json-keys)")
        separator = self._options.separator.encode() if self._options.separator else None
        try:
            if self.kind == "parquet":
                yield from self._parquet_blocks()
                return
            if self._stream.peek(3).startswith(_BYTE_ORDER_MARK):
                self._stream.read(3)
            yield from cut(self._stream, b"\n" if self.kind == "jsonl" else separator, BLOCK_BYTES)
        except (OSError, *DAMAGED) as error:
            raise self._unreadable(error) from error

    def close(self) -> None:
        """Close the file; standard input stays open."""
        if self._raw is not sys.stdin.buffer:
            self._raw.close()

    def _unreadable(self, error: Exception) -> UsageError:
        if isinstance(error, OSError) and error.errno:
            return UsageError(f"{self.name}: cannot be read: {error.strerror}")
        return UsageError(f"{self.name}: damaged or truncated {getattr(self, 'compression', None) or 'file'}: {error}")

    def _recognise(self, head: bytes) -> Kind:
        """What the first bytes (decompressed) are."""
        if head.startswith(b"PAR1"):
            return "parquet"
        if b"\0" in head:
            raise UsageError(f"{self.name}: binary data; expected JSON lines, text (UTF-8) or Parquet")
        stem = self.name.lower()
        for suffix in _COMPRESSION_SUFFIXES:
            stem = stem.removesuffix(suffix)
        if stem.endswith(_JSON_SUFFIXES) or self._raw is sys.stdin.buffer:
            return "jsonl"
        # Under any other name, what begins as an object with a quoted key is JSON lines: a text may begin with a brace.
        first = head.removeprefix(_BYTE_ORDER_MARK).lstrip()
        return "jsonl" if first[:1] == b"{" and first[1:].lstrip()[:1] == b'"' else "text"

    def _parquet_blocks(self) -> Iterator[bytes]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self.compression or not self._raw.seekable():
            raise UsageError(f"{self.name}: Parquet must be a plain file: it is read from its end")
        keys = list(self._options.keys)
        try:
            file = pq.ParquetFile(self._raw, pre_buffer=False)
            for key in keys:
                self._check_column(file.schema_arrow, key)
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group)
                rows = max(1, size.num_rows * BLOCK_BYTES // max(1, size.total_byte_size))
                for batch in file.iter_batches(rows, [group], keys):
                    yield _arrow_bytes(batch)
                self._counted.position = self.size * (group + 1) // file.num_row_groups
        except pa.ArrowException as error:
            raise UsageError(f"{self.name}: damaged Parquet file: {str(error).splitlines()[0]}") from error

    def _check_column(self, schema: Any, key: str) -> None:
        import pyarrow as pa

        if key not in schema.names:
            raise UsageError(f"{self.name}: no column {key!r}, only {', '.join(schema.names)} (--json-keys)")
        kind = schema.field(key).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UsageError(f"{self.name}: column {key!r} holds {kind}, not strings: name another with --json-keys")


def _arrow_bytes(batch: Any) -> bytes:
    """One record batch as a self-contained Arrow stream."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue().to_pybytes()
