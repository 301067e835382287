"""Mends for megatron-core 0.19 itself: each function names the defect it mends, for CPU and GPU users alike.

A mend that a later release no longer needs is deleted here and nowhere else.
"""

import warnings
from typing import Any

import torch


def apply() -> None:
    """Apply all mends; doing it twice is doing it once. Megatron must be importable (`device.prepare`)."""
    warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed.*")
    warnings.filterwarnings("ignore", message=".*Only transformer-engine.*supports MoE experts.*")
    _use_shipped_dataset_helpers()
    _resume_distributed_optimizer_without_te()


def _use_shipped_dataset_helpers() -> None:
    """`compile_helpers` runs `make` in the installed package, which has no Makefile, and ends the job.

    The compiled helpers are in the wheel: building them is needed in a source checkout only.
    """
    from megatron.core.datasets import utils

    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError:
        return
    utils.compile_helpers = lambda: None


def _resume_distributed_optimizer_without_te() -> None:
    """Resuming with `--use-distributed-optimizer` and PyTorch's AdamW fails, and once mended counts wrong steps.

    - `state_dict` asserts that the optimiser has stepped, but is also called to load into a fresh one.
    - `load_state_dict` gives all parameters one shared step tensor, which AdamW increments once per parameter, and
      then overwrites it with the step of the fresh optimiser, 0: the bias correction starts anew.
    - In fp32 it copies into views of parameters that require a gradient, which PyTorch refuses.

    (Transformer Engine's and Apex's optimisers keep the step in the parameter group.)
    """
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if distrib_optimizer.HAVE_APEX_OR_TE or hasattr(DistributedOptimizer, "meap_mended"):
        return
    state_dict, load_state_dict = DistributedOptimizer.state_dict, DistributedOptimizer.load_state_dict

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

    @torch.no_grad()
    def load_with_own_steps(self: Any, loaded: dict) -> None:
        load_state_dict(self, loaded)
        for state in self.optimizer.state.values():
            state["step"] = torch.tensor(float(loaded["optimizer"]["param_groups"][0]["step"]))

    DistributedOptimizer.state_dict = state_dict_of_fresh_optimizer
    DistributedOptimizer.load_state_dict = load_with_own_steps
    DistributedOptimizer.meap_mended = True
