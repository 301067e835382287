"""Which device trains: CUDA where there is one, else the CPU presented to Megatron as its accelerator."""

import os

import torch

from megatron_meap import compat
from megatron_meap.errors import UsageError


def prepare() -> bool:
    """Make Megatron importable and trainable on this machine; call it before anything imports Megatron.

    With a CUDA device this does nothing. Without one, or with `MEAP_DEVICE=cpu` in the environment, it installs the
    CPU adaptation (`megatron_meap.cpu`).

    Returns:
        True where the CPU trains.
    """
    compat.silence_known_warnings()
    choice = os.environ.get("MEAP_DEVICE", "auto")
    if choice not in ("auto", "cpu", "cuda"):
        raise UsageError(f"MEAP_DEVICE={choice}: expected auto, cpu or cuda")
    if choice == "cuda" or (choice == "auto" and torch.cuda.is_available()):
        return False
    from megatron_meap import cpu

    cpu.install()
    return True


def is_cpu() -> bool:
    """Whether `prepare` has put the CPU in the accelerator's place."""
    return getattr(torch.cuda, "meap_cpu_adaptation", False)
