"""Output directories that are either complete or absent, and that replace only earlier outputs."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_meap.errors import UsageError
from megatron_meap.files import whole_directory


@contextlib.contextmanager
def new_directory(target: Path, *, source: Path, overwrite: bool, mark: str, needed: int) -> Iterator[Path]:
    """A directory to write to, renamed to `target` when the block ends without an exception.

    Args:
        target: its final name.
        source: what is being read; it must not be inside the target.
        overwrite: replace a target that is not empty, if it contains `mark`: other directories are never deleted.
        mark: name of a file that every output of this kind has.
        needed: bytes that will be written.

    Raises:
        UsageError: the target cannot be used, or the disk is full.
    """
    _refuse(target, source, overwrite, mark)
    with whole_directory(target, overwrite=True, needed=needed) as directory:
        yield directory


def _refuse(target: Path, source: Path, overwrite: bool, mark: str) -> None:
    """Refuse a target that must not be replaced."""
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target}: exists and is not a directory")
    if source.resolve().is_relative_to(target.resolve()):
        raise UsageError(f"{target}: holds {source}, which is being read; name another output directory")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{target}: exists and is not empty; add --overwrite, or name another directory")
    if not (target / mark).exists():
        raise UsageError(f"{target}: is not an earlier output (it has no {mark}), so --overwrite does not delete it")
