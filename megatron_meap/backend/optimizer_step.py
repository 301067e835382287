"""The optimizer step where neither Transformer Engine nor Apex is installed, on CPU and GPU alike."""

from typing import Any

import torch
from torch import Tensor


def fuse() -> None:
    """AdamW, gradient norm and clipping: one pass over memory each, instead of a dozen per parameter.

    Megatron's substitute for the gradient norm also fetches one number per parameter from the GPU, and waits for each.
    """
    from megatron.core.optimizer import clip_grads

    if getattr(torch.optim.AdamW, "meap_fused", False):
        return

    class AdamW(torch.optim.AdamW):
        """PyTorch's AdamW with its fused kernel, which is not PyTorch's default."""

        meap_fused = True

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{"fused": True, **kwargs})

    torch.optim.AdamW = AdamW  # type: ignore[misc]
    clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl = _l2_norm, _scale


def _l2_norm(_chunk: int, _overflow: Tensor, tensor_lists: list[list[Tensor]], *_: Any) -> tuple[Tensor, None]:
    norms = torch._foreach_norm(tensor_lists[0])
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None


def _scale(_chunk: int, _overflow: Tensor, tensor_lists: list[list[Tensor]], factor: float) -> None:
    gradients, same = tensor_lists
    assert gradients is same, "Megatron clips gradients in place"
    torch._foreach_mul_(gradients, factor)
