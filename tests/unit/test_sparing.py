"""Saves in the background plan anew only what has changed, and copy nothing while the training waits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_meap.backend import device

device.prepare()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor, validation  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, apply_factories  # noqa: E402
from megatron.core.dist_checkpointing.strategies import fully_parallel  # noqa: E402
from megatron.core.dist_checkpointing.strategies.torch import (  # noqa: E402
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
)
from torch.distributed.checkpoint import FileSystemReader  # noqa: E402

from megatron_meap.backend.sparing import Sparing  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_rank")

State = dict[str, Any]


def tensor(name: str, *size: int, dtype: torch.dtype = torch.float32) -> ShardedTensor:
    """One that nobody has saved before."""
    return ShardedTensor.from_rank_offsets(name, torch.randn(size).to(dtype))


def halves(key: str, data: torch.Tensor, replica: Any, _: Any) -> list[ShardedTensor]:
    """A tensor as Megatron saves that of a SwiGLU."""
    return [
        ShardedTensor.from_rank_offsets(key, half, (0, number, 2), replica_id=replica)
        for number, half in enumerate(data.chunk(2))
    ]


def state() -> State:
    """A state as Megatron's, with other values each time."""
    swiglu = ShardedTensorFactory("mlp", torch.randn(6, 4), halves, torch.cat)
    states = {0: {"exp_avg": tensor("exp_avg", 3, 4)}}
    more = ShardedObject("more", {"seed": torch.randint(9, (2,))}, (1,), (0,))
    return {"model": {"weight": tensor("weight", 3, 4), "mlp": swiglu, "more": more}, "states": states, "iteration": 3}


CHANGES: dict[str, Callable[[State], object]] = {
    "a tensor more": lambda state: state["model"].update(bias=tensor("bias", 5)),
    "a tensor less": lambda state: state["model"].pop("mlp"),
    "another size": lambda state: state["model"].update(weight=tensor("weight", 3, 5)),
    "another type": lambda state: state["model"].update(weight=tensor("weight", 3, 4, dtype=torch.bfloat16)),
    "another name": lambda state: state["model"].update(weight=tensor("kernel", 3, 4)),
    "other halves": lambda state: state["model"].update(
        mlp=ShardedTensorFactory("mlp", torch.randn(8, 4), halves, torch.cat)
    ),
    "an object more": lambda state: state["states"].update(seen=ShardedObject("seen", [1, 2], (1,), (0,))),
    "a state more": lambda state: state["states"].update({1: {"exp_avg": tensor("exp_avg.1", 2)}}),
}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every plan that Megatron makes of all ranks' plans."""
    plans: list[int] = []
    make = MCoreSavePlanner.create_global_plan
    monkeypatch.setattr(
        MCoreSavePlanner, "create_global_plan", lambda self, every: plans.append(len(every)) or make(self, every)
    )
    return plans


@pytest.fixture(params=["as it is", "shared among data-parallel ranks"])
def strategy(request: pytest.FixtureRequest) -> Any:
    plain = TorchDistSaveShardedStrategy()
    return plain if request.param == "as it is" else fully_parallel.FullyParallelSaveStrategyWrapper(plain)


def saved(save: Sparing, strategy: Any, what: State, folder: Path) -> None:
    """Saved in the background, and complete."""
    folder.mkdir()
    save(what, str(folder), strategy, async_sharded_save=True, async_strategy="mcore").execute_sync()


def contents(what: State) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Tensors and names of objects of a state."""
    apply_factories(what)
    tensors: dict[str, torch.Tensor] = {}
    objects = {"common_state"}
    for each in nested_values(what):
        if isinstance(each, ShardedTensor):
            tensors[each.key] = torch.cat([tensors[each.key], each.data]) if each.key in tensors else each.data
        elif isinstance(each, ShardedObject):
            objects.add(each.key)
    return tensors, objects


def assert_holds(folder: Path, tensors: dict[str, torch.Tensor], objects: set[str]) -> None:
    """The checkpoint holds these, and nothing else."""
    names = FileSystemReader(folder).read_metadata().state_dict_metadata
    assert {name.partition("/")[0] for name in names} == tensors.keys() | objects
    found = dist_checkpointing.load_plain_tensors(str(folder))
    for name, expected in tensors.items():
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_planned_anew(change: str, strategy: Any, planned: list[int], tmp_path: Path) -> None:
    save = Sparing(dist_checkpointing.save)
    for number in range(8):
        what = state()
        if 4 <= number < 7:
            CHANGES[change](what)
        expected = contents(what)
        saved(save, strategy, what, tmp_path / str(number))
        assert_holds(tmp_path / str(number), *expected)
    # Megatron plans twice before it takes the same for granted.
    assert len(planned) == 2 + 2 + 1


def test_what_changes_on_another_rank_is_planned_anew(
    strategy: Any, planned: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Or this rank would go on while the others wait for its plan."""
    save = Sparing(dist_checkpointing.save)
    for number in range(6):
        with monkeypatch.context() as patched:
            if number == 3:  # what the other rank says
                patched.setattr(torch.distributed, "all_reduce", lambda tensor, _: tensor.zero_())
            saved(save, strategy, state(), tmp_path / str(number))
    assert len(planned) == 2 + 2


def test_parts_that_do_not_cover_a_tensor_are_still_refused(strategy: Any, tmp_path: Path) -> None:
    save = Sparing(dist_checkpointing.save)
    for number in range(3):
        saved(save, strategy, state(), tmp_path / str(number))
    for number in (3, 4):  # the second time too
        what = state()
        what["model"]["weight"] = ShardedTensor.from_rank_offsets("weight", torch.randn(3, 4), (0, 0, 2))
        with pytest.raises(validation.CheckpointingException, match="weight"):
            saved(save, strategy, what, tmp_path / str(number))


@pytest.mark.parametrize("way", [{}, {"async_sharded_save": True, "async_strategy": "nvrx"}])
def test_other_ways_to_save_are_left_alone(way: dict[str, Any], strategy: Any, tmp_path: Path) -> None:
    """A save in the foreground, and nvidia-resiliency-ext's, for which a plan that is kept means stale tensors."""
    given = []

    def save(_: State, folder: str, strategy: Any, **kwargs: Any) -> None:
        given.append((strategy, kwargs))

    sparing = Sparing(save)
    for _ in range(3):
        sparing(state(), str(tmp_path), strategy, **way)
    assert given == [(strategy, way)] * 3
    base = getattr(strategy, "base_strategy", strategy)
    assert not base.use_cached_ckpt_structure


def test_parts_of_a_storage_are_not_cloned_while_the_training_waits(strategy: Any, tmp_path: Path) -> None:
    """Megatron does, for PyTorch writes whole storages."""
    addresses = {}
    for name, save in (("Megatron", dist_checkpointing.save), ("ours", Sparing(dist_checkpointing.save))):
        (tmp_path / name).mkdir()
        what = state()
        whole = what["model"]["mlp"].data
        request = save(what, str(tmp_path / name), strategy, async_sharded_save=True, async_strategy="mcore")
        tensors = [
            each for *_, (_, tensors) in request.async_fn_args[1] for item, each in tensors if "mlp" in str(item)
        ]
        addresses[name] = {each.data_ptr() - whole.data_ptr() for each in tensors}
        request.execute_sync()
    assert addresses["ours"] == {0, 3 * 4 * 4}
    assert not addresses["Megatron"] & addresses["ours"]
