"""Files and directories that are either complete or absent.

Both are written under a hidden name in the same folder, synced to disk, and renamed at the end. If anything fails
before that, the old content stays and the unfinished one is removed.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_meap.errors import UsageError, causes, one_line

ROOM_FOR_THE_REST = 64 * 2**20
"""Bytes that must be free in addition to those known to be needed: tokenizer, configuration, index."""

# What safetensors and NumPy, which write with code of their own, say instead of the system's error.
_FULL = re.compile(r"No space left on device|Disk quota exceeded|\d+ requested and \d+ written")

_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK)


class CannotWriteError(UsageError):
    """A file or directory that cannot be written."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        """Why, without the path."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or one that caused it, comes from a full disk."""
    return any(
        getattr(each, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _FULL.search(str(each))
        for each in causes(error)
    )


def cannot_write(path: str | Path, error: BaseException) -> CannotWriteError:
    """The error to report when writing `path` failed."""
    reason = getattr(error, "strerror", None) or one_line(error)
    return _cannot_write(path, "the disk is full" if is_disk_full(error) else reason)


def _cannot_write(path: str | Path, reason: str) -> CannotWriteError:
    return CannotWriteError(f"{path}: cannot be written: {reason}; choose another output path", reason)


def sync(file: IO[Any]) -> None:
    """Flush a file to disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: str | Path) -> None:
    """Flush the entries of a folder to disk, so that they survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: str, target: str) -> None:
    """Give a file one more name; copy it if the target is on another disk, or on one without hard links.

    The new name keeps the content when the first one is removed or replaced later.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copy2(source, target)


@contextlib.contextmanager
def whole_file(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """A file to write to, renamed to `path` when the block ends without an exception.

    Its folder is created if needed. An OSError in the block counts as this file's, unless it names another.

    Raises:
        CannotWriteError: it cannot be written, or the disk gets full.
    """
    path = Path(path)
    temporary = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(temporary, mode)  # noqa: SIM115 - closed below, whatever happens
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        with file:
            yield file
            sync(file)
        temporary.replace(path)
        sync_folder(path.parent)
    except UsageError:
        raise
    except Exception as error:
        ours = isinstance(error, OSError) and error.filename in (None, str(temporary))
        if ours or is_disk_full(error):
            raise cannot_write(path, error) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_directory(target: Path, *, overwrite: bool = False, needed: int = 0) -> Iterator[Path]:
    """A directory to write to, renamed to `target` when the block ends without an exception.

    Args:
        target: its final name.
        overwrite: replace an existing directory; otherwise one that is not empty stays, with a FileExistsError.
        needed: bytes that will be written, if known: refused at once if they do not fit.

    Raises:
        CannotWriteError: it cannot be created, or the disk is full.
        UsageError: the disk does not have enough space.
        FileExistsError: the directory exists and is not empty.
    """
    directory = _beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free, wanted = shutil.disk_usage(target.parent).free, needed + ROOM_FOR_THE_REST
        if needed and free < wanted:
            raise UsageError(f"{target}: {wanted / 1e9:.2f} GB are needed there, {free / 1e9:.2f} GB are free")
        directory.mkdir()
    except OSError as error:
        raise cannot_write(target, error) from error
    try:
        yield directory
        _publish(directory, target, overwrite)
    except (UsageError, KeyboardInterrupt):
        raise
    except BaseException as error:  # PyTorch's CheckpointException is not an Exception
        if is_disk_full(error) or _lacks_space(directory, needed):
            raise _cannot_write(target, "the disk is full") from error
        raise
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A new hidden name in the same folder."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.incomplete")


def _lacks_space(directory: Path, needed: int) -> bool:
    """Whether the rest does not fit on the disk: Megatron's writers lose the reason of their failure."""
    written = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return shutil.disk_usage(directory.parent).free < needed - written


def _publish(directory: Path, target: Path, overwrite: bool) -> None:
    """Flush everything to disk, then swap the directories."""
    umask = os.umask(0)
    os.umask(umask)
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)  # safetensors and others make them private
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(directory)
    if overwrite and target.exists():
        old = directory.with_suffix(".replaced")
        target.rename(old)
        try:
            directory.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old)
    else:
        try:
            directory.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise FileExistsError(error.errno, os.strerror(error.errno), str(target)) from error
            raise
    sync_folder(target.parent)
