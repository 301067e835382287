"""Files and directories that are complete or not there at all.

Both are written under a hidden name beside their own, forced to the disk, and renamed at the end. Whatever happens
before that leaves what stood there before; what was begun is removed.
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
"""Bytes that must be free beside those that are known to be needed: tokenizer, configuration, index."""

# What libraries that write with their own code leave of the system's error: safetensors and NumPy.
_FULL = re.compile(r"No space left on device|Disk quota exceeded|\d+ requested and \d+ written")

_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK)


class CannotWriteError(UsageError):
    """A file or directory that cannot be written."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        """Why, without the path."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or one that led to it, comes from a disk without space."""
    return any(
        getattr(each, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _FULL.search(str(each))
        for each in causes(error)
    )


def cannot_write(path: str | Path, error: BaseException) -> CannotWriteError:
    """What to tell the user of an error in writing `path`."""
    reason = getattr(error, "strerror", None) or one_line(error)
    return _cannot_write(path, "the disk is full" if is_disk_full(error) else reason)


def _cannot_write(path: str | Path, reason: str) -> CannotWriteError:
    return CannotWriteError(f"{path}: cannot be written: {reason}; choose another output path", reason)


def sync(file: IO[Any]) -> None:
    """Force what was written to a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: str | Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: str, target: str) -> None:
    """Give a file one more name; where the disk is another, or has no links, copy it.

    What replaces the file later, or removes its first name, leaves this one as it is.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copy2(source, target)


@contextlib.contextmanager
def whole_file(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """A file to write to, which takes the name `path` when the block ends without an exception.

    Its folder is made where it is missing. An OSError of the block is taken to be this file's, unless it names another.

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
    """A directory to write to, which takes the name `target` when the block ends without an exception.

    Args:
        target: the name it shall have.
        overwrite: replace a directory that is there and not empty; otherwise it stays, and FileExistsError is raised.
        needed: bytes that will be written, where they are known: refused at once where they do not fit.

    Raises:
        CannotWriteError: it cannot be made, or the disk gets full.
        UsageError: the disk has not the room that is needed.
        FileExistsError: there is such a directory with something in it.
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
    """A new name in the same folder, hidden from those that list it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.incomplete")


def _lacks_space(directory: Path, needed: int) -> bool:
    """Whether what is still to be written does not fit: Megatron's writers lose the reason of their failure."""
    written = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return shutil.disk_usage(directory.parent).free < needed - written


def _publish(directory: Path, target: Path, overwrite: bool) -> None:
    """Force everything to the disk, then swap the directories."""
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
