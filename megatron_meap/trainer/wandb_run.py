"""A run on Weights & Biases that resumes with its training: only one, however often the job is requeued."""

import importlib.util
import os
import secrets
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from megatron.training import global_vars

from megatron_meap.backend.patching import replaced
from megatron_meap.errors import UsageError, one_line
from megatron_meap.files import whole_file
from megatron_meap.trainer.log_names import WANDB_ID


def check(args: Namespace) -> None:
    """Refuse what would make Megatron fail only on its last rank.

    Raises:
        UsageError: names the flag.
    """
    if not args.wandb_project:
        return
    if importlib.util.find_spec("wandb") is None:
        raise UsageError("--wandb-project: needs the package wandb (pip install wandb), or drop the flag")
    if not (args.wandb_save_dir or args.save):
        raise UsageError("--wandb-project: needs a directory for its files, --wandb-save-dir or --save")


def begin(args: Namespace) -> None:
    """Start the run, on the last rank as in Megatron, or continue the one whose id is in `--save`.

    `WANDB_RUN_ID` and `WANDB_RESUME` take precedence if they are set.
    """
    if not args.wandb_project or args.rank != args.world_size - 1:
        return
    if args.save:
        os.environ.setdefault("WANDB_RUN_ID", _id(Path(args.save) / WANDB_ID, _starts_anew(args)))
        os.environ.setdefault("WANDB_RESUME", "allow")
    # Megatron sets it in W&B's configuration later, which refuses a value that differs from the continued run's.
    args.slurm_job_name = os.environ.get("SLURM_JOB_NAME", "N/A")
    import wandb

    try:
        with open(os.devnull) as nobody, replaced(sys, "stdin", nobody):  # it would ask for a key, and all ranks wait
            global_vars._set_wandb_writer(args)
    except (wandb.Error, ValueError) as error:  # the latter is Megatron's, without --wandb-exp-name
        said = one_line(error).rstrip(".")
        raise UsageError(f"--wandb-project: {said}; WANDB_MODE=offline keeps the run here") from error
    if global_vars._GLOBAL_TENSORBOARD_WRITER is None:  # with which alone Megatron logs its values to W&B, too
        global_vars._GLOBAL_TENSORBOARD_WRITER = _NoBoard()


class _NoBoard:
    """In the place of TensorBoard's writer: takes every value and keeps none."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _starts_anew(args: Namespace) -> bool:
    """Whether this run replaces the one that was saved there."""
    return args.meap_overwrite_checkpoints and (args.load is None or args.finetune)


def _id(file: Path, anew: bool) -> str:
    """The id in the file, or a new one, which is written to it."""
    if file.is_file() and not anew:
        return file.read_text().strip()
    with whole_file(file, "w") as stream:
        stream.write(made := secrets.token_hex(8))
    return made
