"""Patches of megatron-core itself, for CPU and GPU users alike: each function names the defect that it fixes.

All are for 0.19 (written for 0.19.2); if no upstream issue is named, none is known.
`tests/unit/test_megatron_patches.py` shows each defect in the installed Megatron: if such a test fails, that release no
longer needs the patch, which then is deleted only here.
"""

import contextlib
import copy
import logging
import os
import warnings
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_meap.backend import helpers, optimizer_patches
from megatron_meap.backend.loss_patches import over_steps_that_have_it
from megatron_meap.backend.patching import original_of, replace, replaced
from megatron_meap.errors import UsageError

_KNOWN_WARNINGS = (
    ".*Apex (is|are) not installed.*",  # our local layers take their place
    ".*Only transformer-engine.*supports MoE experts.*",
    ".*torch.distributed is disabled, unavailable or uninitialized.*",  # one process reads a checkpoint
    ".*Could not determine rank.*",
    ".*MimoModelConfig is experimental.*",
    ".*invalid escape sequence.*",
    ".*AccumulateGrad node's stream does not match.*",  # of its data parallelism, on GPUs
    ".*using the device under current context.*",  # of its barriers, on GPUs
)
_verified: set[str] = set()


def silence_known_warnings() -> None:
    """Silence warnings of Megatron's imports that its users can do nothing about."""
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(lambda record: "DEPRECATED" not in record.msg)


def apply() -> None:
    """Apply all patches; a second call has no effect. Megatron must be importable (`device.prepare`)."""
    _use_shipped_dataset_helpers()
    helpers.end_with_this_process()
    helpers.say_results_in_bytes()
    helpers.notice_a_killed_one()
    optimizer_patches.apply()
    _load_weights_or_fail()
    _decay_all_parameters_on_request()
    _fuse_weight_gradients_where_possible()
    _evaluate_whole_sets_in_any_pipeline()
    _save_only_where_asked()
    _read_no_sources_for_help()


def _use_shipped_dataset_helpers() -> None:
    """`compile_helpers` runs `make` in the installed package, which has no Makefile, and ends the job.

    The compiled helpers are in the wheel: only a source checkout has to build them.
    """
    from megatron.core.datasets import utils

    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError:
        return
    replace(utils, "compile_helpers", lambda _: lambda: None)


def verified(checkpoint: str) -> None:
    """Let Megatron load this checkpoint without another `--verify-integrity`.

    Megatron hashes it on rank 0 while the others wait, and refuses one that was saved without hashes. By then our
    preflight has verified it with all ranks, and chosen another one if it was damaged. Megatron verifies any other
    checkpoint.
    """
    from megatron.core.dist_checkpointing import serialization

    _verified.add(os.path.realpath(checkpoint))

    def verify_others(verify: Callable) -> Callable:
        return lambda folder: None if os.path.realpath(folder) in _verified else verify(folder)

    replace(serialization, "verify_integrity_manifest", verify_others)


def _load_weights_or_fail() -> None:
    """`--dist-ckpt-strictness log_unexpected` (our default) starts weights that a checkpoint lacks at random values.

    It is for the extra state of Transformer Engine's layers, which checkpoints of other layers lack; only that may
    be missing. Anything else is refused; `log_all` keeps Megatron's behaviour.
    """
    from megatron.core.dist_checkpointing import validation
    from megatron.training import get_args

    report = original_of(validation, "maybe_report_missing_and_unexpected_keys")

    def refuse(missing: set[str], unexpected: set[str], raise_error: bool = True) -> None:
        if raise_error or get_args().dist_ckpt_strictness != "log_unexpected":
            return report(missing, unexpected, raise_error)
        lacking = sorted(key for key in unexpected if not key.endswith("_extra_state"))
        if lacking:
            more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
            raise UsageError(
                f"--load: the checkpoint has no {', '.join(lacking[:3])}{more}, which this run needs; use "
                "the model and optimizer it was saved with, or --dist-ckpt-strictness log_all to initialise them anew"
            )
        return None

    replace(validation, "maybe_report_missing_and_unexpected_keys", lambda _: refuse)


