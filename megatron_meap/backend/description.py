"""The components of a run, reported at its start: what is not installed is replaced, but never silently."""

from argparse import Namespace
from importlib import metadata, util

from megatron.core.transformer.enums import AttnBackend

from megatron_meap.backend import device


def has_fused_optimizer() -> bool:
    """Whether Megatron steps with Transformer Engine's or Apex's optimizer."""
    from megatron.core import optimizer

    return not optimizer.USING_PYTORCH_OPTIMIZER


def describe(args: Namespace) -> list[str]:
    """Lines for the user: the device, if it is a CPU; layers, attention, optimizer and precision."""
    lines = []
    if device.is_cpu():
        from megatron_meap.backend import cpu

        lines.append(cpu.describe())
    parts = f"{_layers(args)}, {_attention(args)}", _optimizer(args), _precision(args)
    return [*lines, f"this run: {'; '.join(parts)}"]


def _layers(args: Namespace) -> str:
    if args.transformer_impl != "local":
        return f"Transformer Engine {metadata.version('transformer_engine')} layers"
    missing = (
        "" if device.is_cpu() or util.find_spec("transformer_engine") else " (Transformer Engine is not installed)"
    )
    return f"local layers{missing}"


def _attention(args: Namespace) -> str:
    backend = args.attention_backend
    if args.transformer_impl != "local":
        return f"attention backend {backend.name}"
    return "Megatron's unfused attention" if backend == AttnBackend.local else "PyTorch's scaled_dot_product_attention"


def _optimizer(args: Namespace) -> str:
    from megatron.core import optimizer

    if args.optimizer != "adam":
        return f"optimizer {args.optimizer}"
    if optimizer.USING_PYTORCH_OPTIMIZER:
        return "PyTorch's fused AdamW"
    return f"{'Apex' if optimizer.Adam.__module__.startswith('apex') else 'Transformer Engine'}'s fused Adam"


def _precision(args: Namespace) -> str:
    wide = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    narrow = [f"fp8 ({args.fp8}, {args.fp8_recipe})"] if args.fp8 else [f"fp4 ({args.fp4})"] if args.fp4 else []
    return " over ".join([*narrow, wide])
