"""Transformer Engine's compiled extension in plain PyTorch: what a Llama-style model calls, in bf16 and fp32, on a CPU.

Signatures are those of Transformer Engine 2.20. What is not here raises `NotImplementedError` when it is called.
"""

import collections
import enum
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CALLS: collections.Counter[str] = collections.Counter()
"""How often each function of this stub was called."""


class DType(enum.IntEnum):
    """Transformer Engine's data types."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


_TORCH = {4: torch.float32, 5: torch.float16, 6: torch.bfloat16}


class _Member(int):
    """A member of an enumeration that is only ever passed on and compared."""

    name: str


class _Enumeration(type):
    """Has every member that it is asked for."""

    def __getattr__(cls, name: str) -> _Member:
        if name.startswith("__"):
            raise AttributeError(name)
        member = _Member(len(cls.__dict__))
        member.name = name
        setattr(cls, name, member)
        return member


class NVTE_Fused_Attn_Backend(enum.IntEnum):
    """What `get_fused_attn_backend` answers."""

    NVTE_No_Backend = -1
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2


class FusedAttentionParams:
    """Only handed over."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


def __getattr__(name: str) -> Any:
    """Every other class is an enumeration, every other function is missing."""
    if name.startswith("__"):
        raise AttributeError(name)
    if name[0].isupper():
        return globals().setdefault(name, _Enumeration(name, (), {"__module__": __name__}))

    def missing(*_: Any, **__: Any) -> None:
        raise NotImplementedError(f"transformer_engine_torch.{name} is not in the stub")

    return missing


def counted(function: Callable) -> Callable:
    """Count its calls."""

    @functools.wraps(function)
    def count(*args: Any, **kwargs: Any) -> Any:
        CALLS[function.__name__] += 1
        return function(*args, **kwargs)

    return count


# ---- What the GPU is -------------------------------------------------------------------------------------------------


def get_fused_attn_backend(*_: Any, **__: Any) -> tuple[NVTE_Fused_Attn_Backend, str]:
    """cuDNN's attention for any length."""
    return NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen, ""


def get_cudnn_version() -> int:
    return 92000


def get_cublasLt_version() -> int:
    return 130100


def get_num_cublas_streams() -> int:
    return 4


def get_stream_priority_range(*_: Any) -> tuple[int, int]:
    return 0, 0


def device_supports_multicast(*_: Any) -> bool:
    return False


def ubuf_built_with_mpi() -> bool:
    return False


# ---- Norms: x [..., h]; statistics of a row are 32-bit ---------------------------------------------------------------


def _typed(result: Tensor, out: Tensor | None, dtype: Any) -> Tensor:
    result = result.to(dtype if isinstance(dtype, torch.dtype) else _TORCH.get(int(dtype), result.dtype))
    return result if out is None else out.copy_(result)


def _scale_of(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.float() + (1 if zero_centered else 0)


@counted
def rmsnorm_fwd(x, weight, eps, out, quantizer, dtype, margin, zero_centered):
    assert quantizer is None
    wide = x.float()
    inverse = (wide.square().mean(-1) + eps).rsqrt()
    return _typed(wide * inverse.unsqueeze(-1) * _scale_of(weight, zero_centered), out, dtype), None, inverse


@counted
def rmsnorm_bwd(grad, x, inverse, weight, margin, zero_centered):
    grad, wide, inverse = grad.float(), x.float(), inverse.view(*x.shape[:-1], 1)
    normed, scaled = wide * inverse, grad * _scale_of(weight, zero_centered)
    dx = inverse * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return dx.to(weight.dtype), (grad * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)


@counted
def layernorm_fwd(x, weight, bias, eps, out, quantizer, dtype, margin, zero_centered):
    assert quantizer is None
    wide = x.float()
    mean, inverse = wide.mean(-1), (wide.var(-1, unbiased=False) + eps).rsqrt()
    normed = (wide - mean.unsqueeze(-1)) * inverse.unsqueeze(-1)
    return _typed(normed * _scale_of(weight, zero_centered) + bias.float(), out, dtype), mean, inverse


@counted
def layernorm_bwd(grad, x, mean, inverse, weight, margin, zero_centered):
    rows = (*x.shape[:-1], 1)
    grad, inverse = grad.float(), inverse.view(rows)
    normed, scaled = (x.float() - mean.view(rows)) * inverse, grad * _scale_of(weight, zero_centered)
    dx = inverse * (scaled - scaled.mean(-1, keepdim=True) - normed * (scaled * normed).mean(-1, keepdim=True))
    weights = ((grad * normed), grad)
    dweight, dbias = (each.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype) for each in weights)
    return dx.to(weight.dtype), dweight, dbias


