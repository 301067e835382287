"""The possible layouts of a run on given GPUs, and which of them look best."""

import contextlib
import copy
import io
import itertools
import operator
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

from megatron_meap.errors import UsageError
from megatron_meap.planning.compute import Work, work
from megatron_meap.planning.memory import ModelMemory, bytes_per_parameter, measure
from megatron_meap.trainer import arguments, batch_sizes
from megatron_meap.trainer.refusals import explained
from megatron_meap.trainer.tokenizer import set_tokenizer

RECOMPUTATION: dict[str, dict[str, object]] = {
    "none": {"recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


@dataclass(frozen=True)
class Plan:
    """A layout, checked by Megatron, and what it needs."""

    args: Namespace
    memory: ModelMemory
    work: Work

    @property
    def recomputation(self) -> str:
        """none, selective or full."""
        return self.args.recompute_granularity or "none"

    @property
    def bubble(self) -> float:
        """Idle time of the pipeline as a share of its busy time."""
        virtual = self.args.virtual_pipeline_model_parallel_size or 1
        steps = batch_sizes.phases(self.args)
        micro_batches = sum(phase.steps * phase.micro_batches for phase in steps)
        return (self.args.pipeline_model_parallel_size - 1) * self.work.steps / (micro_batches * virtual)

    @property
    def slowdown(self) -> float:
        """Time of a step relative to an ideal one, by recomputation and pipeline bubble; without communication."""
        return self.work.hardware_flops / self.work.model_flops * (1 + self.bubble)


def plan(flags: Namespace, **changes: object) -> Plan:
    """Plan a run.

    Args:
        flags: of the command line, not yet checked (`arguments.parse_flags`); left as they are.
        changes: arguments to set differently.

    Raises:
        UsageError: Megatron refuses the layout (with its reason), or the memory cannot be planned.
    """
    args = copy.deepcopy(flags)
    vars(args).update(changes)
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            arguments.check(args)
            set_tokenizer(args)
            with explained(args):
                return Plan(args, measure(args), work(args))
        finally:
            destroy_num_microbatches_calculator()


def best(base: Plan, flags: Namespace, per_node: int, memory: float, count: int) -> list[Plan]:
    """The most promising layouts of these GPUs that fit, each planned in full; the fastest first.

    Args:
        base: the plan of the flags as they are.
        flags: of the command line, not yet checked.
        per_node: GPUs of a node; tensor parallelism stays within one.
        memory: bytes that a rank may use.
        count: number of layouts.
    """
    found: list[Plan] = []
    for layout in sorted(_candidates(base, per_node, memory), key=lambda each: each.order(base)):
        with contextlib.suppress(UsageError):  # Megatron refuses it
            candidate = plan(flags, **layout.changes)
            if candidate.memory.largest.total <= memory:
                found.append(candidate)
        if len(found) == count:
            break
    return found


@dataclass(frozen=True)
class _Layout:
    """A layout that divides the model and the batch."""

    tensor: int
    pipeline: int
    context: int
    micro: int
    recomputation: str

    @property
    def changes(self) -> dict[str, object]:
        """Its arguments."""
        return {
            "tensor_model_parallel_size": self.tensor,
            "sequence_parallel": self.tensor > 1,
            "pipeline_model_parallel_size": self.pipeline,
            "num_layers_per_virtual_pipeline_stage": None,
            "num_virtual_stages_per_pipeline_rank": None,
            "context_parallel_size": self.context,
            "micro_batch_size": self.micro,
            "use_distributed_optimizer": True,
            **RECOMPUTATION[self.recomputation],
        }

    def micro_batches(self, base: Plan) -> list[float]:
        """Micro batches of a step on a data-parallel rank, for every batch size of the run."""
        data_parallel = base.args.world_size / (self.tensor * self.pipeline * self.context)
        return [phase.batch_size / (self.micro * data_parallel) for phase in batch_sizes.phases(base.args)]

    def at_least(self, base: Plan) -> float:
        """A lower bound of the bytes on a rank: a cheap filter before the real count."""
        args, each = base.args, bytes_per_parameter(base.args)
        part = self.tensor * self.pipeline
        kept = each["weights"] + each["gradients"] + each["matrix"] * part / args.world_size
        width = args.hidden_size
        if self.recomputation == "none":
            width = 4 * args.hidden_size + (3 if args.swiglu else 2) * args.ffn_hidden_size
        # The first stage keeps as many micro batches as there are stages: activations of all layers together.
        flying = min(1.0, max(self.micro_batches(base)) / self.pipeline)
        tokens = self.micro * args.seq_length / (self.tensor * self.context)
        return base.memory.parameters / part * kept + 2 * tokens * width * args.num_layers * flying

    def order(self, base: Plan) -> tuple:
        """Sort key, best layouts first: by expected slowdown, then communication, then larger micro batches."""
        work, args = base.work, base.args
        logits = 6 * work.tokens * args.hidden_size * args.padded_vocab_size
        repeated = (work.model_flops - logits) / 3 if self.recomputation == "full" else 0.0
        steps = [phase.steps for phase in batch_sizes.phases(args)]
        micro_batches = sum(map(operator.mul, steps, self.micro_batches(base))) / sum(steps)
        slowdown = (1 + repeated / work.model_flops) * (1 + (self.pipeline - 1) / micro_batches)
        return round(slowdown, 2), self.tensor * self.context, self.pipeline, -self.micro


def _candidates(base: Plan, per_node: int, memory: float) -> Iterator[_Layout]:
    """Layouts of powers of two that divide the model and the batch, and may fit."""
    args, powers = base.args, [1, 2, 4, 8, 16, 32]
    for tensor, pipeline, context, micro in itertools.product(powers, powers, powers, powers[:4]):
        groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
        if args.world_size % (tensor * pipeline * context) or args.num_layers % pipeline:
            continue
        if tensor > per_node or groups % tensor or (context > 1 and args.seq_length // context < 4096):
            continue
        for recomputation in RECOMPUTATION:
            layout = _Layout(tensor, pipeline, context, micro, recomputation)
            if all(each % 1 == 0 for each in layout.micro_batches(base)) and layout.at_least(base) <= memory:
                yield layout
