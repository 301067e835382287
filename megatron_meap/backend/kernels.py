"""The element-wise parts of a transformer as single autograd steps in plain PyTorch, for processors without a compiler.

PyTorch runs these formulas operation by operation: every intermediate result is written to memory, and autograd keeps
most of them. Here each has its own backward pass, which recomputes instead of keeping, and works in place. Arithmetic
is in 32-bit floats throughout; the results have the type of the inputs. Nothing here knows Megatron, and nothing is
specific to the CPU except that a GPU has better kernels.

The times are for 4,096 tokens of the 15.6M-parameter model (hidden 384, FFN 1,024, vocabulary 8,064) in bf16, forward
and backward, on one core.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from megatron_meap.backend import device, native

_CACHED_NUMBERS = 2**17  # 32-bit floats that a core's own cache holds beside the other operands (512 KiB)
_PARTS = 64  # in which rows are added up, whatever the number of threads


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide [..., h] by its root mean square over h, then scale by `weight` [h]: 3.7 ms instead of 11.6."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if native.suits(x):
            x = x.contiguous()
            out, inverse = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
            native.call("rms_norm", x, weight.float(), eps, inverse.numel(), x.shape[-1], out, inverse)
            ctx.save_for_backward(x, weight, inverse)
            return out
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # 1 / root mean square, [..., 1]
        ctx.save_for_backward(x, weight, inverse)
        return torch.mul(wide, inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        if native.suits(x):
            dx, dweights = torch.empty_like(x), weight.new_zeros(_PARTS, x.shape[-1], dtype=torch.float32)
            given = gradients[0].contiguous(), x, weight.float(), inverse
            native.call("rms_norm_backward", *given, inverse.numel(), x.shape[-1], dx, _PARTS, dweights)
            return dx, dweights.sum(0).to(weight.dtype), None
        grad, scale = gradients[0].float().contiguous(), weight.float()
        # PyTorch has a kernel for the gradient of LayerNorm. With mean 0 it is that of RMSNorm, but for the term by
        # which it takes the mean out of the gradient; that one is added back.
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x.float(), [x.shape[-1]], torch.zeros_like(inverse), inverse, scale, None, [True, True, False]
        )
        dx.addcmul_((grad @ scale).unsqueeze(-1), inverse, value=1.0 / x.shape[-1])
        return dx.to(x.dtype), dweight.to(weight.dtype), None


def swiglu(x: Tensor) -> Tensor:
    """SwiGLU of [..., 2f], gate first: silu(gate) * up, [..., f]: 13 ms instead of 18."""
    return _SwiGLU.apply(x)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        if native.suits(x):
            out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
            native.call("swiglu", x, out.numel() // out.shape[-1], out.shape[-1], out)
            return out
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,), grad = ctx.saved_tensors, gradients[0].contiguous()
        dx = torch.empty_like(x)
        if native.suits(x):
            native.call("swiglu_backward", grad, x, grad.numel() // grad.shape[-1], grad.shape[-1], dx)
            return dx
        gate, up = x.chunk(2, dim=-1)
        dgate, dup = dx.chunk(2, dim=-1)
        activated = functional.silu(gate)
        torch.mul(activated, grad, out=dup)
        torch.mul(grad, up, out=activated)
        torch.ops.aten.silu_backward.grad_input(activated, gate, grad_input=dgate)
        return dx


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, half-split: 2.6 ms instead of 5.4.

    Args:
        x: [s, ..., d].
        cos: cosines [s, 1, ..., r] of the type of x; the dimensions of x from r on pass through.
        sin: sines of the same shape.
    """
    return _Rotate.apply(x, cos, sin)


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, dim=-1)
        return _rotated(gradients[0], cos, torch.cat((-second, -first), dim=-1)), None, None  # transposed: turned back


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = cos.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if native.suits(x) and cos.shape[:-1].numel() == x.shape[0]:  # one angle a position
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        native.call("rotate", rows, cos.contiguous(), sin.contiguous(), *rows.shape, turned, *rows.stride()[:2], out)
        return out
    (x1, x2), (out1, out2) = (t[..., :turned].chunk(2, dim=-1) for t in (x, out))
    (cos1, cos2), (sin1, sin2) = cos.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    torch.mul(x1, cos1, out=out1).addcmul_(x2, sin1, value=-1)
    torch.mul(x2, cos2, out=out2).addcmul_(x1, sin2)
    if turned < x.shape[-1]:
        out[..., turned:] = x[..., turned:]
    return out


