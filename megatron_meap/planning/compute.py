"""Tokens, FLOPs, time and cost of a run.

Model FLOPs are Megatron's own `num_floating_point_operations`: the matrix products of forward and backward pass, with
attention counted once (causal). Hardware FLOPs add what recomputation repeats.
"""

from argparse import Namespace
from dataclasses import dataclass

from megatron.training.training import num_floating_point_operations

from megatron_meap.backend.peak import GPU
from megatron_meap.errors import UsageError
from megatron_meap.trainer import batch_sizes


@dataclass(frozen=True)
class Work:
    """The computation of a run."""

    steps: int
    tokens: int
    model_flops: float
    hardware_flops: float

    def hours(self, gpus: int, gpu: GPU, mfu: float) -> float:
        """Time at an MFU (share of the peak, in model FLOPs)."""
        return self.model_flops / (gpus * gpu.tflops * 1e12 * mfu) / 3600


def work(args: Namespace) -> Work:
    """The work of a whole run, from step 0 to its end."""
    samples = batch_sizes.samples(args)
    if not samples:
        raise UsageError("--train-iters: how long is the run? Give --train-iters or --train-samples")
    model = num_floating_point_operations(args, samples)
    return Work(
        steps=sum(phase.steps for phase in batch_sizes.phases(args)),
        tokens=samples * args.seq_length,
        model_flops=model,
        hardware_flops=model + samples * _recomputed(args),
    )


def _recomputed(args: Namespace) -> float:
    """FLOPs that recomputation repeats for one sample."""
    if args.recompute_granularity is None or args.multi_latent_attention or args.hybrid_layer_pattern:
        return 0.0
    whole = num_floating_point_operations(args, 1)
    logits = 6 * args.seq_length * args.hidden_size * args.padded_vocab_size
    layers = (whole - logits) / 3  # one forward pass through all layers
    if args.recompute_granularity == "full":
        if args.recompute_method == "block":  # that many layers of every stage
            virtual = args.virtual_pipeline_model_parallel_size or 1
            recomputed = args.recompute_num_layers * args.pipeline_model_parallel_size * virtual
            return layers * min(1.0, recomputed / args.num_layers)
        return layers
    repeated = 0.0
    modules = args.recompute_modules or ["core_attn"]  # Megatron's own choice
    if "core_attn" in modules:
        repeated += 2 * args.seq_length**2 * args.kv_channels * args.num_attention_heads * args.num_layers
    if "mlp" in modules:
        matrices = 3 if args.swiglu else 2
        repeated += 2 * args.seq_length * matrices * args.hidden_size * args.ffn_hidden_size * args.num_layers
    return repeated
