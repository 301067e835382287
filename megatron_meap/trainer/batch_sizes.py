"""How many samples each step of a run takes, by Megatron's calculator, for everything that counts steps or time."""

import itertools
from argparse import Namespace
from dataclasses import dataclass

from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from megatron_meap.errors import UsageError, one_line


@dataclass(frozen=True)
class Phase:
    """Consecutive steps that take the same number of samples."""

    steps: int
    batch_size: int
    """Samples of a step, on all data-parallel ranks."""
    micro_batches: int
    """Per step, on each data-parallel rank."""


def settle(args: Namespace) -> None:
    """Check the flags of the batch size, and set `global_batch_size` to that of the steps where it stays the same.

    Args:
        args: parsed, not yet validated by Megatron.

    Raises:
        UsageError: a batch size that no step can have, or that would not be the one asked for.
    """
    if args.phase_transition_iterations and args.train_samples is None:
        raise UsageError("--phase-transition-iterations: needs --train-samples instead of --train-iters")
    model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    if args.world_size % model:
        return  # Megatron says so
    ranks = args.world_size // model
    if args.step_batch_size_schedule is not None:
        _check_schedule(args, ranks)
    elif args.global_batch_size is not None and args.global_batch_size % (args.micro_batch_size * ranks):
        _settle_constant(args, ranks)
    steps = sum(phase.steps for phase in phases(args, ranks))
    if wrong := [step for step in args.iterations_to_skip if steps and not 1 <= step <= steps]:
        raise UsageError(f"--iterations-to-skip {wrong[0]}: the run has steps 1 to {steps}")


def _settle_constant(args: Namespace, ranks: int) -> None:
    """A batch size that the micro batches of all ranks do not divide: refused, or decreased if that was asked for.

    Megatron decreases it only in the steps: learning rate, amount of data and masks would follow the original size.
    """
    asked, together = args.global_batch_size, args.micro_batch_size * ranks
    smaller = asked // together * together
    why = f"not a multiple of --micro-batch-size {args.micro_batch_size} x {ranks} data-parallel ranks"
    if not args.decrease_batch_size_if_needed or smaller == 0:
        near = f"{smaller} or {smaller + together}" if smaller else f"{together}"
        raise UsageError(f"--global-batch-size {asked}: {why}; use {near}, or other micro batches")
    args.global_batch_size = smaller
    if args.rank == 0:
        print(f"note: --global-batch-size {asked}: {why}; decreased to {smaller}, as asked for", flush=True)


def _check_schedule(args: Namespace, ranks: int) -> None:
    """Refuse a schedule of batch sizes that would stop the run later, or that other flags miscount."""
    flag = f"--step-batch-size-schedule {args.step_batch_size_schedule}"
    if args.train_samples is None:
        raise UsageError(f"{flag}: needs --train-samples instead of --train-iters: steps take more and more samples")
    if args.decrease_batch_size_if_needed:
        raise UsageError(f"{flag}: contradicts --decrease-batch-size-if-needed; drop one of them")
    if args.phase_transition_iterations:
        raise UsageError(f"{flag}: contradicts --phase-transition-iterations, whose phases are of equal steps")
    together = args.micro_batch_size * ranks
    try:
        schedule = _calculator(args, ranks).schedule
    except (AssertionError, ValueError) as error:
        raise UsageError(f"{flag}: {one_line(error)}; expected something like '0:256 10B:512', in tokens") from error
    for _, size in schedule:
        if size % together:
            raise UsageError(
                f"{flag}: {size} is not a multiple of --micro-batch-size {args.micro_batch_size} x {ranks} "
                "data-parallel ranks"
            )
    for (_, size), (_, following) in itertools.pairwise(schedule):
        if following <= size:
            raise UsageError(f"{flag}: from {size} to {following}: Megatron lets a batch size only grow")
    last = _phases(schedule, args.train_samples, together)
    end = sum(phase.steps * phase.batch_size for phase in last)
    if end != args.train_samples:
        raise UsageError(
            f"--train-samples {args.train_samples}: the steps of {flag} end at {end - last[-1].batch_size} and {end} "
            "samples; use one of them"
        )


