"""Mends for megatron-core 0.19 itself: each function names the defect it mends, for CPU and GPU users alike.

A mend that a later release no longer needs is deleted here and nowhere else.
"""

import contextlib
import copy
import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_meap.errors import UsageError

_KNOWN_WARNINGS = (
    ".*Apex (is|are) not installed.*",  # our local layers take their place
    ".*Only transformer-engine.*supports MoE experts.*",
    ".*torch.distributed is disabled, unavailable or uninitialized.*",  # one process reads a checkpoint
    ".*Could not determine rank.*",
    ".*MimoModelConfig is experimental.*",
)


def silence_known_warnings() -> None:
    """Pass over what Megatron warns of while it is imported and what its users can do nothing about."""
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(lambda record: "DEPRECATED" not in record.msg)


def apply() -> None:
    """Apply all mends; doing it twice is doing it once. Megatron must be importable (`device.prepare`)."""
    _use_shipped_dataset_helpers()
    _verify_checkpoints_once()
    _resume_distributed_optimizer_without_te()
    _load_weights_or_fail()
    _decay_all_parameters_on_request()
    _fuse_weight_gradients_where_possible()
    _evaluate_whole_sets_in_any_pipeline()


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
    - With `--dist-ckpt-optim-fully-reshardable` it asks the checkpoint for a step of every parameter.
    - In fp32 it copies into views of parameters that require a gradient, which PyTorch refuses.

    (Transformer Engine's and Apex's optimisers keep the step in the parameter group.)
    """
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if distrib_optimizer.HAVE_APEX_OR_TE or hasattr(DistributedOptimizer, "meap_mended"):
        return
    state_dict, load_state_dict = DistributedOptimizer.state_dict, DistributedOptimizer.load_state_dict
    set_main_param_and_states = DistributedOptimizer._set_main_param_and_optimizer_states

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
        for state in self.optimizer.state.values():
            state["step"] = torch.tensor(float(loaded["optimizer"]["param_groups"][0]["step"]))

    DistributedOptimizer.state_dict = state_dict_of_fresh_optimizer
    DistributedOptimizer.load_state_dict = load_with_own_steps
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
    DistributedOptimizer.meap_mended = True


def _verify_checkpoints_once() -> None:
    """`--verify-integrity` hashes a checkpoint while loading it, and fails for one that was saved without hashes.

    Our preflight has verified the checkpoint by then, and chosen another one where it was damaged.
    """
    from megatron.core.dist_checkpointing import serialization

    serialization.verify_integrity_manifest = lambda _: None


def _load_weights_or_fail() -> None:
    """`--dist-ckpt-strictness log_unexpected` (our default) starts weights that a checkpoint lacks at random values.

    It is meant for the extra state of Transformer Engine's layers, which those of other layers' checkpoints lack; only
    that is done without. What else is missing is refused; `log_all` keeps Megatron's way.
    """
    from megatron.core.dist_checkpointing import validation
    from megatron.training import get_args

    report = validation.maybe_report_missing_and_unexpected_keys
    report = getattr(report, "meap_original", report)

    def refuse(missing: set[str], unexpected: set[str], raise_error: bool = True) -> None:
        if raise_error or get_args().dist_ckpt_strictness != "log_unexpected":
            return report(missing, unexpected, raise_error)
        lacking = sorted(key for key in unexpected if not key.endswith("_extra_state"))
        if lacking:
            more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
            raise UsageError(
                f"--load: the checkpoint has no {', '.join(lacking[:3])}{more}, which this run needs; use the "
                "model and optimizer it was saved with, or --dist-ckpt-strictness log_all to start those anew"
            )
        return None

    refuse.meap_original = report  # type: ignore[attr-defined]
    validation.maybe_report_missing_and_unexpected_keys = refuse


def _decay_all_parameters_on_request() -> None:
    """Which parameters have no weight decay is fixed in a function that takes no flags (`official`)."""
    from megatron.training import training

    configure = getattr(training.get_megatron_optimizer_config, "meap_original", training.get_megatron_optimizer_config)

    def configure_on_request(args: Any) -> tuple[Any, dict]:
        config, overrides = configure(args)
        if args.meap_decay_all_parameters:  # drop what switches weight decay off for a kind of parameter
            overrides = {kind: override for kind, override in overrides.items() if override.get("wd_mult") != 0.0}
        return config, overrides

    configure_on_request.meap_original = configure  # type: ignore[attr-defined]
    training.get_megatron_optimizer_config = configure_on_request


def _fuse_weight_gradients_where_possible() -> None:
    """A GPT's output layer, Megatron's own beside Transformer Engine too, refuses to be made without Apex's kernel.

    Transformer Engine's layers have a kernel of their own: `--no-gradient-accumulation-fusion` would take it from them.
    """
    from megatron.core.tensor_parallel import layers

    if layers._grad_accum_fusion_available:
        return
    original = getattr(layers.ColumnParallelLinear.__init__, "meap_original", layers.ColumnParallelLinear.__init__)

    @functools.wraps(original)
    def initialise(self: Any, *args: Any, config: Any, **kwargs: Any) -> None:
        if config.gradient_accumulation_fusion:
            config = copy.copy(config)
            config.gradient_accumulation_fusion = False
        original(self, *args, config=config, **kwargs)

    initialise.meap_original = original  # type: ignore[attr-defined]
    layers.ColumnParallelLinear.__init__ = initialise


def _evaluate_whole_sets_in_any_pipeline() -> None:
    """Pipeline stages that load no data count None batches of a whole validation set, of which no tensor is made.

    (They are told the number before each evaluation.)
    """
    from megatron.training import get_args, training

    build = training.build_train_valid_test_data_iterators
    build = getattr(build, "meap_original", build)

    @functools.wraps(build)
    def build_and_count(*args: Any, **kwargs: Any) -> Any:
        iterators = build(*args, **kwargs)
        settings = get_args()
        if isinstance(settings.eval_iters, list):
            settings.eval_iters = [count or 0 for count in settings.eval_iters]
        return iterators

    build_and_count.meap_original = build  # type: ignore[attr-defined]
    training.build_train_valid_test_data_iterators = build_and_count


@contextlib.contextmanager
def outside_the_job() -> Iterator[None]:
    """Megatron's dataset classes build their caches on rank 0 alone, or where there is no job: let there be none."""
    is_initialized = torch.distributed.is_initialized
    torch.distributed.is_initialized = lambda: False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.distributed.is_initialized = is_initialized


