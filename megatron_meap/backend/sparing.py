"""Saves in the background are prepared without copies that nobody needs."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_meap.backend.patching import replaced


class _WithoutClones(TorchFunctionMode):
    """Within it, the clone of a CPU's tensor is that tensor."""

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.clone and args[0].device.type == "cpu":
            return args[0]
        return function(*args, **(kwargs or {}))


def without_clones() -> AbstractContextManager:
    """Within it, saves are prepared without clones of parts of storages, as the halves of a SwiGLU.

    Megatron clones them while the training waits, for PyTorch writes whole storages.
    """
    prepare = FileSystemWriterAsync.prepare_write_data

    def prepared(*args: Any) -> None:
        with _WithoutClones():  # only here: it delays every use of a tensor
            prepare(*args)

    return replaced(FileSystemWriterAsync, "prepare_write_data", prepared)