# ---- Matrix products: cuBLAS's way, columns first --------------------------------------------------------------------


@counted
def generic_gemm(
    a, transpose_a, b, transpose_b, out, quantizer, out_dtype, bias, bias_dtype, gelu, gelu_in, grad, workspace,
    workspace_size, accumulate, split, comm_overlap=None, comm_type=None, extra_output=None, bulk_overlap=False,
    alpha=1.0, beta=None,
):  # fmt: skip
    """`b` times `a`, in 32-bit floats; `accumulate` adds it to `out` (Megatron's buffer of a weight's gradient)."""
    assert quantizer is None
    assert not gelu
    assert comm_overlap is None
    first, second = (each.reshape(-1, each.shape[-1]) for each in (b, a))
    result = (first.t() if transpose_b else first).float() @ (second.t() if transpose_a else second).float() * alpha
    bias_grad = None
    if bias is not None and grad:
        bias_grad = first.float().sum(0).to(bias.dtype)
    elif bias is not None:
        result = result + bias.float()
    if out is not None:
        result = result.view(out.shape).to(out.dtype)
        return out.add_(result) if accumulate else out.copy_(result), bias_grad, None, extra_output
    shape = result.shape if transpose_b else (*b.shape[:-1], result.shape[-1])
    dtype = a.dtype if out_dtype is None else _TORCH[int(out_dtype)]
    return result.view(shape).to(dtype), bias_grad, None, extra_output


# ---- The optimizer's kernels over many tensors -----------------------------------------------------------------------


@counted
def multi_tensor_l2norm(chunk, overflow, lists, per_tensor=False):
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().view(1), (norms if per_tensor else None)


@counted
def multi_tensor_scale(chunk, overflow, lists, factor):
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)


multi_tensor_scale_tensor = multi_tensor_scale


@counted
def multi_tensor_adam(chunk, overflow, lists, lr, beta1, beta2, eps, step, mode, correction, weight_decay):
    corrections = (1 - beta1**step, 1 - beta2**step) if correction else (1.0, 1.0)
    assert len(lists) == 4, "master weights are Megatron's"
    for grad, parameter, mean, square in zip(*lists, strict=True):
        wide = grad.float()
        mean.mul_(beta1).add_(wide, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
        update = (mean / corrections[0]) / ((square / corrections[1]).sqrt() + eps)
        decayed = weight_decay * parameter.float() if mode == 1 else 0
        parameter.copy_(parameter.float() - lr * (update + decayed))


# ---- Attention: [s, b, n, d], [b, s, n, d], or packed [tokens, n, d] with borders ----------------------------------


def _format(layout: Any) -> str:
    return layout.name.removeprefix("NVTE_").split("_")[0].lower()


def _heads_first(x: Tensor, form: str) -> Tensor:
    return (x.permute(1, 2, 0, 3) if form == "sbhd" else x.permute(0, 2, 1, 3)).float()


def _heads_last(x: Tensor, form: str, dtype: torch.dtype) -> Tensor:
    return (x.permute(2, 0, 1, 3) if form == "sbhd" else x.permute(0, 2, 1, 3)).contiguous().to(dtype)


def _scores(q: Tensor, k: Tensor, scale: float, mask: Any, bottom_right: bool) -> Tensor:
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * scale
    if "CAUSAL" not in mask.name:
        return scores
    first = 1 + (scores.shape[-1] - scores.shape[-2] if bottom_right else 0)
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(first), float("-inf"))


def _parts(borders: Tensor) -> list[slice]:
    ends = borders.tolist()
    return [slice(start, end) for start, end in itertools.pairwise(ends) if end > start]


@counted
def convert_thd_to_bshd(tensor: Tensor, borders: Tensor, batch: int, longest: int) -> Tensor:
    """Packed sequences, each in a row of its own with zeros after it."""
    rows = tensor.new_zeros(batch, longest, *tensor.shape[1:])
    for row, part in zip(rows, _parts(borders), strict=True):
        row[: part.stop - part.start] = tensor[part]
    return rows