def save_checkpoints_by(wrap: Callable[[Callable], Callable]) -> None:
    """Put `wrap` around Megatron's saving of distributed checkpoints, where rank 0 alone does `verify_integrity`."""
    from megatron.core import dist_checkpointing

    save = getattr(dist_checkpointing.save, "meap_original", dist_checkpointing.save)
    dist_checkpointing.save = wrap(save)
    dist_checkpointing.save.meap_original = save


def after_each_save(follow_up: Callable[[], object]) -> None:
    """Call `follow_up` on rank 0 whenever the trainer has saved a checkpoint: Megatron has no hook there."""
    from megatron.training import training

    save = getattr(training.save_checkpoint, "meap_original", training.save_checkpoint)

    @functools.wraps(save)
    def save_and_follow_up(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        if torch.distributed.get_rank() == 0:
            follow_up()

    save_and_follow_up.meap_original = save  # type: ignore[attr-defined]
    training.save_checkpoint = save_and_follow_up


def after_each_step(follow_up: Callable[[Any, Any, int], None]) -> None:
    """Call `follow_up(model chunks, optimizer, iteration)` on every rank after each training step.

    Megatron has no hook there. It comes after the step's log and evaluation, and before its checkpoint.
    """
    from megatron.training import training

    callbacks = getattr(training.post_training_step_callbacks, "meap_original", training.post_training_step_callbacks)

    @functools.wraps(callbacks)
    def call_back_and_follow_up(model: Any, optimizer: Any, scheduler: Any, iteration: int, *args: Any) -> Any:
        result = callbacks(model, optimizer, scheduler, iteration, *args)
        follow_up(model, optimizer, iteration)
        return result

    call_back_and_follow_up.meap_original = callbacks  # type: ignore[attr-defined]
    training.post_training_step_callbacks = call_back_and_follow_up
