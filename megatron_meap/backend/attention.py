"""Causal attention as blocked matrix products in bf16, for processors that multiply it much faster than 32-bit floats.

PyTorch's own CPU attention works in 32-bit floats between two small products. Here a block of queries, with the heads
that share a key next to each other, is multiplied with all the keys that it may see in one large product; the backward
pass has five of them per block. A product of bf16 matrices is rounded to bf16, so what is exponentiated must be small
where it matters: the shift of a row (in three bf16 parts) is three more columns of the product, which is summed in 32
bits. Then an error of 2^-9 of a log-probability p changes the probability by at most |p| exp(p) 2^-9: less than its own
rounding.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from megatron_meap.backend import native

_COLUMNS = 8
"""Additional columns of queries and keys: three hold a shift, the others keep rows aligned."""


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend to the positions up to one's own: [b, n, s, d] to [b, g, s, d], bf16, n a multiple of g.

    Returns:
        [b, n, s, d]; in memory [s, b, n, d].
    """
    return _CausalAttention.apply(query, key, value, scale)


class _CausalAttention(Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        b, n, s, d = query.shape
        groups = key.shape[1]
        out = query.new_empty(s, b, n, d).permute(1, 2, 0, 3)
        log_sums = query.new_empty(b, n, s, dtype=torch.float32)
        keys, values = _with_ones(key), value.reshape(-1, s, d)
        for part in _blocks(s):
            queries = _with_zeros(query[:, :, part], groups)
            seen = keys[:, : part.stop].mT
            scores = torch.bmm(queries, seen)
            largest = _largest(scores, part)
            _shift(queries, largest)
            sums = torch.empty_like(largest)
            chances = _exponentiate(torch.bmm(queries, seen, out=scores), part, scale, sums)
            found = torch.bmm(chances, values[:, : part.stop]).div(sums.unsqueeze(-1))
            out[:, :, part] = found.view(b, n, -1, d)
            log_sums[:, :, part] = largest.mul_(scale).add_(sums.log_()).view(b, n, -1)
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, log_sums = ctx.saved_tensors
        b, n, s, d = query.shape
        groups = key.shape[1]
        grad = gradients[0]
        means = (grad.float() * out).sum(-1)  # of the gradients of a row's scores, weighted by their probabilities
        shifts = log_sums / ctx.scale
        dquery = torch.empty_like(query)
        dkey, dvalue = torch.zeros(2, b * groups, s, d, dtype=torch.float32)
        keys, values = _with_ones(key), _with_ones(value)
        for part in _blocks(s):
            seen = slice(0, part.stop)
            queries, grads = (_with_zeros(x[:, :, part], groups) for x in (query, grad))
            _shift(queries, shifts[:, :, part].reshape(queries.shape[:2]))
            _shift(grads, means[:, :, part].reshape(queries.shape[:2]))
            chances = _exponentiate(torch.bmm(queries, keys[:, seen].mT), part, ctx.scale)
            dvalue[:, seen] += torch.bmm(chances.mT, grads[..., :d])
            dscores = torch.bmm(grads, values[:, seen].mT).mul_(chances)
            dquery[:, :, part] = torch.bmm(dscores, keys[:, seen, :d]).mul_(ctx.scale).view(b, n, -1, d)
            dkey[:, seen] += torch.bmm(dscores.mT, queries[..., :d])
        dkey.mul_(ctx.scale)
        return dquery, dkey.view(key.shape).to(key.dtype), dvalue.view(value.shape).to(value.dtype), None


def _blocks(length: int) -> list[slice]:
    """Blocks of queries: larger ones compute more than the triangle needs, smaller ones make the products slower."""
    size = 128 if length <= 1024 else 256
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _with_ones(x: Tensor) -> Tensor:
    """Keys or values [b, g, s, d] as [b g, s, d + columns]."""
    b, g, s, d = x.shape
    wide = x.new_ones(b, g, s, d + _COLUMNS)
    wide[..., :d] = x
    return wide.view(b * g, s, -1)


def _with_zeros(x: Tensor, groups: int) -> Tensor:
    """Queries [b, n, m, d] as [b g, n/g m, d + columns]: those with the same keys below each other."""
    b, n, m, d = x.shape
    wide = x.new_zeros(b, n, m, d + _COLUMNS)
    wide[..., :d] = x
    return wide.view(b * groups, n // groups * m, -1)


def _shift(rows: Tensor, by: Tensor) -> None:
    """Reduce the products of these rows [b g, m, d + columns] by a number [b g, m] each."""
    for column in range(3):
        part = by.to(rows.dtype)
        torch.neg(part, out=rows[..., column - _COLUMNS])
        by = by - part


def _largest(scores: Tensor, part: slice) -> Tensor:
    """The largest score that every query may see, 32-bit [b g, m]."""
    if native.suits(scores):
        largest = scores.new_empty(scores.shape[:2], dtype=torch.float32)
        native.call("seen_largest", scores, *_rows(scores, part), largest)
        return largest
    _hide_later(scores, part, float("-inf"))
    return scores.amax(-1).float()


def _exponentiate(scores: Tensor, part: slice, scale: float, sums: Tensor | None = None) -> Tensor:
    """The exponentials of the scaled scores, in their place, 0 where a query must not look.

    The sum of each row goes into `sums`, 32-bit [b g, m], where it is wanted.
    """
    if native.suits(scores):
        native.call("seen_exponentials", scores, *_rows(scores, part), scale, sums)
        return scores
    chances = (scores if scale == 1.0 else scores.mul_(scale)).exp_()
    _hide_later(chances, part, 0.0)
    if sums is not None:
        torch.sum(chances, -1, dtype=torch.float32, out=sums)
    return chances


def _rows(scores: Tensor, part: slice) -> tuple[int, int, int, int]:
    """Number and width of rows, after how many of them the queries begin anew, and what the first one is."""
    return scores.shape[0] * scores.shape[1], scores.shape[2], part.stop - part.start, part.start


def _hide_later(scores: Tensor, part: slice, value: float) -> None:
    """Fill the scores after a query's own position."""
    m = part.stop - part.start
    own = scores.unflatten(1, (-1, m))[..., part]
    own.masked_fill_(torch.ones(m, m, dtype=torch.bool).triu_(1), value)
