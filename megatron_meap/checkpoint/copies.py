"""What a save in the background writes: copies, taken while the next step computes its gradients.

The process that saves is handed a CPU's tensors by Megatron themselves, in shared memory, and writes them while the
training goes on to change them: a checkpoint of several steps at once. Here the tensors are copied into memory that
both processes see, by a thread beside the training, which waits for it before its optimizer steps.
"""

import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.training import async_utils
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

_ALIGNED = 64
_COPIED_AT_ONCE = 2**16  # bytes; what else than the optimizer changes is small, as the biases of an expert's router
_DONE = 0  # the byte that says so; what is copied begins at the next aligned one


class _Place(NamedTuple):
    """Where the copy of a tensor is."""

    start: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, memory: mmap.mmap) -> Tensor:
        """The copy, with a storage of its own: PyTorch saves whole storages."""
        if self.shape.numel() == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        flat = torch.frombuffer(memory, dtype=self.dtype, count=self.shape.numel(), offset=self.start)
        return flat.view(self.shape)


class _Memory:
    """Memory that this process and one that it sends this to share: no name, and not limited by `/dev/shm`."""

    def __init__(self, size: int, file: int | None = None) -> None:
        self.file = os.memfd_create("checkpoint") if file is None else file
        self.size = size
        if file is None:
            os.ftruncate(self.file, size)
        self.bytes = mmap.mmap(self.file, size)

    def __reduce__(self) -> Any:
        return _attached, (DupFd(self.file), self.size)

    def __del__(self) -> None:
        os.close(self.file)


def _attached(file: Any, size: int) -> _Memory:
    return _Memory(size, file.detach())


class _Write:
    """In the process that saves: Megatron's writing, once everything is copied."""

    def __init__(self, write: Callable, memory: _Memory, buckets: list) -> None:
        self.write, self.memory, self.buckets = write, memory, buckets

    def __call__(self, rank: int, _: None, results: Any) -> None:
        while not self.memory.bytes[_DONE]:
            time.sleep(0.001)  # it ends with the training process, should that come to nothing
        copies = [
            (path, name, (objects, [(item, place.of(self.memory.bytes)) for item, place in tensors]))
            for path, name, (objects, tensors) in self.buckets
        ]
        self.write(rank, copies, results)


class Copies:
    """Wraps Megatron's `dist_checkpointing.save`: saves in the background write copies, and one at a time.

    Megatron lets a save wait in silence for the one before it: for as long as the saving process is writing that.

    Args:
        save: Megatron's, or what wraps it.
    """

    def __init__(self, save: Callable) -> None:
        self.save = save
        self.memory: _Memory | None = None
        self.copier = ThreadPoolExecutor(1, "copies")
        self.copied: Future | None = None
        self.folder: Path | None = None
        register_optimizer_step_pre_hook(self._wait)

    def __call__(self, state: Any, folder: Any, *args: Any, **kwargs: Any) -> Any:
        """Save, or begin to."""
        self._finish_the_one_before()
        self.folder = Path(folder)
        request = self.save(state, folder, *args, **kwargs)
        if not isinstance(request, AsyncRequest) or request.async_fn is None:
            return request
        rank, buckets, results = request.async_fn_args
        if any(tensor.device.type != "cpu" for *_, (_, tensors) in buckets for _, tensor in tensors):
            # Megatron copies these from the GPU, and waits for that; not what lies beside them, as an offloaded state.
            for *_, (_, tensors) in buckets:
                tensors[:] = [(item, each.clone() if each.device.type == "cpu" else each) for item, each in tensors]
            return request
        return request._replace(
            async_fn=self._taken(request.async_fn, buckets), async_fn_args=(rank, None, results), preload_fn=None
        )

    def _finish_the_one_before(self) -> None:
        if async_utils.is_empty_async_queue():
            return
        began = time.monotonic()
        say = print if torch.distributed.get_rank() == 0 else lambda *_, **__: None
        name = self.folder.name if self.folder else "before"
        say(f"the save of {name} is still running; waiting (save less often, or to a faster disk)", flush=True)
        async_utils._get_async_calls_queue().maybe_finalize_async_calls(blocking=True)
        say(f"waited {time.monotonic() - began:.1f} s for it", flush=True)

    def _taken(self, write: Callable, buckets: list) -> _Write:
        """Begin to copy."""
        places, sources, end = [], [], _ALIGNED
        for path, name, (objects, tensors) in buckets:
            placed = []
            for item, tensor in tensors:
                placed.append((item, _Place(end, tensor.dtype, tensor.shape)))
                sources.append((placed[-1][1], tensor.detach()))
                end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
            places.append((path, name, (objects, placed)))
        if self.memory is None or self.memory.size != end:
            self.memory = _Memory(end)
        memory = self.memory.bytes
        memory[_DONE] = 0
        for place, source in sources:
            if source.nbytes <= _COPIED_AT_ONCE:
                place.of(memory).copy_(source)
        self.copied = self.copier.submit(_copy, memory, sources)
        return _Write(write, self.memory, places)

    def _wait(self, *_: Any) -> None:
        if self.copied is not None:
            self.copied.result()
            self.copied = None


def _copy(memory: mmap.mmap, sources: list[tuple[_Place, Tensor]]) -> None:
    for place, source in sources:
        if source.nbytes > _COPIED_AT_ONCE:
            place.of(memory).copy_(source)
    memory[_DONE] = 1
