"""A patch of Megatron's log (see megatron_patches.py): losses that not every step has."""

from collections.abc import Callable
from typing import Any

import torch


def over_steps_that_have_it(log: Callable) -> Callable:
    """Megatron's `training_log`, which averages each loss of an interval over the steps of that interval that have it.

    Megatron averages over all steps, and if a loss is over no token in one of them (a NaN), it is not logged for the
    whole interval. (This does not concern `lm loss`, where a NaN is an error.) If all steps are skipped, it logs zeros.
    The line of the first step after a start ends no interval for Megatron: where one ends there (`--log-interval 1`),
    the next line would be an average over both.
    """
    from megatron.training import training

    steps = "advanced iterations"
    found: dict[str, list[Any]] = {}

    def log_what_there_is(losses: dict[str, Any], totals: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        iteration, skipped, done = args[1], args[4], totals.get(steps, 0)
        if kwargs.get("is_first_iteration") and iteration % training.get_args().log_interval == 0:
            kwargs["is_first_iteration"] = False
        if not done:
            found.clear()  # an interval begins
        if skipped and not done:
            for name in [name for name in totals if not name.endswith(" iterations")]:
                del totals[name]
        missing = torch.stack([each.reshape(()) for each in losses.values()]).isnan().tolist() if losses else []
        lacking = {name for name, is_missing in zip(losses, missing, strict=True) if is_missing} - {"lm loss"}
        for name, loss in losses.items():
            if skipped or name == "lm loss":
                continue
            values = found.setdefault(name, [])
            values += [] if name in lacking else [loss]
            if len(values) <= done:  # what the log adds this loss to, and divides by all steps
                mean = torch.stack(values).mean() if values else loss
                totals[name] = mean.reshape(1) * (done + 1) - (0.0 if name in lacking else loss)
        return log({name: loss for name, loss in losses.items() if name not in lacking}, totals, *args, **kwargs)

    return log_what_there_is
