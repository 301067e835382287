"""Steps with a loss or gradients that are not finite (or that spike): how a run ends there, and how to go on."""

import contextlib
import re
import sys
import time
from argparse import Namespace
from functools import partial
from typing import NoReturn

import torch
from megatron.core.rerun_state_machine import (
    EXIT_CODE_FAILED_ON_RESULT_VALIDATION,
    EXIT_CODE_RESUME_TO_DISAMBIGUATE,
    RerunMode,
    get_rerun_state_machine,
)
from megatron.training import get_args

from megatron_meap.errors import UsageError, note_status

TO_RESUME, REPEATS = EXIT_CODE_RESUME_TO_DISAMBIGUATE, EXIT_CODE_FAILED_ON_RESULT_VALIDATION
STATUSES = (TO_RESUME, REPEATS)
"""Megatron's exit statuses: 16 at first, 17 if the step was computed again or cannot be."""

_ENDED = "meap/ended for a bad step"
_store = torch.distributed.distributed_c10d._get_default_store

_MESSAGE = re.compile(r"Unexpected result .*message='(.*)'")


def check(args: Namespace) -> None:
    """Refuse a mode that Megatron's parser takes and its trainer does not know.

    Raises:
        UsageError: names the flag.
    """
    if args.rerun_mode not in list(RerunMode):
        raise UsageError(f"--rerun-mode {args.rerun_mode}: megatron-core 0.19 fails; use disabled or validate_results")


def refuse(loss: torch.Tensor) -> None:
    """Stop at a loss that is NaN or infinite, before it is reduced over ranks; report a spiky one, if asked."""
    args = get_args()
    machine = get_rerun_state_machine()
    where = "local forward loss calculation" if torch.is_grad_enabled() else "an evaluation"
    if args.check_for_nan_in_loss_and_grad:
        for name, rejected in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            machine.validate_result(
                result=loss,
                rejection_func=rejected,
                message=f"found {name} in {where}",
                tolerance=0.0,  # the forward pass is deterministic
                fatal=True,
            )
    if args.check_for_spiky_loss:
        machine.validate_result(
            result=loss,
            rejection_func=partial(machine.is_unexpectedly_large, threshold=10, context="loss"),
            message="Spiky loss",
            tolerance=0.0,
            fatal=False,
        )


def found_in(error: BaseException | None) -> str | None:
    """What is wrong with such a step, from the error that Megatron raises with `--rerun-mode disabled`; else None."""
    match = _MESSAGE.search(str(error)) if isinstance(error, RuntimeError) else None
    return None if match is None else match[1]


def iteration_of(args: Namespace) -> int:
    """Steps done, which Megatron counts only in its training loop: a run may only evaluate."""
    return int(getattr(args, "curr_iteration", getattr(args, "iteration", 0)))


def end(args: Namespace, status: int, found: str | None = None) -> NoReturn:
    """Print in one line which step it was and what can be done, unless another rank has said so, and exit.

    Args:
        args: of the run.
        status: one of `STATUSES`.
        found: what is wrong with the step, if Megatron's own record does not say.
    """
    call = getattr(get_rerun_state_machine(), "failed_validation_call", None)
    found = found or (call and call.caller.message) or "a loss or gradient that is not finite, on another rank"
    is_said = ended_elsewhere() is not None
    with contextlib.suppress(RuntimeError):  # the store's host may have ended
        _store().set(_ENDED, str(status))
    if args.rank != 0:
        time.sleep(3)  # rank 0 prints first, and torchrun then ends the others
    step = iteration_of(args) + 1
    skip = f"--iterations-to-skip {step} --rerun-mode disabled"
    ways = f"nothing is saved (no --save); {skip} leaves its data out, or start anew with another --lr"
    if args.skip_train:
        ways = "the weights that were loaded give no other; name an earlier checkpoint (--ckpt-step)"
    elif args.save:
        ways = f"--load {args.save} {skip} resumes without its data, or resume before it (--ckpt-step)"
    if not is_said:
        print(f"error: step {step}: {found}; {ways}", file=sys.stderr, flush=True)
    note_status(status)
    sys.exit(status)


def ended_elsewhere() -> int | None:
    """The status with which another rank has ended for such a step, and said so; else None."""
    with contextlib.suppress(RuntimeError):
        return int(_store().get(_ENDED)) if _store().check([_ENDED]) else None
    return None
