"""Branches of a run with a constant learning rate: a separate run that decays from one of its checkpoints on.

The branch has the checkpoint in its own `--save`, so that it resumes there like any run. On the same disk the files are
linked, not copied: checkpoints that the stable run deletes later stay here. The branch reads what the stable run would
have read next, because the data stays laid out for the same length.
"""

import shutil
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from megatron_meap.checkpoint import latest
from megatron_meap.checkpoint.reader import open_checkpoint
from megatron_meap.errors import UsageError
from megatron_meap.files import link_or_copy, whole_directory, whole_file
from megatron_meap.trainer.data_plan import planned_samples

FLAGS = "branch_flags.txt"
"""In the branch's `--save`: flags to put after those of the stable run."""


@dataclass(frozen=True)
class Branch:
    """Where and how to branch."""

    stable: Path
    """`--save` of the stable run."""
    step: int | None
    """Its step to branch at; None for its newest checkpoint."""
    decay: int
    """Steps of the decay."""
    save: Path
    """The branch's own `--save`."""
    style: str = "linear"
    min_lr: float | None = None
    """Learning rate at the end; None for the stable run's `--min-lr`."""

    def make(self) -> list[str]:
        """Link the checkpoint, and write the flags; returns them.

        Raises:
            UsageError: no branch is possible there, or the directory is in use.
        """
        if self.decay < 1:
            raise UsageError(f"--decay {self.decay}: must be at least 1")
        if latest.pointer(self.save) is not None:
            raise UsageError(f"--save {self.save}: holds a run already; resume it, or name another directory")
        checkpoint = open_checkpoint(self.stable, self.step)
        if not checkpoint.directory.name.startswith("iter_"):
            raise UsageError(f"{checkpoint.directory}: holds weights without a run; branch from a run's checkpoint")
        step = int(checkpoint.directory.name.removeprefix("iter_"))
        if wrong := latest.damage(checkpoint.directory):
            raise UsageError(f"{checkpoint.directory} cannot be used: {wrong}")
        flags = self._flags(checkpoint.args, step)
        with whole_file(self.save / FLAGS, "w") as file:
            file.write("\n".join(flags) + "\n")
        with whole_directory(latest.directory(self.save, step), overwrite=True) as directory:
            shutil.copytree(checkpoint.directory, directory, copy_function=link_or_copy, dirs_exist_ok=True)
        latest.set_pointer(self.save, step)
        return flags

    def _flags(self, args: Namespace, step: int) -> list[str]:
        """Flags of the branch that differ from the stable run's."""
        unit, each = ("samples", args.global_batch_size) if args.train_samples else ("iters", 1)
        _check_constant(args, step, unit, each)
        planned, end = planned_samples(args), step + self.decay
        if end * args.global_batch_size > planned:
            raise UsageError(
                f"--decay {self.decay}: the branch would end at step {end}, but the data of the stable run is laid out "
                f"for {planned // args.global_batch_size}; decay over fewer steps, or branch earlier"
            )
        lowest = args.min_lr if self.min_lr is None else self.min_lr
        if not 0 <= lowest <= args.lr:
            raise UsageError(f"--min-lr {lowest}: must lie between 0 and the stable run's --lr {args.lr}")
        return [
            f"--train-{unit} {end * each}",
            f"--lr-decay-style WSD --lr-wsd-decay-style {self.style} --min-lr {lowest}",
            f"--lr-decay-{unit} {end * each} --lr-wsd-decay-{unit} {self.decay * each}",
            "--override-opt_param-scheduler",
            f"--meap-data-samples {planned}",
            f"--load {self.save} --save {self.save}",
        ]


def _check_constant(args: Namespace, step: int, unit: str, each: int) -> None:
    """Refuse a step at which the learning rate is not (yet, or any longer) constant.

    Args:
        args: of the stable run.
        step: where to branch.
        unit: of its schedule: `iters` or `samples`.
        each: number of units per step.
    """
    if args.lr_decay_style not in ("constant", "WSD"):
        raise UsageError(
            f"--lr-decay-style {args.lr_decay_style}: the learning rate of the run was never constant; branch from one "
            "with --lr-decay-style constant or WSD"
        )
    if args.step_batch_size_schedule is not None:
        raise UsageError("--step-batch-size-schedule: a branch needs a run of one batch size")
    whole = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
    fraction, warmup = args.lr_warmup_fraction, getattr(args, f"lr_warmup_{unit}")
    warmup = warmup if fraction is None else fraction * whole
    if step * each < warmup:
        raise UsageError(f"--at {step}: the warm-up lasts until step {-(-warmup // each):.0f}; branch later")
    if args.lr_decay_style == "WSD":
        last = (whole - getattr(args, f"lr_wsd_decay_{unit}")) // each
        if step > last:
            raise UsageError(f"--at {step}: the run itself decays from step {last} on; branch there or before")
