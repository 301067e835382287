"""Directories that a run writes to: known to be writable before anything is written."""

import os
import tempfile
from argparse import Namespace
from pathlib import Path

from megatron_meap.errors import UsageError


def check(args: Namespace) -> None:
    """Refuse a directory for TensorBoard that its writer would fail to make."""
    if args.tensorboard_dir:
        check_writable("--tensorboard-dir", args.tensorboard_dir)


def check_writable(flag: str, directory: str | Path) -> None:
    """Refuse a directory that is not to be written or made, without making it."""
    path = Path(directory).absolute()
    existing = next(each for each in (path, *path.parents) if os.path.lexists(each))
    try:  # permissions do not tell: to root all are open, and a file server may think otherwise
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UsageError(
            f"{flag} {directory}: cannot be written ({existing} is not a directory that can be written); name another"
        ) from error