def cross_entropy(logits: Tensor, target: Tensor, group: torch.distributed.ProcessGroup | None = None) -> Tensor:
    """Cross-entropy of every token, without another tensor of the size of the logits: 85 ms instead of 250.

    Args:
        logits: [..., v], or this rank's v columns of the vocabulary; the backward pass writes their gradient over them.
        target: ids in the whole vocabulary [...].
        group: the ranks that hold the other columns, in order.

    Returns:
        Losses [...], 32-bit.
    """
    return _CrossEntropy.apply(logits, target, group)


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
        shared = group is not None and group.size() > 1
        rows, columns = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
        if shared:
            columns = columns - rows.shape[1] * group.rank()  # type: ignore[union-attr]
        here = (columns >= 0) & (columns < rows.shape[1])
        columns = columns.clamp(0, rows.shape[1] - 1)
        predicted = rows.gather(1, columns.unsqueeze(1)).squeeze(1).float().mul_(here)
        largest, sums = torch.empty_like(predicted), torch.empty_like(predicted)
        if native.suits(rows):
            native.call("row_sums", rows, *rows.shape, largest, sums)
        for part in () if native.suits(rows) else _parts(rows):
            wide = rows[part].float()
            torch.amax(wide, dim=1, out=largest[part])
            torch.sum(torch.sub(wide, largest[part].unsqueeze(1)).exp_(), dim=1, out=sums[part])
        if shared:
            own = largest.clone()
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
            both = torch.stack([sums * (own - largest).exp_(), predicted])
            torch.distributed.all_reduce(both, group=group)
            sums, predicted = both
        logs = sums.log()
        ctx.save_for_backward(logits, columns, here, largest + logs)
        return (largest - predicted + logs).view(target.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, columns, here, log_sum = ctx.saved_tensors
        rows, scale = logits.detach().reshape(-1, logits.shape[-1]), gradients[0].reshape(-1, 1).contiguous()
        if native.suits(rows):
            native.call("cross_entropy_backward", rows, log_sum, torch.where(here, columns, -1), scale, *rows.shape)
            torch.autograd.graph.increment_version(rows)
            return rows.view(logits.shape), None, None
        for part in _parts(rows):
            probabilities = torch.sub(rows[part].float(), log_sum[part].unsqueeze(1)).exp_()
            probabilities.scatter_add_(1, columns[part].unsqueeze(1), -here[part].unsqueeze(1).float())
            torch.mul(probabilities, scale[part], out=rows[part])
        return rows.view(logits.shape), None, None


def _parts(rows: Tensor) -> Iterator[slice]:
    """Slices of the rows of [tokens, v] that each core can work on within its own cache."""
    size = max(1, torch.get_num_threads() * _CACHED_NUMBERS // max(1, rows.shape[1]))
    return (slice(start, start + size) for start in range(0, rows.shape[0], size))


def product_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which the device multiplies matrices of `dtype` fastest: bf16 or fp32."""
    fast = dtype != torch.bfloat16 or device.plans_for_gpu() or _multiplies_bf16_fast()
    return dtype if fast else torch.float32


def attends_by_products(dtype: torch.dtype) -> bool:
    """Whether `attention.causal_attention` is the faster one: in bf16 where PyTorch's attention cannot multiply it.

    It can with AMX: its forward pass is faster there than ours (5.5 ms at 8 x 512 tokens).
    """
    return dtype == torch.bfloat16 and _is_amd_with_bf16() and not _has_amx()


def _multiplies_bf16_fast() -> bool:
    return _has_amx() or _is_amd_with_bf16()


def _has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


@functools.cache
def _is_amd_with_bf16() -> bool:
    """AMD's AVX512_BF16 doubles the speed of 32-bit floats or more.

    Intel's without AMX (as in virtual machines that mask it) runs at half of it.
    """
    return torch.cpu._is_avx512_bf16_supported() and "AMD" in str(torch.cpu.get_capabilities().get("cpu_name"))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x` [..., i] times the transpose of `weight` [o, i], in the faster type: 43 ms instead of 78 for [384, 2048].

    If the weight has a `main_grad` (Megatron's accumulation buffer) of the type of the product, its gradient is added
    there without a copy, under Megatron's `grad_added_to_main_grad` contract.
    """
    return _Linear.apply(x, weight)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dtype = product_type(x.dtype)
        return torch.matmul(x.to(ctx.dtype), weight.to(ctx.dtype).t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = gradients[0].to(ctx.dtype)
        dx = torch.matmul(grad, weight.to(ctx.dtype)).to(x.dtype)
        rows = grad.reshape(-1, grad.shape[-1]).t(), x.to(ctx.dtype).reshape(-1, x.shape[-1])
        main_grad = getattr(weight, "main_grad", None)
        if main_grad is None or main_grad.dtype != ctx.dtype:
            return dx, torch.matmul(*rows).to(weight.dtype)
        main_grad.addmm_(*rows)
        weight.grad_added_to_main_grad = True
        # Autograd must receive some gradient; Megatron ignores it, unless the weight asks for zeros (it has two uses).
        dummy = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
        return dx, dummy(weight)
