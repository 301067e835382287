"""Between two training steps: access to the parameters, and output of measurements."""

import contextlib
from argparse import Namespace
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def whole_parameters(args: Namespace, model: list[Any], optimizer: Any) -> Iterator[None]:
    """All parameters as the last step left them, on all ranks: with `--overlap-param-gather` some must still arrive."""
    from megatron.training.training import (
        disable_forward_pre_hook,
        enable_forward_pre_hook,
        should_disable_forward_pre_hook,
    )

    hooked = should_disable_forward_pre_hook(args) and bool(model[0].remove_forward_pre_hook_handles)
    if hooked:
        disable_forward_pre_hook(model, optimizer=optimizer)
    try:
        yield
    finally:
        if hooked:
            enable_forward_pre_hook(model)


def publish(name: str, line: str, values: dict[str, float], iteration: int) -> None:
    """On the last rank, write a line to the log, and values to TensorBoard and W&B as `name/...`."""
    from megatron.training.utils import is_last_rank

    if is_last_rank():
        print(f" {name} at iteration {iteration} | {line}", flush=True)
        write({f"{name}/{key}": value for key, value in values.items()}, iteration)


def write(values: dict[str, float], iteration: int) -> None:
    """Write values to TensorBoard and W&B, if this rank has them."""
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    if writer := get_tensorboard_writer():
        for key, value in values.items():
            writer.add_scalar(key, value, iteration)
    if wandb := get_wandb_writer():
        wandb.log(values, iteration)
