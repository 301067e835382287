"""The schedule of learning rate and weight decay: what Megatron's scheduler refuses, and which one a resume uses."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_meap.errors import UsageError
from megatron_meap.trainer import optimizers
from megatron_meap.trainer.refusals import explained

_WORDS = {
    "max_lr": "--lr",
    "lr_warmup_steps": "warm-up (samples)",
    "lr_decay_steps": "decay of the learning rate (samples)",
    "wd_incr_steps": "growth of the weight decay (samples)",
}
"""Names, for people, of the entries of the scheduler's state."""


def check(args: Namespace) -> None:
    """Refuse a run without a length, or with a schedule that Megatron's scheduler does not support.

    Args:
        args: validated by Megatron, and its global arguments.
    """
    if not (args.train_iters or args.train_samples):
        raise UsageError("--train-iters: missing; how many steps does the run take (or --train-samples)?")
    if not args.train_iters and args.global_batch_size and args.train_samples < args.global_batch_size:
        raise UsageError(f"--train-samples {args.train_samples}: less than one batch of {args.global_batch_size}")
    if args.skip_train:
        return
    optimizers.check(args)
    if args.lr is None:
        raise UsageError("--lr: missing; the learning rate at its highest")
    if args.lr == 0 and not args.decoupled_lr:
        print("note: --lr 0: nothing is learned", flush=True)
    unit = "iters" if args.train_iters else "samples"
    for smaller, larger in (("min_lr", "lr"), ("lr_warmup_init", "lr"), ("start_weight_decay", "end_weight_decay")):
        if not 0 <= getattr(args, smaller) <= getattr(args, larger):
            raise UsageError(
                f"{_flag(smaller)} {getattr(args, smaller)}: must lie between 0 and {_flag(larger)} "
                f"{getattr(args, larger)}"
            )
    _check_parts(args, unit)
    with explained(args):
        state_of(args)


def _check_parts(args: Namespace, unit: str) -> None:
    """Warm-up, decay and their sum."""
    whole = getattr(args, f"lr_decay_{unit}")
    whole = getattr(args, f"train_{unit}") if whole is None else whole
    if whole <= 0:
        raise UsageError(f"--lr-decay-{unit} {whole}: must be above 0")
    fraction, warmup = args.lr_warmup_fraction, getattr(args, f"lr_warmup_{unit}")
    if fraction is not None and not 0 <= fraction < 1:
        raise UsageError(f"--lr-warmup-fraction {fraction}: must be at least 0 and below 1, the whole schedule")
    if warmup < 0:
        raise UsageError(f"--lr-warmup-{unit} {warmup}: must be 0 or more")
    if warmup >= whole:
        raise UsageError(
            f"--lr-warmup-{unit} {warmup}: must be less than the {whole} {unit} of the schedule "
            f"(--lr-decay-{unit}, else --train-{unit})"
        )
    if args.lr_decay_style != "WSD":
        return
    decay = getattr(args, f"lr_wsd_decay_{unit}")
    if decay is None:
        raise UsageError(
            f"--lr-wsd-decay-{unit}: missing; --lr-decay-style WSD ends with a decay over this many {unit}"
        )
    if not 0 < decay <= whole - warmup:
        raise UsageError(
            f"--lr-wsd-decay-{unit} {decay}: must be above 0, and at most the {whole - warmup} {unit} of the schedule "
            "after its warm-up"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def state_of(args: Namespace) -> dict[str, Any]:
    """The scheduler's state before the first step, as Megatron's own would save it.

    Args:
        args: Megatron's global arguments, which are not changed.
    """
    from megatron.training.training import get_optimizer_param_scheduler

    before = dict(vars(args))
    try:  # it completes them
        return get_optimizer_param_scheduler(SimpleNamespace(param_groups=[])).state_dict()
    finally:
        vars(args).clear()
        vars(args).update(before)


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Differences between two states of the scheduler, apart from their progress; Megatron counts steps in samples."""
    return [
        f"{_WORDS.get(name, name)} {there[name]} there, {value} here"
        for name, value in here.items()
        if name != "num_steps" and name in there and there[name] != value
    ]


def compare(path: Path, state: dict[str, Any], args: Namespace) -> list[str]:
    """Refuse another schedule than the checkpoint's, unless a flag chooses one of them, which is then reported.

    Args:
        path: of the checkpoint.
        state: its common state.
        args: of this run.
    """
    there = state.get("opt_param_scheduler")
    if there is None or args.no_load_optim:
        return []
    if not (changed := differences(there, state_of(args))):
        return []
    said = f"{path} has another schedule: {'; '.join(changed)}"
    if args.override_opt_param_scheduler:
        return [f"{said}; this run's is taken"]
    if args.use_checkpoint_opt_param_scheduler:
        return [f"{said}; the checkpoint's is taken"]
    raise UsageError(
        f"--load: {said}; add --override-opt_param-scheduler to take this run's (--lr, --min-lr, --lr-decay-*, "
        "--lr-warmup-*, --weight-decay, --train-iters), or --use-checkpoint-opt_param-scheduler to keep the other"
    )