@counted
def convert_bshd_to_thd(tensor: Tensor, borders: Tensor, tokens: int) -> Tensor:
    """Rows of sequences, packed."""
    packed = tensor.new_zeros(tokens, *tensor.shape[2:])
    for row, part in zip(tensor, _parts(borders), strict=True):
        packed[part] = row[: part.stop - part.start]
    return packed


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Any, bottom_right: bool) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp [b, n, s, 1]."""
    scores = _scores(q, k, scale, mask, bottom_right)
    log_sum = scores.logsumexp(-1, keepdim=True)
    return (scores - log_sum).exp() @ v.repeat_interleave(q.shape[1] // v.shape[1], 1), log_sum


def _attend_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, log_sum: Tensor, scale: float, mask: Any, bottom: bool
) -> tuple[Tensor, Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    scores = _scores(q, k, scale, mask, bottom)
    weights = (scores - log_sum.view(*scores.shape[:-1], 1)).exp()
    dweights = grad @ v.repeat_interleave(group, 1).transpose(-1, -2)
    dscores = weights * (dweights - (grad * out).sum(-1, keepdim=True)) * scale

    def fold(x: Tensor) -> Tensor:
        return x.view(x.shape[0], k.shape[1], group, *x.shape[2:]).sum(2)

    dk, dv = fold(dscores.transpose(-1, -2) @ q), fold(weights.transpose(-1, -2) @ grad)
    return dscores @ k.repeat_interleave(group, 1), dk, dv


@counted
def fused_attn_fwd(
    longest_q, longest_kv, training, scale, dropout, fast_zero_fill, layout, out_format, scale_inv_layout, bias_type,
    mask, softmax, window, bottom_right, borders_q, borders_kv, q, k, v, dtype, padded_q, padded_kv, *_,
):  # fmt: skip
    """cuDNN's attention: output, and what its backward pass needs."""
    assert dropout == 0
    form, state = _format(layout), torch.zeros(2, dtype=torch.int64)
    if form != "thd":
        out, log_sum = _attend(*(_heads_first(x, form) for x in (q, k, v)), scale, mask, bottom_right)
        return [_heads_last(out, form, q.dtype), log_sum, state]
    result = torch.zeros(*q.shape[:2], v.shape[2], dtype=q.dtype)
    log_sums = torch.zeros(*q.shape[:2], 1)
    for part in _parts(borders_q if padded_q is None else padded_q):
        rows = (_heads_first(x[part, None], "sbhd") for x in (q, k, v))
        out, log_sum = _attend(*rows, scale, mask, bottom_right)
        result[part], log_sums[part] = _heads_last(out, "sbhd", q.dtype)[:, 0], log_sum[0].transpose(0, 1)
    return [result, log_sums, state]


@counted
def fused_attn_bwd(
    longest_q, longest_kv, scale, dropout, fast_zero_fill, layout, out_format, grad_format, dlayout, scale_inv_layout,
    dscale_inv_layout, bias_type, mask, softmax, window, bottom_right, deterministic, borders_q, borders_kv, q, k, v,
    out, grad, dtype, saved, padded_q, padded_kv, *_,
):  # fmt: skip
    form = _format(layout)
    tensors = (q, k, v, out, grad)
    if form != "thd":
        given = (_heads_first(x, form) for x in tensors)
        grads = _attend_backward(*given, saved[0], scale, mask, bottom_right)
        return [*(_heads_last(x, form, q.dtype) for x in grads), None, None]
    whole = [torch.zeros_like(x) for x in (q, k, v)]
    for part in _parts(borders_q if padded_q is None else padded_q):
        given = (_heads_first(x[part, None], "sbhd") for x in tensors)
        grads = _attend_backward(*given, saved[0][part].transpose(0, 1)[None], scale, mask, bottom_right)
        for target, x in zip(whole, grads, strict=True):
            target[part] = _heads_last(x, "sbhd", q.dtype)[:, 0]
    return [*whole, None, None]


# ---- Rotary position embedding, half-split: [s, b, n, d], or packed -------------------------------------------------


def _turned(x: Tensor, angles: Tensor, sign: int) -> Tensor:
    width = angles.shape[-1]
    turned, rest = x[..., :width].float(), x[..., width:]
    first, second = turned.chunk(2, -1)
    angles = angles[: x.shape[0]]
    both = turned * angles.cos() + sign * torch.cat((-second, first), -1) * angles.sin()
    return torch.cat((both.to(x.dtype), rest), -1)


def _rotate(
    x: Tensor, angles: Tensor, start: Any, form: Any, interleaved: bool, borders: Any, size: int, sign: int
) -> Tensor:
    assert start is None
    assert not interleaved
    if form.name == "NVTE_THD":
        assert size == 1
        return torch.cat([_turned(x[part, None], angles, sign)[:, 0] for part in _parts(borders)])
    assert form.name == "NVTE_SBHD"
    return _turned(x, angles, sign)


@counted
def fused_rope_forward(x, angles, start, form, interleaved, borders, size, rank, *_):
    return _rotate(x, angles, start, form, interleaved, borders, size, 1)


@counted
def fused_rope_backward(grad, angles, start, form, interleaved, borders, size, rank, *_):
    return _rotate(grad, angles, start, form, interleaved, borders, size, -1)
