"""Fixes for the optimizers of megatron-core 0.19: how their state is saved and loaded."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_meap.backend.patching import original_of, replace

_SCHEDULED = ("max_lr", "min_lr", "start_wd", "end_wd")
_FROM_FLAGS = ("betas", "eps", "momentum")


def apply() -> None:
    """Apply all of them; a second call has no effect."""
    _resume_distributed_optimizer_without_te()
    _leave_bucket_padding_out()
    _pair_parameter_groups()


def _resume_distributed_optimizer_without_te() -> None:
    """Resuming with `--use-distributed-optimizer` and PyTorch's AdamW fails, and with that fixed, counts steps wrongly.

    - `state_dict` asserts that the optimizer has stepped, but is also called to load into a fresh one.
    - `load_state_dict` gives all parameters one shared step tensor, which AdamW increments once per parameter, and
      then overwrites it with the step of the fresh optimizer, 0: the bias correction restarts.
    - With `--dist-ckpt-optim-fully-reshardable` it asks the checkpoint for a step of every parameter.
    - In fp32 it copies into views of parameters that require a gradient, which PyTorch refuses.

    (Transformer Engine's and Apex's optimizers keep the step in the parameter group.)
    """
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    state_dict = original_of(DistributedOptimizer, "state_dict")
    load_state_dict = original_of(DistributedOptimizer, "load_state_dict")
    set_main_param_and_states = original_of(DistributedOptimizer, "_set_main_param_and_optimizer_states")

    def state_dict_of_fresh_optimizer(self: Any) -> dict:
        fresh = self.optimizer is not None and not self.optimizer.state
        if fresh:  # as it will be after zero steps; Megatron fills the moments in the same way
            parameter = self.optimizer.param_groups[0]["params"][0]
            self.optimizer.state[parameter] = {"step": torch.tensor(0.0)}
        try:
            return state_dict(self)
        finally:
            if fresh:
                self.optimizer.state.clear()

    def set_states(self: Any, parameter: torch.Tensor, tensors: dict) -> None:
        set_main_param_and_states(self, parameter, {"step": None, **tensors})  # None: not a tensor to be copied

    @torch.no_grad()
    def load_with_own_steps(self: Any, loaded: dict) -> None:
        load_state_dict(self, loaded)
        for parameter, state in self.optimizer.state.items():  # PyTorch's fused kernel reads the step on its device
            state["step"] = torch.tensor(float(loaded["optimizer"]["param_groups"][0]["step"]), device=parameter.device)

    replace(DistributedOptimizer, "state_dict", lambda _: state_dict_of_fresh_optimizer)
    replace(DistributedOptimizer, "load_state_dict", lambda _: load_with_own_steps)
    replace(DistributedOptimizer, "_set_main_param_and_optimizer_states", lambda _: set_states)


def _leave_bucket_padding_out() -> None:
    """`--dist-ckpt-optim-fully-reshardable` saves wrong optimizer states where buckets before the last are padded.

    It gathers the buckets without the padding at their ends, and then looks parameters up at offsets with it: from the
    second padded bucket on, every parameter gets its neighbour's state (fixed in megatron-core's main by #5077).
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = original_of(DistributedOptimizer, "sharded_param_state_fully_reshardable")

    def with_places_in_the_gathered_tensors(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _without_padding(self.buffers):
            return original(self, *args, **kwargs)

    replace(
        DistributedOptimizer, "sharded_param_state_fully_reshardable", lambda _: with_places_in_the_gathered_tensors
    )


@contextmanager
def _without_padding(buffers: list[Any]) -> Iterator[None]:
    """Let the buffers give the places of their parameters without the padding at the ends of buckets."""
    original = [buffer.param_index_map for buffer in buffers]
    try:
        for buffer in buffers:
            shifts, end = {}, 0
            for bucket in buffer.buckets:
                shifts[bucket.bucket_id] = bucket.offset - end
                end += bucket.numel_unpadded
            buffer.param_index_map = {
                parameter: (start - shifts[bucket], stop - shifts[bucket], bucket)
                for parameter, (start, stop, bucket) in buffer.param_index_map.items()
            }
        yield
    finally:
        for buffer, places in zip(buffers, original, strict=True):
            buffer.param_index_map = places


def _pair_parameter_groups() -> None:
    """A loaded parameter group must equal this run's in learning rates, and have the keys of this optimizer's class.

    So another `--lr` ends in `Could not find parameter group with key`, even where `--override-opt_param-scheduler`
    asks for it; and groups saved by Transformer Engine's Adam do not fit PyTorch's (no `step` of a parameter), nor the
    other way round (no `bias_correction`, no `step` of a group).
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    def paired(load: Any, distributed: bool) -> Any:
        @functools.wraps(load)
        def load_paired(self: Any, loaded: dict) -> Any:
            inner = loaded.get("optimizer", loaded)
            if "param_groups" in inner and self.optimizer is not None:
                inner["param_groups"] = adopt_groups(self.optimizer.param_groups, inner["param_groups"])
                if not distributed:
                    _convert_steps(self.optimizer, inner)
            return load(self, loaded)

        load_paired.meap_paired = True  # type: ignore[attr-defined]
        return load_paired

    for kind in (DistributedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer):
        if not hasattr(kind.load_state_dict, "meap_paired"):
            kind.load_state_dict = paired(kind.load_state_dict, kind is DistributedOptimizer)


def adopt_groups(current: list[dict], loaded: list[dict]) -> list[dict]:
    """Loaded parameter groups as this run's optimizer has them: with its keys, and with what its flags say.

    Learning rates and weight decays are the checkpoint's with `--use-checkpoint-opt_param-scheduler`, where `current`
    is changed, else this run's: that they may differ has been settled before anything was loaded.
    """
    from megatron.training import get_args

    adopted = []
    for group in loaded:
        candidates = [each for each in current if _identity(each) == _identity(group)]
        own = next((each for each in candidates if _schedule(each) == _schedule(group)), None)
        if own is None and len(candidates) == 1:
            own = candidates[0]
            if get_args().use_checkpoint_opt_param_scheduler:
                own.update({key: group[key] for key in _SCHEDULED if key in group})
            else:
                group = {**group, **{key: own[key] for key in _SCHEDULED if key in own}}
        if own is not None:
            defaults = {key: value for key, value in own.items() if key != "params"}
            group = {**defaults, **group, **{key: own[key] for key in _FROM_FLAGS if key in own}}
        adopted.append(group)
    return adopted


def _identity(group: dict) -> tuple:
    """What distinguishes parameter groups, apart from the schedule."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    return tuple(
        group.get(key, group.get(f"pre_{key}")) for key in param_group_identifier_keys if key not in _SCHEDULED
    )


def _schedule(group: dict) -> tuple:
    return tuple(group.get(key) for key in _SCHEDULED)


def _convert_steps(optimizer: Any, loaded: dict) -> None:
    """Put the number of steps where this class of optimizers has it: in every parameter's state, or in the groups."""
    common = loaded["state"].get("common_step")
    in_groups = next((group["step"] for group in loaded["param_groups"] if group.get("step") is not None), None)
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        if common is None and in_groups is not None:
            loaded["state"]["common_step"] = torch.tensor(float(in_groups))
        for group in loaded["param_groups"]:
            group.pop("step", None)
    elif common is not None and in_groups is None:
        del loaded["state"]["common_step"]
        for group in loaded["param_groups"]:
            group["step"] = int(common)
