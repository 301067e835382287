"""Directories and files that a run writes to: known to be writable before anything is written."""

import importlib.util
import os
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from megatron_meap.errors import UsageError

_DIRECTORIES = (
    "tensorboard_dir",
    "dump_param_to_param_group_map",
    "logits_save_dir",
    "moe_routing_trace_path",
)
"""Arguments that name one."""


def check(args: Namespace) -> None:
    """Refuse directories and files that Megatron would fail to make.

    Raises:
        UsageError: names the flag.
    """
    for name in _DIRECTORIES:
        if directory := getattr(args, name):
            check_writable(f"--{name.replace('_', '-')}", directory)
    if args.tensorboard_dir and importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--tensorboard-dir: needs the package tensorboard; install it (pip install tensorboard)")
    if (file := args.result_rejected_tracker_filename) and not Path(file).absolute().parent.is_dir():
        raise UsageError(f"--result-rejected-tracker-filename {file}: its directory is not there; make it")
    if args.profile:
        _check_profile(args)


def _check_profile(args: Namespace) -> None:
    """Refuse a profile without a place, or of steps and ranks that there are not."""
    if args.use_pytorch_profiler and not args.tensorboard_dir:
        raise UsageError("--use-pytorch-profiler: writes beside --tensorboard-dir, which is missing; add it")
    first, last, steps = (
        args.profile_step_start,
        args.profile_step_end,
        args.train_iters or args.train_samples or sys.maxsize,
    )
    if not 0 <= first < last <= steps:
        raise UsageError(
            f"--profile-step-start {first} --profile-step-end {last}: not steps of this run; the first must be 0 or "
            "more, the other larger, and not above --train-iters (or --train-samples)"
        )
    if wrong := [rank for rank in args.profile_ranks if not 0 <= rank < args.world_size]:
        raise UsageError(f"--profile-ranks {wrong[0]}: this job has ranks 0 to {args.world_size - 1}")


def check_writable(flag: str, directory: str | Path) -> None:
    """Refuse a directory that cannot be written or created, without creating it."""
    path = Path(directory).absolute()
    existing = next(each for each in (path, *path.parents) if os.path.lexists(each))
    try:  # permissions are not enough: root has all of them, and a file server may still refuse
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UsageError(
            f"{flag} {directory}: cannot be written ({existing} is not a directory that can be written); name another"
        ) from error
