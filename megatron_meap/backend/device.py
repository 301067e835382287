"""The device for training: CUDA if there is one, otherwise the CPU, presented to Megatron as its accelerator."""

import os
import socket
import sys

import torch

from megatron_meap.backend import deferred, megatron_patches
from megatron_meap.errors import UsageError

_plans_for_gpu = False


def prepare() -> bool:
    """Make Megatron importable and trainable on this machine; call it before anything imports Megatron.

    With a CUDA device this patches nothing. Without one, or with `MEAP_DEVICE=cpu` in the environment, it installs the
    CPU adaptation (`megatron_meap.backend.cpu`).

    Returns:
        True where the CPU trains.

    Raises:
        UsageError: `MEAP_DEVICE=cuda`, as set by the recipes, but PyTorch cannot use a GPU.
    """
    megatron_patches.silence_known_warnings()
    _limit_connections()
    choice = _choice()
    if choice == "cuda" and (problem := gpu_problem()):
        raise UsageError(f"MEAP_DEVICE=cuda: on {socket.gethostname()} {problem}; MEAP_DEVICE=cpu trains on the CPU")
    if trains_on_cpu := choice == "cpu" or not torch.cuda.is_available():
        from megatron_meap.backend import cpu

        cpu.install()
    deferred.import_megatron()
    return trains_on_cpu


def prepare_to_look(here: bool = False) -> None:
    """Make Megatron importable without using a GPU, to examine a run instead of running it.

    Args:
        here: examine the run that this machine would do: on a CPU if there is no GPU. Otherwise a run on GPUs, whatever
            this machine has. `MEAP_DEVICE=cpu` and `=cuda` take precedence in both cases.
    """
    global _plans_for_gpu
    megatron_patches.silence_known_warnings()
    _limit_connections()
    choice = _choice()
    _plans_for_gpu = choice == "cuda" or (choice == "auto" and (not here or torch.cuda.is_available()))
    from megatron_meap.backend import cpu

    cpu.install()
    deferred.import_megatron()


def _limit_connections() -> None:
    """Give CUDA, before it starts, the one queue that Megatron demands for tensor parallelism, and forbids with FSDP.

    A value that is set already stays.
    """
    if {"--use-megatron-fsdp", "--use-torch-fsdp2"}.isdisjoint(sys.argv):
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _choice() -> str:
    choice = os.environ.get("MEAP_DEVICE", "auto")
    if choice not in ("auto", "cpu", "cuda"):
        raise UsageError(f"MEAP_DEVICE={choice}: expected auto, cpu or cuda")
    return choice


def gpu_problem() -> str | None:
    """Why PyTorch cannot use a GPU here, in its own words; None if it can."""
    if not torch.backends.cuda.is_built():
        return f"PyTorch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except Exception as error:  # PyTorch has no error class for it
        said = " ".join(str(error).split()).partition(". ")[0]
        return f"PyTorch {torch.__version__} for CUDA {torch.version.cuda} cannot use a GPU ({said})"
    return None


def plans_for_gpu() -> bool:
    """Whether this process only examines a run that is meant for GPUs."""
    return _plans_for_gpu


def is_cpu() -> bool:
    """Whether the CPU trains, in the accelerator's place."""
    return getattr(torch.cuda, "meap_cpu_adaptation", False) and not _plans_for_gpu
