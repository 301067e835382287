"""Plans as text."""

from argparse import Namespace

from megatron_meap.backend.peak import GPU
from megatron_meap.planning.layouts import Plan
from megatron_meap.planning.memory import StageMemory
from megatron_meap.trainer import batch_sizes, data_use, optimizers

GIB = 2**30
_KINDS = ("weights", "gradients", "optimizer", "activations", "loss", "working", "total")


def layout_of(args: Namespace) -> str:
    """TP, PP, CP and the rest in one line."""
    parts = [f"TP {args.tensor_model_parallel_size}", f"PP {args.pipeline_model_parallel_size}"]
    if args.virtual_pipeline_model_parallel_size:
        parts[-1] += f" (interleaved {args.virtual_pipeline_model_parallel_size})"
    parts += [f"CP {args.context_parallel_size}", f"DP {args.data_parallel_size}"]
    if args.expert_model_parallel_size > 1:
        parts.append(f"EP {args.expert_model_parallel_size}")
    extras = [
        name
        for name, on in (
            ("sequence parallel", args.sequence_parallel),
            ("distributed optimizer", optimizers.is_distributed(args)),
            (f"{args.recompute_granularity} recomputation", args.recompute_granularity),
        )
        if on
    ]
    return " x ".join(parts) + "".join(f", {extra}" for extra in extras)


def describe(plan: Plan) -> str:
    """Model, work and memory by rank and kind."""
    args, memory, work = plan.args, plan.memory, plan.work
    lines = [
        f"model         {memory.parameters:,} parameters ({args.num_layers} layers, hidden {args.hidden_size}, "
        f"vocabulary {args.padded_vocab_size})",
        f"layout        {layout_of(args)} on {args.world_size} GPU{'' if args.world_size == 1 else 's'}",
        f"batch         {batch_sizes.describe(args)}",
        f"work          {work.steps:,} steps, {data_use.amount(work.tokens)} tokens, "
        f"model FLOPs {work.model_flops:.3e}, hardware FLOPs {work.hardware_flops:.3e}",
        f"optimizer     {optimizers.words(args)}",
        *data_use.lines(args),
        *_copies(args, work.tokens),
        f"checkpoint    {memory.checkpoint / GIB:,.3g} GiB each, optimizer state included",
        "",
        "memory of a rank, GiB",
        f"{'stage':<14}{'parameters':>14}" + "".join(f"{kind:>13}" for kind in _KINDS),
    ]
    rows = _grouped(memory.stages)
    lines += [
        f"{name:<14}{stage.parameters / 1e6:>12,.1f} M"
        + "".join(f"{getattr(stage, kind) / GIB:>13,.3f}" for kind in _KINDS)
        for name, stage in rows
    ]
    return "\n".join(lines)


def _copies(args: Namespace, tokens: int) -> list[str]:
    """How noised copies change the budget."""
    if args.meap_copy_weight is None:
        return []
    return [
        f"copies        half of that: {data_use.amount(tokens / 2)} tokens of the data, each trained on clean and "
        "as a noised copy; as many tokens of the data without copies take half the FLOPs"
    ]


def _grouped(stages: list[StageMemory]) -> list[tuple[str, StageMemory]]:
    """Stages, with neighbours that need the same memory in one row."""
    rows: list[tuple[int, int, StageMemory]] = []
    for number, stage in enumerate(stages):
        if rows and rows[-1][2] == stage:
            rows[-1] = (rows[-1][0], number, stage)
        else:
            rows.append((number, number, stage))
    return [(f"{a}" if a == b else f"{a} to {b}", stage) for a, b, stage in rows]


def warnings(plan: Plan, usable: float, per_node: int) -> list[str]:
    """Problems of the plan."""
    found = []
    worst = plan.memory.largest
    if worst.total > usable:
        found.append(
            f"does not fit: {worst.total / GIB:.1f} GiB on a rank of stage {plan.memory.stages.index(worst)}, "
            f"{usable / GIB:.1f} GiB are usable"
        )
    if plan.args.tensor_model_parallel_size > per_node:
        found.append(f"TP {plan.args.tensor_model_parallel_size} reaches beyond a node of {per_node} GPUs: slow")
    if plan.args.world_size > per_node and plan.args.world_size % per_node:
        found.append(f"{plan.args.world_size} GPUs are not a whole number of nodes of {per_node}")
    if plan.bubble > 0.1:
        found.append(f"the pipeline idles {100 * plan.bubble:.0f}% of its time: more micro batches, or fewer stages")
    return found


def table(plans: list[Plan], gpu: GPU, mfu: float, price: float | None) -> str:
    """Plans side by side."""
    header = f"{'TP':>3}{'PP':>4}{'CP':>4}{'DP':>6}{'micro':>7}{'recompute':>11}{'GiB a rank':>12}{'slowdown':>10}"
    lines = [header + f"{'hours':>9}" + (f"{'cost':>12}" if price else "")]
    for each in plans:
        args = each.args
        # The given MFU is that of a step without recomputation and bubble.
        hours = each.work.hours(args.world_size, gpu, mfu) * each.slowdown
        lines.append(
            f"{args.tensor_model_parallel_size:>3}{args.pipeline_model_parallel_size:>4}"
            f"{args.context_parallel_size:>4}{args.data_parallel_size:>6}{args.micro_batch_size:>7}"
            f"{each.recomputation:>11}{each.memory.largest.total / GIB:>12.1f}{each.slowdown:>10.2f}{hours:>9,.1f}"
            + (f"{hours * args.world_size * price:>12,.0f}" if price else "")
        )
    return "\n".join(lines)