def phases(args: Namespace, ranks: int | None = None) -> list[Phase]:
    """The steps of a whole run in order, grouped by batch size.

    Args:
        args: validated by Megatron, with `train_iters` or `train_samples`.
        ranks: data-parallel ones, where they are not validated.
    """
    ranks = ranks or args.data_parallel_size
    together = args.micro_batch_size * ranks
    if args.step_batch_size_schedule is not None:
        return _phases(_calculator(args, ranks).schedule, args.train_samples, together)
    size = args.global_batch_size or together  # Megatron's default
    steps = args.train_samples // size if args.train_samples else args.train_iters or 0
    return [Phase(steps, size, size // together)]


def check_phases(args: Namespace) -> None:
    """Refuse a phase that does not begin within the run: nothing would change there.

    Args:
        args: validated by Megatron.
    """
    steps = sum(phase.steps for phase in phases(args))
    if wrong := [step for step in args.phase_transition_iterations or () if not 0 < step < steps]:
        raise UsageError(f"--phase-transition-iterations {wrong[0]}: the run has {steps} steps; give 1 to {steps - 1}")


def check_interleaved(args: Namespace) -> None:
    """Refuse steps and evaluations whose micro batches do not fill interleaved pipeline stages: Megatron ends at them.

    Args:
        args: validated by Megatron.
    """
    if args.virtual_pipeline_model_parallel_size is None:
        return
    stages = args.pipeline_model_parallel_size
    group = args.microbatch_group_size_per_vp_stage or stages
    numbers = {phase.micro_batches: f"a step of {phase.batch_size} sequences" for phase in phases(args) if phase.steps}
    if args.full_validation:
        numbers[1] = "--full-validation"
    elif args.eval_iters:
        of_all = args.eval_micro_batch_size * args.data_parallel_size
        numbers[args.eval_global_batch_size // of_all] = f"an evaluation of {args.eval_global_batch_size} sequences"
    for number, what in numbers.items():
        if not group <= number or 0 < number % group < stages:
            raise UsageError(
                f"{what}: {number} micro batches on each data-parallel rank do not fill interleaved pipeline stages; "
                f"make them a multiple of {group} (--global-batch-size, --eval-global-batch-size; "
                "--full-validation has one at a time), or do not interleave (--num-layers-per-virtual-pipeline-stage, "
                "--num-virtual-stages-per-pipeline-rank)"
            )


def samples(args: Namespace) -> int:
    """Training samples of a whole run."""
    return sum(phase.steps * phase.batch_size for phase in phases(args))


def most_micro_batches(args: Namespace) -> int:
    """The largest number of micro batches of a step on each data-parallel rank."""
    return max(phase.micro_batches for phase in phases(args))


def _calculator(args: Namespace, ranks: int) -> StepBatchsizeNumMicroBatchesCalculator:
    """Megatron's own calculator, which reads the schedule; as a rank that logs nothing."""
    return StepBatchsizeNumMicroBatchesCalculator(
        args.micro_batch_size, ranks, False, rank=1, schedule=args.step_batch_size_schedule, seq_length=args.seq_length
    )


def _phases(schedule: list[tuple[int, int]], samples: int, together: int) -> list[Phase]:
    """The steps up to `samples`, by a schedule of (first sample, batch size)."""
    found, consumed = [], 0
    ends = [threshold for threshold, _ in schedule[1:]] + [samples]
    for (_, size), end in zip(schedule, ends, strict=True):
        steps = -(-(min(end, samples) - consumed) // size)  # the last may reach beyond the end
        if steps > 0:
            found.append(Phase(steps, size, size // together))
            consumed += steps * size
    return found


def describe(args: Namespace) -> str:
    """The batch size, or the batch sizes of a schedule, in words."""
    found = phases(args)
    sizes = ", then ".join(f"{phase.batch_size:,}" for phase in found)
    micro_batches = ", then ".join(f"{phase.micro_batches:,}" for phase in found)
    changes = ", ".join(f"{steps:,}" for steps in itertools.accumulate(phase.steps for phase in found[:-1]))
    return (
        f"{sizes} sequences of {args.seq_length} tokens{f' (from steps {changes} on)' if changes else ''}: "
        f"{micro_batches} micro batches of {args.micro_batch_size} on each of {args.data_parallel_size} data-parallel "
        "ranks"
    )