def _decay_all_parameters_on_request() -> None:
    """A function without flags determines which parameters have no weight decay (see `official`)."""
    from megatron.training import training

    configure = original_of(training, "get_megatron_optimizer_config")

    def configure_on_request(args: Any) -> tuple[Any, dict]:
        config, overrides = configure(args)
        if args.meap_decay_all_parameters:  # drop what switches weight decay off for a kind of parameter
            overrides = {kind: override for kind, override in overrides.items() if override.get("wd_mult") != 0.0}
        return config, overrides

    replace(training, "get_megatron_optimizer_config", lambda _: configure_on_request)


def _fuse_weight_gradients_where_possible() -> None:
    """A GPT's output layer is Megatron's own even with Transformer Engine: it cannot be built without Apex's kernel.

    Transformer Engine's layers have their own kernel, which `--no-gradient-accumulation-fusion` would disable.
    Upstream: https://github.com/NVIDIA/Megatron-LM/issues/1885.
    """
    from megatron.core.tensor_parallel import layers

    if layers._grad_accum_fusion_available:
        return
    original = original_of(layers.ColumnParallelLinear, "__init__")

    def initialise(self: Any, *args: Any, config: Any, **kwargs: Any) -> None:
        if config.gradient_accumulation_fusion:
            config = copy.copy(config)
            config.gradient_accumulation_fusion = False
        original(self, *args, config=config, **kwargs)

    replace(layers.ColumnParallelLinear, "__init__", lambda _: initialise)


def _evaluate_whole_sets_in_any_pipeline() -> None:
    """Pipeline stages that load no data have None as the number of batches of a whole validation set, which fails.

    (They receive the number before each evaluation.)
    """
    from megatron.training import get_args, training

    build = original_of(training, "build_train_valid_test_data_iterators")

    def build_and_count(*args: Any, **kwargs: Any) -> Any:
        iterators = build(*args, **kwargs)
        settings = get_args()
        if isinstance(settings.eval_iters, list):
            settings.eval_iters = [count or 0 for count in settings.eval_iters]
        return iterators

    replace(training, "build_train_valid_test_data_iterators", lambda _: build_and_count)


def _save_only_where_asked() -> None:
    """At a loss that is NaN the trainer saves for a rerun; without `--save` that is a TypeError."""
    from megatron.training import get_args, training

    save = original_of(training, "save_checkpoint_and_time")

    def save_where_asked(*args: Any, **kwargs: Any) -> None:
        if get_args().save is not None:
            save(*args, **kwargs)

    replace(training, "save_checkpoint_and_time", lambda _: save_where_asked)


def _read_no_sources_for_help() -> None:
    """Each parser (three per start) reads and parses the sources of 13 classes for help texts that are not needed."""
    from megatron.training.argument_utils import ArgumentGroupFactory

    replace(ArgumentGroupFactory, "_get_field_docstrings", lambda _: lambda factory, settings: {})


def outside_the_job() -> AbstractContextManager[None]:
    """Within the block there is no job: Megatron's datasets build their caches only on rank 0, or without a job."""
    return replaced(torch.distributed, "is_initialized", lambda: False)


def save_checkpoints_by(wrap: Callable[[Callable], Callable]) -> None:
    """Wrap Megatron's saving of distributed checkpoints, in which only rank 0 does `verify_integrity`."""
    from megatron.core import dist_checkpointing

    replace(dist_checkpointing, "save", wrap)


