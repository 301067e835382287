"""Output directories that are complete or not there at all."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_meap.errors import UsageError

ROOM_FOR_THE_REST = 64 * 2**20  # tokenizer, configuration, index: generous


@contextlib.contextmanager
def new_directory(target: Path, *, source: Path, overwrite: bool, mark: str, needed: int) -> Iterator[Path]:
    """A directory to write to, which takes the name `target` when the block ends without an exception.

    Until then it stands beside the target as `.<name>.<random>.incomplete`; after an exception it is gone.

    Args:
        target: the name it shall have.
        source: what is being read; it must not lie in the target.
        overwrite: replace a target that is not empty, if it holds `mark`: other directories are never deleted.
        mark: name of a file that every output of this kind has.
        needed: bytes that will be written.

    Raises:
        UsageError: the target cannot be used, or the disk is, or gets, full.
    """
    _refuse(target, source, overwrite, mark)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < needed + ROOM_FOR_THE_REST:
            raise UsageError(
                f"{target}: {(needed + ROOM_FOR_THE_REST) / 1e9:.2f} GB are needed there, {free / 1e9:.2f} GB are free"
            )
        directory = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".incomplete", dir=target.parent))
    except OSError as error:
        raise UsageError(f"{target}: cannot be written ({error.strerror})") from error
    try:
        yield directory
        _publish(directory, target)
    except (UsageError, KeyboardInterrupt):
        raise
    except BaseException as error:  # PyTorch's CheckpointException is not an Exception
        if _is_disk_full(error) or _lacks_space(directory, needed):
            raise UsageError(f"{target}: the disk is full; nothing was left there") from error
        raise
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether an exception comes from a disk without space, wrapped in others or not."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _lacks_space(directory: Path, needed: int) -> bool:
    """Whether what is still to be written does not fit: Megatron's writers lose the reason of their failure."""
    written = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return shutil.disk_usage(directory).free < needed - written


def _refuse(target: Path, source: Path, overwrite: bool, mark: str) -> None:
    """Refuse a target that must not, or must not silently, be replaced."""
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


def _publish(directory: Path, target: Path) -> None:
    """Write everything to the disk, then swap the directories."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (directory, *directory.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)  # mkdtemp and safetensors make them private
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    if target.exists():
        old = directory.with_suffix(".replaced")
        target.rename(old)
        directory.rename(target)
        shutil.rmtree(old)
    else:
        directory.rename(target)
