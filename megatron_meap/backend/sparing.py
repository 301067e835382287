"""Saves in the background are prepared without what nobody needs, for the training waits until they are.

- Megatron plans every save anew: which rank writes which part, gathered from all ranks. With
  `--ckpt-assume-constant-structure` it plans once and never looks again: a tensor that appears later would be missing.
  Here a plan is used again while everything on which it depends is as it was.
- Megatron clones parts of storages, as the halves of a SwiGLU, for PyTorch writes whole ones. Here copies are written.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing import state_dict_utils
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, apply_factories
from megatron.core.dist_checkpointing.strategies import fully_parallel
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_meap.backend.patching import replaced


class Sparing:
    """Wraps Megatron's `dist_checkpointing.save`, `save`."""

    def __init__(self, save: Callable) -> None:
        self.save = save
        self.structure: list[tuple[type, dict]] | None = None
        self.strategy: Any = None

    def __call__(self, state: Any, folder: Any, strategy: Any, **kwargs: Any) -> Any:
        """Save, or begin to."""
        # Told to keep its plan, nvidia-resiliency-ext ("nvrx") keeps where a GPU's tensors were, too: version 0.6.0
        # writes what is there now, also of a tensor that was put together for this save, elsewhere.
        if not kwargs.get("async_sharded_save") or kwargs.get("async_strategy") != "mcore":
            return self.save(state, folder, strategy, **kwargs)
        apply_factories(state)
        structure = _structure(state)
        same = _on_all_ranks(structure == self.structure)
        if not same:
            self.structure, self.strategy = None, _keeping_its_plan(strategy)
        with ExitStack() as spared:
            spared.enter_context(_without_clones())
            if same:
                spared.enter_context(_without_checks_of_shards())
            request = self.save(state, folder, self.strategy, **kwargs)
        self.structure = structure  # only now: what Megatron refuses it must refuse again
        return request


def _structure(state: Any) -> list[tuple[type, dict]]:
    """What a plan depends on: everything but the data."""
    return [(type(each), vars(each) | {"data": None}) for each in nested_values(state) if isinstance(each, ShardedBase)]


def _on_all_ranks(here: bool) -> bool:
    everywhere = torch.tensor(here, dtype=torch.int, device=torch.cuda.current_device())
    torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN)
    return bool(everywhere)


def _keeping_its_plan(strategy: Any) -> Any:
    """A copy of Megatron's strategy that will; nothing is ever saved by the one copied, so that has no plan yet."""
    keeping = copy.copy(strategy)
    if isinstance(keeping, fully_parallel.FullyParallelSaveStrategyWrapper):
        keeping.base_strategy = _keeping_its_plan(keeping.base_strategy)
        keeping.do_cache_distribution = True
    else:
        keeping.use_cached_ckpt_structure = True
    return keeping


@contextmanager
def _without_checks_of_shards() -> Iterator[None]:
    """Within it, Megatron does not ask all ranks again whether their parts cover every tensor."""
    with ExitStack() as both:
        for module in (state_dict_utils, fully_parallel):
            both.enter_context(replaced(module, "determine_global_metadata", lambda part: (part, [])))
        yield


class _Unchanged(TorchFunctionMode):
    """Within it, the clone of a CPU's tensor is that tensor."""

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.clone and args[0].device.type == "cpu":
            return args[0]
        return function(*args, **(kwargs or {}))


@contextmanager
def _without_clones() -> Iterator[None]:
    prepare = FileSystemWriterAsync.prepare_write_data

    def prepared(*args: Any) -> None:
        with _Unchanged():  # only here: it delays every use of a tensor
            prepare(*args)

    with replaced(FileSystemWriterAsync, "prepare_write_data", prepared):
        yield
