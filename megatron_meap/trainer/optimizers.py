"""Optimizers other than Adam: errors that Megatron notices only after the model is built, or not at all."""

from argparse import Namespace
from importlib import metadata

from megatron_meap.errors import UsageError, refuse

_FAMILY = ("muon", "adaptive_muon")
_SCALES_ITSELF = "_apply_muon_scale"
"""Of AdaptiveMuon since emerging-optimizers 0.3; it needs what Megatron's subclass does not set."""


def check(args: Namespace) -> None:
    """Refuse an optimizer whose package is missing, and options that it does not support.

    Args:
        args: validated by Megatron, which has replaced `dist_muon` by `muon`.

    Raises:
        UsageError: names the flag.
    """
    if args.optimizer == "sgd" and is_distributed(args):
        raise UsageError(
            "--use-distributed-optimizer: Megatron cannot share out the state of --optimizer sgd; drop it, or use adam"
        )
    if args.optimizer in ("adam", "sgd"):
        return
    from megatron.core.optimizer import emerging_optimizers

    asked = f"--optimizer {args.optimizer}"
    if not emerging_optimizers.HAVE_EMERGING_OPTIMIZERS:
        raise UsageError(
            f"{asked}: needs the package emerging-optimizers, 0.2 or newer; install it (pip install "
            "'megatron-meap[muon]'), or use adam"
        )
    if args.optimizer == "adaptive_muon" and hasattr(emerging_optimizers.TensorParallelAdaptiveMuon, _SCALES_ITSELF):
        raise UsageError(
            f"{asked}: megatron-core 0.19 fails with emerging-optimizers {metadata.version('emerging-optimizers')} in "
            "the first step; use muon"
        )
    if args.fp16:
        raise UsageError(f"{asked}: Megatron has it for bf16 and 32-bit training only; drop --fp16")
    if is_distributed(args) and not args.bf16:
        raise UsageError(
            f"--use-distributed-optimizer: Megatron shares out the state of {asked} in bf16 training only; drop it, or "
            "train with --bf16"
        )
    if args.use_layer_wise_distributed_optimizer:
        _check_layer_wise(args)
    if args.optimizer not in _FAMILY:
        return
    known = [name for name in emerging_optimizers.get_supported_coefficient_types() if name != "custom"]
    kind, steps, low = args.muon_coefficient_type, args.muon_num_ns_steps, args.muon_fp32_matmul_prec == "low"
    refuse(
        (kind not in known, f"--muon-coefficient-type {kind}: none of {', '.join(known)}"),
        (steps < 1, f"--muon-num-ns-steps {steps}: must be at least 1"),
        (low, "--muon-fp32-matmul-prec low: PyTorch has no such precision and would take its own; use medium"),
    )


def _check_layer_wise(args: Namespace) -> None:
    """Refuse what Megatron asserts when it builds an optimizer whose whole matrices are shared out over ranks."""
    asked, biases = f"with --optimizer {args.optimizer} and --use-distributed-optimizer", args.add_bias_linear
    apart = args.expert_model_parallel_size > 1 and biases and args.use_layer_wise_param_layout
    refuse(
        (
            args.num_distributed_optimizer_instances > 1,
            f"--num-distributed-optimizer-instances: not possible {asked}; drop it",
        ),
        (
            args.overlap_param_gather_with_optimizer_step,
            f"--overlap-param-gather-with-optimizer-step: not possible {asked}; drop it",
        ),
        (
            apart,
            f"--expert-model-parallel-size: {asked}, Megatron cannot share out the biases of experts; add "
            "--disable-bias-linear or --no-use-layer-wise-param-layout",
        ),
    )


def words(args: Namespace) -> str:
    """The optimizer in a few words."""
    if args.optimizer not in _FAMILY:
        return str(args.optimizer)
    return (
        f"{args.optimizer} for matrices (momentum {args.muon_momentum}, {args.muon_scale_mode} scale x "
        f"{args.muon_extra_scale_factor}), {args.muon_scalar_optimizer} for embeddings, norms and the output layer"
    )


def is_distributed(args: Namespace) -> bool:
    """Whether the optimizer state of a run or checkpoint is distributed over ranks, in pieces or (Muon) in matrices."""
    names = ("use_distributed_optimizer", "use_layer_wise_distributed_optimizer")
    return any(getattr(args, name, False) for name in names)
