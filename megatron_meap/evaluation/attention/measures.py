"""How a model distributes its attention: the paper's measures, for every layer and head.

The measures are those that arXiv 2502.07490 reports in its analysis of the attention: how much less a MEAP model
attends to masked positions, how much more its attention varies over the others, and how much of it goes to the answer
in a prompt. The paper gives no formula that settles every detail; each function says what is our reading.

Notation: A[i, j] is the attention of query i to key j <= i, after the softmax, so that a row sums to 1; M is the set of
masked positions, s the sequence length.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from megatron_meap.errors import UsageError
from megatron_meap.evaluation.attention.inputs import SEGMENTS, Inputs

Values = npt.NDArray[np.float64]
See = Callable[[int, int, Tensor], None]
"""`see(layer, first, weights)`: attention [heads, queries, keys] of a layer, the first query being at position `first`;
keys after a query have weight 0, those after the last query are left out."""

_NAME = "meap_observed"
_ROOM = 1 << 20  # queries times keys of a block


@dataclass(frozen=True)
class Measures:
    """What was measured of one model, for every sample, layer and head."""

    masked_attention: Values
    """[n, layers, heads], `masked_attention` of the masked samples."""
    variance: Values
    """[n, layers, heads], `unmasked_variance` of the masked samples."""
    clean_attention: Values
    """[n, layers, heads], attention to the same positions where the text is clean."""
    clean_variance: Values
    """[n, layers, heads], variance over the same other positions where the text is clean."""
    segments: Values
    """[n, segments, layers, heads], `segment_mass` of the prompts."""


def measure(model: Any, inputs: Inputs, mask_id: int | None, progress: Callable[[], object] = lambda: None) -> Measures:
    """Measure a model.

    Args:
        model: of transformers, on any device and in any type; the measures are computed in 64-bit floats.
        inputs: samples and prompts.
        mask_id: what replaces the masked positions.
        progress: called after every sample.

    Raises:
        UsageError: a model whose attention cannot be observed.
    """
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    samples = len(inputs.texts)
    text = np.zeros((2, 2, samples, layers, heads))
    segments = np.zeros((samples, len(SEGMENTS), layers, heads))
    for i in range(samples):
        masked = inputs.masked[i]
        for kind, tokens in enumerate((np.where(masked, mask_id, inputs.texts[i]), inputs.texts[i])):
            text[kind, :, i] = text_measures(model, tokens, masked)
        segments[i] = segment_mass(model, inputs.prompts[i], inputs.segments[i])
        progress()
    (masked_mass, variance), (clean_mass, clean_variance) = text
    return Measures(masked_mass, variance, clean_mass, clean_variance, segments)


def text_measures(model: Any, tokens: npt.NDArray[np.int64], masked: npt.NDArray[np.bool_]) -> Values:
    """Attention to masked positions and its variance over the others, [2, layers, heads], for one sample.

    - Attention on masked positions: mean over queries i of sum over j in M, j <= i, of A[i, j]. The *decay* between two
      models, (a_ntp - a_meap) / a_ntp, is the same for this mass as for the mean weight of an entry (i, j): both models
      have the same entries. Uniform attention would give about the mask ratio.
    - Variance over unmasked positions: for query i the population variance of A[i, j] over the j <= i outside M, then
      the mean over queries. The *increase* is (v_meap - v_ntp) / v_ntp.

    Queries are those of the second half of the sample (our reading; the paper names none): the weights of the first
    few queries, over one or two keys, would outweigh all others in the variance.

    Args:
        model: of transformers.
        tokens: int64 [s].
        masked: bool [s], the set M.
    """
    s = len(tokens)
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    sums = torch.zeros(2, layers, heads, dtype=torch.float64, device=model.device)
    is_masked = torch.from_numpy(masked).to(model.device, torch.float64)
    others = 1 - is_masked
    count = others.cumsum(0)
    half = s // 2

    def see(layer: int, first: int, weights: Tensor) -> None:
        skipped = max(0, half - first)
        if skipped >= weights.shape[1]:
            return
        weights = weights[:, skipped:].double()
        queries, keys = slice(first + skipped, first + skipped + weights.shape[1]), weights.shape[2]
        sums[0, layer] += (weights @ is_masked[:keys]).sum(dim=1)
        mean = (weights @ others[:keys]) / count[queries]
        square = (weights.square() @ others[:keys]) / count[queries]
        sums[1, layer] += (square - mean.square()).sum(dim=1)

    observe(model, tokens, see)
    return (sums / (s - half)).cpu().numpy()


def uniform_attention(masked: npt.NDArray[np.bool_]) -> float:
    """Attention on masked positions [n, s] if every query attended to all keys alike."""
    share = masked.cumsum(axis=1) / np.arange(1, masked.shape[1] + 1)
    return float(share[:, masked.shape[1] // 2 :].mean())


def segment_mass(model: Any, tokens: npt.NDArray[np.int64], segments: npt.NDArray[np.int64]) -> Values:
    """Attention to each segment of a prompt, [segments, layers, heads]: for segment S the sum over j in S of A[s-1, j].

    The query is the prompt's last position, from which the first token of the answer is predicted (our reading of the
    paper's attention mass on the answer span); the segments' masses sum to 1.

    Args:
        model: of transformers.
        tokens: int64 [s].
        segments: int64 [s], index into `SEGMENTS`.
    """
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    mass = torch.zeros(len(SEGMENTS), layers, heads, dtype=torch.float64, device=model.device)
    index = torch.from_numpy(segments).to(model.device)
    last = len(tokens) - 1

    def see(layer: int, first: int, weights: Tensor) -> None:
        if first + weights.shape[1] > last:
            mass[:, layer].index_add_(0, index, weights[:, -1].double().T)

    observe(model, tokens, see)
    return mass.cpu().numpy()


@torch.inference_mode()
def observe(model: Any, tokens: npt.NDArray[np.int64], see: See, room: int = _ROOM) -> None:
    """Run a model and pass on the attention of every layer, one block of queries at a time.

    No layer's [heads, s, s] is ever completely in memory: a block has `room` / s queries. The weights are those of the
    model's own eager attention, which also gives its output; only the additive mask [s, s] stays in memory.

    Args:
        model: of transformers.
        tokens: int64 [s].
        see: called for every layer and block, in order.
        room: queries times keys of a block.

    Raises:
        UsageError: a model whose attention cannot be observed.
    """

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any) -> tuple:
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if eager is None or key.shape[2] != query.shape[2]:
            raise UsageError(f"{type(model).__name__}: its attention cannot be observed; measure another model")
        s, outputs = query.shape[2], []
        size = max(1, room // s)
        for first in range(0, s, size):
            end = min(first + size, s)
            output, weights = eager(
                module,
                query[:, :, first:end],
                key[:, :, :end],
                value[:, :, :end],
                mask[:, :, first:end, :end],
                **kwargs,
            )
            see(module.layer_idx, first, weights[0])
            outputs.append(output)
        return torch.cat(outputs, dim=1), None

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        # The base model, because the logits are not needed.
        model.base_model(torch.from_numpy(tokens).to(model.device)[None], use_cache=False)
    finally:
        model.set_attn_implementation(before)
