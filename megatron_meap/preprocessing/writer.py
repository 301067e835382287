"""A dataset's files, written incrementally, under temporary names until they are complete.

The `.bin` file contains the ids of all documents, one after the other; `index` describes the `.idx` file.
`tests/unit/test_preprocessing_dataset.py` compares both with the files that Megatron's own builder writes.
"""

import contextlib
import errno
import hashlib
import os
from collections.abc import Buffer, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_meap.errors import UsageError
from megatron_meap.files import cannot_write, sync, sync_folder
from megatron_meap.preprocessing.index import CHUNK, index_bytes

MANIFEST_SUFFIX = ".manifest.json"


@dataclass(frozen=True)
class Written:
    """How much of a dataset is written: enough to continue it."""

    documents: int = 0
    tokens: int = 0
    bin_sha256: str = ""


def refuse_folders(*paths: str | Path) -> None:
    """Raise an OSError if a file cannot have one of these names, which would only show at the end of a job."""
    for path in paths:
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


class DatasetWriter:
    """Writes one dataset to `PREFIX.bin` and `PREFIX.idx`.

    Until `publish`, everything is in `PREFIX.bin.partial` and two files with similar names. Memory does not grow with
    the dataset: lengths go to a file too, and the index is made from it piece by piece.
    """

    def __init__(self, prefix: str, dtype: type[np.number], start: Written | None = None) -> None:
        """Begin, or continue an earlier run's files after `start`.

        Raises:
            UsageError: the files cannot be created, or do not match `start`.
        """
        self.prefix = prefix
        self._dtype = np.dtype(dtype)
        self.documents, self.tokens = (start.documents, start.tokens) if start else (0, 0)
        self._bin_path, self._lengths_path, self._idx_path = (
            Path(f"{prefix}.{kind}.partial") for kind in ("bin", "lengths", "idx")
        )
        try:
            names = [prefix + suffix for suffix in (".bin", ".idx", MANIFEST_SUFFIX, ".manifest.partial")]
            refuse_folders(*names, self._bin_path, self._lengths_path, self._idx_path)
            self._bin = open(self._bin_path, "r+b" if start else "wb")  # noqa: SIM115 - closed by close()
            self._lengths = open(self._lengths_path, "r+b" if start else "w+b")  # noqa: SIM115
        except OSError as error:
            if start and isinstance(error, FileNotFoundError):
                raise UsageError(f"{error.filename}: no longer there; start without --resume") from error
            raise cannot_write(error.filename, error) from error
        self._hash = hashlib.sha256()
        if start:
            self._continue_after(start)

    def _continue_after(self, start: Written) -> None:
        for file, size in ((self._bin, start.tokens * self._dtype.itemsize), (self._lengths, start.documents * 4)):
            file.seek(0, os.SEEK_END)
            if file.tell() < size:
                raise UsageError(f"{file.name}: shorter than the earlier run left it; start without --resume")
            file.truncate(size)
            file.seek(0)
        while chunk := self._bin.read(1 << 20):
            self._hash.update(chunk)
        if self._hash.hexdigest() != start.bin_sha256:
            raise UsageError(f"{self._bin.name}: not what the earlier run wrote; start without --resume")
        self._lengths.seek(0, os.SEEK_END)

    def add(self, tokens: Buffer, lengths: Buffer) -> None:
        """Append documents: their ids, one after the other, and their lengths (int32)."""
        self._bin.write(tokens)
        self._hash.update(tokens)
        self._lengths.write(lengths)
        self.documents += memoryview(lengths).nbytes // 4
        self.tokens += memoryview(tokens).nbytes // self._dtype.itemsize

    def state(self) -> Written:
        """How much is written; afterwards, everything added is with the operating system."""
        self._bin.flush()
        self._lengths.flush()
        return Written(self.documents, self.tokens, self._hash.copy().hexdigest())

    def finish(self, boundaries: Iterator[np.ndarray] | None = None, documents: int | None = None) -> dict[str, Any]:
        """Write the index and force both files to disk, still under their temporary names.

        Args:
            boundaries: as for `index_bytes`, if a document may consist of several of the added sequences.
            documents: their number, with `boundaries`.

        Returns:
            For `.bin` and `.idx`: bytes and sha256.
        """
        sync(self._bin)
        idx_hash, idx_bytes = hashlib.sha256(), 0
        with open(self._idx_path, "wb") as file:
            for piece in index_bytes(self._dtype, self.documents, self._stored_lengths, boundaries, documents):
                file.write(piece)
                idx_hash.update(piece)
                idx_bytes += len(piece)
            sync(file)
        return {
            ".bin": {"bytes": self.tokens * self._dtype.itemsize, "sha256": self._hash.hexdigest()},
            ".idx": {"bytes": idx_bytes, "sha256": idx_hash.hexdigest()},
        }

    def _stored_lengths(self) -> Iterator[np.ndarray]:
        self._lengths.seek(0)
        while chunk := self._lengths.read(4 * CHUNK):
            yield np.frombuffer(chunk, np.int32)

    def publish(self, manifest: bytes | None) -> None:
        """Give the finished files, and the manifest if there is one, their names.

        The index comes last, so that an old index is never beside a new `.bin`.
        """
        partial = Path(self.prefix + ".manifest.partial")
        if manifest is not None:
            with open(partial, "wb") as file:
                file.write(manifest)
                sync(file)
        for suffix in (".idx", MANIFEST_SUFFIX):
            Path(self.prefix + suffix).unlink(missing_ok=True)
        self._bin_path.replace(self.prefix + ".bin")
        if manifest is not None:
            partial.replace(self.prefix + MANIFEST_SUFFIX)
        self._idx_path.replace(self.prefix + ".idx")
        sync_folder(Path(self.prefix).absolute().parent)
        self.discard()

    def close(self) -> None:
        """Close the temporary files, and leave them in place."""
        for file in (self._bin, self._lengths):
            with contextlib.suppress(OSError):  # a disk that was full before is still full
                file.close()

    def discard(self) -> None:
        """Remove the temporary files that are left."""
        self.close()
        for path in (self._bin_path, self._lengths_path, self._idx_path, Path(self.prefix + ".manifest.partial")):
            path.unlink(missing_ok=True)
