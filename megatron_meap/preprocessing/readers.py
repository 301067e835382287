"""One input file: opened, recognised by its content, and split into blocks of whole documents.

A block is the unit of work: about 2 MB of JSON lines, text or Parquet rows, as bytes that a worker will parse. At most
one block is read ahead, or one document if it is longer than a block.
"""

import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import BinaryIO

from megatron_meap.errors import UsageError, shown
from megatron_meap.preprocessing import parquet
from megatron_meap.preprocessing.inputs import STDIN
from megatron_meap.preprocessing.recognition import (
    BYTE_ORDER_MARK,
    HEAD_BYTES,
    Kind,
    check_compression,
    recognise,
    refuse_pointer,
)
from megatron_meap.preprocessing.streams import CountingReader, DamagedError, cut, decompressed

BLOCK_BYTES = 2 << 20
"""Size of a block: large enough for its overhead to be negligible, small enough for many to fit into memory."""


@dataclass(frozen=True)
class InputOptions:
    """How inputs are read; the same for all files of a job."""

    keys: tuple[str, ...] = ("text",)
    """JSON keys or Parquet columns; each becomes a separate dataset."""

    kind: Kind | None = None
    """Format of the files; None recognises each by its content."""

    separator: str | None = None
    """What separates the documents of a plain text file; None makes each file one document."""


class InputFile:
    """One input, opened and recognised; iterate over `blocks()` once, then `close()`."""

    def __init__(self, path: str, options: InputOptions) -> None:
        """Open the file and check its first bytes (and the columns of Parquet).

        Raises:
            UsageError: it cannot be read, is not JSON lines, Parquet or text, or is not what its name says.
        """
        self.name = "standard input" if path == STDIN else path
        self._options = options
        self._blocks: Iterator[bytes] | None = None
        try:
            self._raw: BinaryIO = sys.stdin.buffer if path == STDIN else open(path, "rb")  # noqa: SIM115
            self._stat = None if path == STDIN else os.fstat(self._raw.fileno())
            self._counted = CountingReader(self._raw)
            self._stream, self.compression = decompressed(io.BufferedReader(self._counted, 1 << 20))
            head = self._stream.peek(HEAD_BYTES)[:HEAD_BYTES]
        except (OSError, DamagedError) as error:
            raise self._unreadable(error) from error
        default: Kind | None = "jsonl" if path == STDIN else None
        refuse_pointer(self.name, head)
        check_compression(self.name, self.compression, empty=not head)
        self.kind: Kind = recognise(self.name, head, asked=options.kind, default=default)
        if self.kind == "text" and len(options.keys) > 1:
            raise UsageError(f"{self.name}: plain text has one key only; give one (--json-keys)")
        if self.kind == "parquet":
            if self.compression or not self._raw.seekable():
                raise UsageError(f"{self.name}: Parquet must be a plain file: it is read from its end")
            self._table = parquet.open_parquet(self.name, self._raw, options.keys)

    @property
    def size(self) -> int:
        """Size of the file in bytes when it was opened; 0 for standard input."""
        return self._stat.st_size if self._stat else 0

    @property
    def changed_ns(self) -> int:
        """When the file was last changed before it was opened, in nanoseconds; 0 for standard input."""
        return self._stat.st_mtime_ns if self._stat else 0

    @property
    def position(self) -> int:
        """Bytes of the file consumed so far (compressed bytes, for a compressed file)."""
        return self._counted.position

    def first_block(self) -> bytes:
        """The first block, which `blocks` returns again; empty if the file is."""
        blocks = self._read_blocks()
        first = next(blocks, b"")
        self._blocks = chain([first] if first else [], blocks)
        return first

    def blocks(self) -> Iterator[bytes]:
        """The file's blocks in order: lines, text, or Arrow record batches (IPC stream format).

        Raises:
            UsageError: the data is damaged, or the file changed while it was read.
        """
        return self._blocks or self._read_blocks()

    def _read_blocks(self) -> Iterator[bytes]:
        if self.kind == "parquet":
            yield from parquet.blocks(self.name, self._table, self._options.keys, BLOCK_BYTES, self._advance)
        else:
            separator = "\n" if self.kind == "jsonl" else self._options.separator
            yield from self._cut(separator.encode() if separator else None)
        if self._stat:
            now = os.fstat(self._raw.fileno())
            if (now.st_size, now.st_mtime_ns) != (self.size, self.changed_ns):
                raise UsageError(f"{self.name}: changed while it was read; start again when it is complete")

    def _cut(self, separator: bytes | None) -> Iterator[bytes]:
        try:
            if self._stream.peek(3).startswith(BYTE_ORDER_MARK):
                self._stream.read(3)
            blocks = cut(self._stream, separator, BLOCK_BYTES)
            yield from blocks if self.kind == "jsonl" or not separator else self._separated(blocks, separator)
        except (OSError, DamagedError) as error:
            raise self._unreadable(error) from error

    def _separated(self, blocks: Iterator[bytes], separator: bytes) -> Iterator[bytes]:
        """The blocks of a text. In one with Windows line ends a separator with newlines does not match: refuse that."""
        windows = separator.replace(b"\n", b"\r\n")
        found, elsewhere = False, 0
        for block in blocks:
            found = found or separator in block
            elsewhere += 0 if separator in windows else block.count(windows)
            yield block
        if elsewhere and not found:
            raise UsageError(
                f"{self.name}: its lines end in \\r\\n, so that --text-separator never occurs in it; "
                f"give {windows.decode()!r}, or convert the file"
            )
        if elsewhere:
            line = (
                f"warning: {self.name}: in {elsewhere:,} places --text-separator has \\r\\n for \\n, and cuts nothing"
            )
            print(shown(line), file=sys.stderr)

    def _advance(self, share: float) -> None:
        self._counted.position = int(self.size * share)

    def close(self) -> None:
        """Close the file; standard input stays open."""
        if self._raw is not sys.stdin.buffer:
            self._raw.close()

    def _unreadable(self, error: Exception) -> UsageError:
        if isinstance(error, OSError):
            return UsageError(f"{self.name}: cannot be read: {error.strerror or error}")
        return UsageError(f"{self.name}: damaged or truncated {self.compression or 'file'}: {error}")