def after_each_save(follow_up: Callable[[], object]) -> None:
    """Call `follow_up` on rank 0 whenever a checkpoint is complete, also one that was saved in the background.

    Megatron has no hook there.
    """
    from megatron.training import checkpointing, get_args, training

    save = original_of(training, "save_checkpoint")
    schedule = original_of(checkpointing, "schedule_async_save")

    def follow_up_on_rank_zero() -> None:
        if torch.distributed.get_rank() == 0:
            follow_up()

    def save_and_follow_up(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        if not get_args().async_save:
            follow_up_on_rank_zero()

    def schedule_and_follow_up(request: Any) -> None:
        request.add_finalize_fn(follow_up_on_rank_zero)
        schedule(request)

    replace(training, "save_checkpoint", lambda _: save_and_follow_up)
    replace(checkpointing, "schedule_async_save", lambda _: schedule_and_follow_up)


def save_on_request(poll: Callable[[], bool], done: Callable[[], None]) -> None:
    """After each step let `poll`, which all ranks call, decide whether to save a checkpoint; then call `done`.

    Megatron has no hook there, and saves checkpoints only at fixed intervals.
    """
    from megatron.training import get_args, training

    decide = original_of(training, "checkpoint_and_decide_exit")

    def decide_on_request(*args: Any) -> bool:
        with replaced(get_args(), "save_interval", 1) if poll() else contextlib.nullcontext():
            leaving = decide(*args)
        done()
        return leaving

    replace(training, "checkpoint_and_decide_exit", lambda _: decide_on_request)


def after_each_step(*follow_ups: Callable[[Any, Any, int], None]) -> None:
    """Call each `follow_up(model chunks, optimizer, iteration)` on every rank after each training step.

    Megatron has no hook there. It comes after the step's log and evaluation, and before its checkpoint. (The hook
    `non_loss_data_func` of `pretrain` is called only within evaluations: at their interval, with validation data, once
    for each validation set, and without the step.)
    """
    from megatron.training import training

    callbacks = original_of(training, "post_training_step_callbacks")

    def call_back_and_follow_up(model: Any, optimizer: Any, scheduler: Any, iteration: int, *args: Any) -> Any:
        result = callbacks(model, optimizer, scheduler, iteration, *args)
        for follow_up in follow_ups:
            follow_up(model, optimizer, iteration)
        return result

    replace(training, "post_training_step_callbacks", lambda _: call_back_and_follow_up)


@dataclass(frozen=True)
class Step:
    """A finished training step."""

    model: list[Any]
    """The chunks of this rank."""
    optimizer: Any
    iteration: int
    losses: dict[str, Tensor]
    """The report of the loss function; only on the last pipeline stage."""
    skipped: bool
    """Whether it changed nothing, because its gradients are not finite."""
    loss_scale: float
    lengths: dict[str, float | None]
    """Of packed documents, as `num_floating_point_operations` takes them."""


def around_log(
    begin: Callable[[], None],
    see: Callable[[Step], None],
    rewrite: Callable[[str, Step | None], str],
    left_out: Collection[int] = (),
) -> None:
    """Extend the lines that Megatron logs for steps and evaluations: it has no hook there.

    Args:
        begin: called on every rank before the first step.
        see: called on every rank with each step, after its line, if it has one.
        rewrite: called on every rank, with a line and the last step; the last rank logs the result.
        left_out: steps that count as skipped (left_out.py).
    """
    from megatron.training import training

    train, log, say = (original_of(training, name) for name in ("train", "training_log", "print_rank_last"))
    log = over_steps_that_have_it(log)
    trained: list[Any] = [None, None]
    last: list[Step | None] = [None]

    def train_seen(forward_step: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        trained[:] = model, optimizer
        begin()
        return train(forward_step, model, optimizer, *args, **kwargs)

    def log_seen(
        losses: Any,
        totals: Any,
        rate: Any,
        iteration: int,
        scale: float,
        memory: bool,
        skipped: int,
        *args: Any,
        **more: Any,
    ) -> Any:
        lengths = {name: more.get(name) for name in ("seqlen_squared_sum_in_batch", "total_real_tokens_in_batch")}
        model, optimizer = trained
        skipped = int(skipped or iteration in left_out)
        last[0] = step = Step(model, optimizer, iteration, losses, bool(skipped), scale, lengths)
        report_memory = log(losses, totals, rate, iteration, scale, memory, skipped, *args, **more)
        see(step)
        return report_memory

    replace(training, "train", lambda _: train_seen)
    replace(training, "training_log", lambda _: log_seen)
    replace(training, "print_rank_last", lambda _: lambda line: say(rewrite(line, last[0])))
