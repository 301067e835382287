"""Byte streams: decompressed by what they begin with, and cut into blocks at a separator."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from typing import BinaryIO

_READ_BYTES = 1 << 20


DAMAGED = (EOFError, zlib.error, lzma.LZMAError)
"""What reading damaged or truncated compressed data raises, besides OSError."""


class CountingReader(io.RawIOBase):
    """A raw stream that knows how many bytes were taken from it."""

    def __init__(self, raw: BinaryIO) -> None:
        self.position = 0
        self._raw = raw

    def readable(self) -> bool:
        """True: it can be read."""
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        """Fill the buffer as far as one read of the stream below does."""
        count = self._raw.readinto(buffer)  # type: ignore[attr-defined]
        self.position += count
        return count


class _ZstdReader(io.RawIOBase):
    """Zstandard frames, one after the other. Unlike zstandard's own reader it notices a truncated file."""

    def __init__(self, source: io.BufferedReader) -> None:
        import zstandard

        self._source = source
        # Windows up to 2 GB: `zstd --long=31` writes them.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._error = zstandard.ZstdError
        self._frame = self._decompressor.decompressobj()
        self._inside = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """True: it can be read."""
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        """Fill the buffer from what is decompressed, decompressing more where nothing is left."""
        while not self._ready and (chunk := self._more()):
            try:
                self._ready = memoryview(self._frame.decompress(chunk))
            except self._error as error:
                raise EOFError(str(error)) from error
            self._inside = not self._frame.eof
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _more(self) -> bytes:
        chunk = b""
        if self._frame.eof:
            chunk = self._frame.unused_data
            self._frame = self._decompressor.decompressobj()
        # Small pieces: one piece of compressed data can hold a thousand times as much text.
        chunk = chunk or self._source.read(1 << 16)
        if not chunk and self._inside:
            raise EOFError("the data ends within a frame")
        return chunk


def decompressed(stream: io.BufferedReader) -> tuple[io.BufferedReader, str | None]:
    """The stream's plain bytes and the name of its compression (None: it is plain)."""
    head = stream.peek(6)[:6]
    if head.startswith(b"\x1f\x8b"):
        return io.BufferedReader(gzip.GzipFile(fileobj=stream), _READ_BYTES), "gzip"  # type: ignore[arg-type]
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
        return io.BufferedReader(_ZstdReader(stream), _READ_BYTES), "zstd"
    if head.startswith(b"\xfd7zXZ\x00"):
        return io.BufferedReader(lzma.LZMAFile(stream), _READ_BYTES), "xz"  # type: ignore[arg-type]
    if head.startswith(b"BZh"):
        return io.BufferedReader(bz2.BZ2File(stream), _READ_BYTES), "bzip2"  # type: ignore[arg-type]
    return stream, None


def cut(stream: io.BufferedReader, separator: bytes | None, block_bytes: int) -> Iterator[bytes]:
    """Blocks of about `block_bytes` that end after a separator; without a separator, all in one.

    A document longer than a block makes its block as long as it needs. Damaged compressed data raises one of `DAMAGED`,
    or an OSError.
    """
    buffer, searched = bytearray(), 0
    while chunk := stream.read(_READ_BYTES):
        buffer += chunk
        if separator is None or len(buffer) < block_bytes:
            continue
        end = buffer.rfind(separator, searched)
        if end < 0:
            searched = max(0, len(buffer) - len(separator) + 1)
            continue
        end += len(separator)
        yield bytes(memoryview(buffer)[:end])
        del buffer[:end]
        searched = 0
    if buffer:
        yield bytes(buffer)
