"""Byte streams: decompressed according to their first bytes, and split into blocks at a separator."""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

_READ_BYTES = 1 << 20
_PIECE_BYTES = 1 << 14
"""Compressed bytes to decompress at a time: few, because they may become a thousand times as much text."""


class DamagedError(Exception):
    """Compressed data that is damaged or truncated; the message says where."""


class CountingReader(io.RawIOBase):
    """A raw stream that counts the bytes read from it."""

    def __init__(self, raw: BinaryIO) -> None:
        self.position = 0
        self._raw = raw

    def readable(self) -> bool:
        """True: it can be read."""
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        """Fill the buffer with one read of the underlying stream."""
        count = self._raw.readinto(buffer)  # type: ignore[attr-defined]
        self.position += count
        return count


def _zstd_decompressor() -> Any:
    import zstandard

    # Windows up to 2 GB: `zstd --long=31` writes them.
    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


@dataclass(frozen=True)
class Compression:
    """A format of compressed files: any number of streams, one after the other."""

    name: str
    suffix: str
    decompressor: Callable[[], Any]
    """Makes a decompressor of one stream, with `decompress(data)`, `eof`, and `unused_data` after its end."""

    magics: tuple[bytes, ...]
    """What a file begins with."""

    padding: bool = False
    """Whether zeros in multiples of four may follow a stream."""


COMPRESSIONS = (
    Compression("gzip", ".gz", lambda: zlib.decompressobj(31), (b"\x1f\x8b\x08",)),
    # The second kind are frames without data, which pzstd writes.
    Compression(
        "zstd", ".zst", _zstd_decompressor, (b"\x28\xb5\x2f\xfd", *(b"%c\x2a\x4d\x18" % n for n in range(0x50, 0x60)))
    ),
    Compression("xz", ".xz", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), (b"\xfd7zXZ\x00",), padding=True),
    # A text may begin with "BZh", so the level and the marker of the first block (or of the end) are checked too.
    Compression(
        "bzip2",
        ".bz2",
        bz2.BZ2Decompressor,
        tuple(b"BZh%d" % level + mark for level in range(1, 10) for mark in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")),
    ),
)


class _Decompressed(io.RawIOBase):
    """The plain bytes of a compressed stream."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """True: it can be read."""
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        """Fill the whole buffer, unless the stream ends first."""
        filled = 0
        while filled < len(buffer):
            self._ready = self._ready or memoryview(next(self._pieces, b""))
            if not self._ready:
                break
            count = min(len(buffer) - filled, len(self._ready))
            buffer[filled : filled + count], self._ready = self._ready[:count], self._ready[count:]
            filled += count
        return filled


def _pieces(source: io.BufferedReader, compression: Compression) -> Iterator[bytes]:
    """Decompressed bytes of every stream. Python's own readers stop silently at what follows the first stream."""
    position = 0  # in the file, of the first byte of `data`
    data = source.read(_PIECE_BYTES)
    while data:
        begun, stream = position, compression.decompressor()
        while not stream.eof:
            if not data:
                raise DamagedError(f"the file ends within the stream that begins at byte {begun}")
            try:
                piece = stream.decompress(data)
            except Exception as error:  # each library has its own errors, of which bz2's is OSError
                if position == begun:
                    raise DamagedError(f"neither a stream nor the end of the file at byte {begun} ({error})") from error
                raise DamagedError(f"the stream that begins at byte {begun}: {error}") from error
            position += len(data)
            if piece:
                yield piece
            if not stream.eof:
                data = source.read(_PIECE_BYTES)
        position -= len(stream.unused_data)
        data = stream.unused_data or source.read(_PIECE_BYTES)
        if compression.padding:
            padded = position
            while data.startswith(b"\0"):
                kept = data.lstrip(b"\0")
                position += len(data) - len(kept)
                data = kept or source.read(_PIECE_BYTES)
            if (position - padded) % 4:
                raise DamagedError(f"{position - padded} zeros at byte {padded}, which is not a multiple of four")


def decompressed(stream: io.BufferedReader) -> tuple[io.BufferedReader, str | None]:
    """The stream's plain bytes and the name of its compression (None: it is plain).

    Reading the plain bytes raises a `DamagedError` if `gzip -t`, `bzip2 -t`, `xz -t` or `zstd -t` would report an
    error, and also if they would ignore bytes after the last stream they recognise: trailing zeros, or half of a file.
    """
    head = stream.peek(10)[:10]
    for compression in COMPRESSIONS:
        if head.startswith(compression.magics):
            return io.BufferedReader(_Decompressed(_pieces(stream, compression)), _READ_BYTES), compression.name
    return stream, None


def cut(stream: io.BufferedReader, separator: bytes | None, block_bytes: int) -> Iterator[bytes]:
    """Blocks of about `block_bytes` that end after a separator; without a separator, all in one.

    Separators are found as by `bytes.split`, from left to right. A block is longer only if a single document is.

    Raises:
        DamagedError: damaged compressed data.
        OSError: as reading does.
    """
    buffer, searched = bytearray(), 0
    while chunk := stream.read(_READ_BYTES):
        buffer += chunk
        if separator is None or len(buffer) < block_bytes:
            continue
        end = _end_of_last(separator, buffer, searched)
        if end is None:
            searched = max(0, len(buffer) - len(separator) + 1)
            continue
        yield bytes(memoryview(buffer)[:end])
        del buffer[:end]
        searched = 0
    if buffer:
        yield bytes(buffer)


def _end_of_last(separator: bytes, buffer: bytearray, start: int) -> int | None:
    """Where the last separator ends, searching from left to right; None if there is none."""
    if len(separator) == 1:
        return buffer.rfind(separator, start) + 1 or None
    *before, rest = buffer[start:].split(separator)
    return len(buffer) - len(rest) if before else None
