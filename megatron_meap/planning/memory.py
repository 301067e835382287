"""Memory of the ranks of every pipeline stage: what Megatron keeps for the parameters, and activations in flight."""

from argparse import Namespace
from dataclasses import dataclass

import torch

from megatron_meap.errors import UsageError
from megatron_meap.planning.trace import Chunk, trace_stage
from megatron_meap.planning.world import pretended
from megatron_meap.trainer import batch_sizes
from megatron_meap.trainer.arguments import NEED_TRANSFORMER_ENGINE
from megatron_meap.trainer.optimizers import is_distributed


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each rank of one pipeline stage."""

    parameters: int
    """Elements on the rank."""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Kept by the micro batches in flight: embedding, layers, final norm."""
    loss: int
    """Kept by logits and loss."""
    working: int
    """Temporary memory at the worst moment of a forward or backward pass."""

    @property
    def total(self) -> int:
        """All kinds together, without CUDA's and NCCL's own memory."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss + self.working


@dataclass(frozen=True)
class ModelMemory:
    """The whole model."""

    parameters: int
    """Of the model, each counted once."""
    stages: list[StageMemory]
    checkpoint: int
    """Bytes of a checkpoint with its optimizer state."""

    @property
    def largest(self) -> StageMemory:
        """The stage whose ranks need most."""
        return max(self.stages, key=lambda stage: stage.total)


def measure(args: Namespace) -> ModelMemory:
    """Memory of a run.

    Args:
        args: checked, with `padded_vocab_size` set.

    Raises:
        UsageError: flags whose memory is unknown here.
    """
    for flag, asked in (
        ("--use-megatron-fsdp", args.use_megatron_fsdp),
        ("--use-torch-fsdp2", args.use_torch_fsdp2),
        ("--optimizer-cpu-offload", args.optimizer_cpu_offload),
        (f"--optimizer {args.optimizer}", args.optimizer not in ("adam", "muon")),
        ("--recompute-modules", NEED_TRANSFORMER_ENGINE.intersection(args.recompute_modules or ())),
        ("--use-precision-aware-optimizer", args.use_precision_aware_optimizer and args.optimizer == "muon"),
    ):
        if asked:
            raise UsageError(f"{flag}: its memory cannot be planned here; plan without it for an upper bound")
    traced = _trace(args)
    parameters = _whole(traced)
    each = bytes_per_parameter(args)
    matrices = sum(chunk.whole_matrices for chunks in traced for chunk in chunks)
    saved = parameters * each["weights"] + (0 if args.no_save_optim else _optimizer(each, parameters, matrices))
    stages = [_stage(args, stage, chunks) for stage, chunks in enumerate(traced)]
    return ModelMemory(parameters, stages, saved)


def count_parameters(args: Namespace) -> tuple[int, list[int]]:
    """Parameters of the whole model, and those on a rank of every pipeline stage."""
    traced = _trace(args, activations=False)
    return _whole(traced), [sum(chunk.parameters for chunk in chunks) for chunks in traced]


def _trace(args: Namespace, activations: bool = True) -> list[list[Chunk]]:
    """The chunks of every stage."""
    traced = []
    for stage in range(args.pipeline_model_parallel_size):
        with pretended(args, stage):
            traced.append(trace_stage(args, activations))
    return traced


def _whole(traced: list[list[Chunk]]) -> int:
    """Parameters of the model, each counted once."""
    return sum(chunk.whole for chunks in traced for chunk in chunks)


def _stage(args: Namespace, stage: int, chunks: list[Chunk]) -> StageMemory:
    """Add up one stage."""
    count = sum(chunk.parameters for chunk in chunks)
    each = bytes_per_parameter(args)
    shares = args.data_parallel_size * args.context_parallel_size if is_distributed(args) else 1
    matrices = sum(chunk.matrices for chunk in chunks)
    flying = in_flight(args, stage)
    return StageMemory(
        parameters=count,
        weights=sum(chunk.weight_bytes for chunk in chunks),
        gradients=count * each["gradients"],
        optimizer=_optimizer(each, count, matrices) // shares,
        activations=sum(number * chunk.kept_layers for number, chunk in zip(flying, chunks, strict=True)),
        loss=sum(chunk.kept_loss for chunk in chunks),  # of one micro batch: its backward pass follows at once
        working=max(chunk.working for chunk in chunks),
    )


def bytes_per_parameter(args: Namespace) -> dict[str, int]:
    """Bytes that Megatron keeps per parameter: weight, gradient buffer, optimizer state, and the state of a matrix."""
    mixed = args.bf16 or args.fp16
    if args.use_precision_aware_optimizer:
        optimizer = sum(kind.itemsize for kind in (args.main_params_dtype, args.exp_avg_dtype, args.exp_avg_sq_dtype))
        if args.bf16 and args.main_params_dtype == torch.float32:
            optimizer -= 2  # Transformer Engine keeps only the bits that bf16 weights lack
    else:
        optimizer = 12 if mixed else 8  # two moments, and the 32-bit copy of the weights
    gradients = 4 if args.accumulate_allreduce_grads_in_fp32 or not mixed else 2
    sizes = {"weights": 2 if mixed else 4, "gradients": gradients, "optimizer": optimizer, "matrix": optimizer}
    if args.optimizer == "muon":  # one moment for matrices; for the rest the second optimizer's
        sizes["matrix"] -= 4
        sizes["optimizer"] -= 4 if args.muon_scalar_optimizer == "lion" else 0
    return sizes


def _optimizer(each: dict[str, int], parameters: int, matrices: int) -> int:
    """Bytes of the optimizer state of parameters, of which `matrices` are in matrices."""
    return (parameters - matrices) * each["optimizer"] + matrices * each["matrix"]


def in_flight(args: Namespace, stage: int) -> list[int]:
    """Micro batches whose activations each chunk of a stage keeps at the worst moment of Megatron's 1F1B schedules."""
    stages, virtual = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size or 1
    micro_batches = batch_sizes.most_micro_batches(args)
    if virtual == 1:
        return [min(micro_batches, stages - stage)]
    # The interleaved schedule sends groups of micro batches through chunk 0, then through chunk 1, and so on.
    group = args.microbatch_group_size_per_vp_stage or stages
    forwards = min(micro_batches * virtual, (stages - stage - 1) * 2 + (virtual - 1) * group + 1)
    counts = [0] * virtual
    for step in range(forwards):
        counts[(step // group) % virtual] += 1
    return counts
