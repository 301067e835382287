"""A patch of Megatron's trainer, see megatron_patches.py: steps whose data is left out (`--iterations-to-skip`)."""

from collections.abc import Collection
from typing import Any

from megatron_meap.backend.patching import original_of, replace


def leave_out(steps: Collection[int]) -> None:
    """Read the data of these steps (the first is 1) without learning from it; otherwise they are like any other step.

    Megatron's own implementation omits a checkpoint, evaluation or exit that is due at such a step: at the end of the
    run, everything learned since the previous checkpoint would be lost. It also fails on pipeline stages that load no
    data, and on virtual ones. Megatron must therefore not see `--iterations-to-skip`.
    """
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import training

    train = original_of(training, "train_step")

    def train_or_read(forward_step: Any, data: Any, *args: Any, iteration: int, **kwargs: Any) -> tuple[Any, ...]:
        if iteration + 1 not in steps:
            return train(forward_step, data, *args, iteration=iteration, **kwargs)
        machine = get_rerun_state_machine()
        loaded = [part for part in (data if isinstance(data, list) else [data]) if part is not None]
        while machine.should_run_forward_backward(data):
            for _ in range(get_num_microbatches()):
                for part in loaded:
                    next(part)
        # No losses; not skipped (the log knows better), as a first step that is leaves the gathering of parameters off;
        # neither save nor exit, status 0; no norm, no count of zeros, no logit.
        return {}, 0, False, False, 0, None, None, 0

    replace(training, "train_step", lambda _: train_or_read)
