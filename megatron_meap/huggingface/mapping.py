"""Names and layouts of the weights in Megatron's and in Hugging Face's checkpoints, for both directions.

Megatron fuses projections that Hugging Face keeps separate. With g query groups of n/g query heads of d rows each:

- `linear_qkv` holds, group after group, the group's query heads, its key head and its value head:
  [g, n/g + 2, d, hidden]. Hugging Face's q, k and v are [n * d, hidden], [g * d, hidden], [g * d, hidden].
- `linear_fc1` holds the gate above the up projection: [2 * ffn, hidden].
- Experts are stored as one tensor, [experts, ...]; here each of them has weights of its own.

RoPE rotates the halves of a head in both, so the order of the rows within a head is the same.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_meap.huggingface.architecture import Architecture, exported_family

EMBEDDING = "embedding.word_embeddings.weight"
"""Megatron's name of the embedding, which is also the head if they are tied."""

Split = Callable[[Tensor], list[Tensor]]
Join = Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True)
class Weight:
    """One weight of Megatron's, and the weights of Hugging Face's that it consists of."""

    megatron: str
    shape: tuple[int, ...]
    """In Megatron; for a layer's weight, of one layer."""
    huggingface: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Of each weight in `huggingface`."""
    split: Split = lambda whole: [whole]
    """From Megatron's to Hugging Face's."""
    join: Join = lambda parts: parts[0]
    """From Hugging Face's to Megatron's."""
    expert: tuple[int, ...] = ()
    """Number of the expert that it belongs to; empty for all other weights."""

    def parts(self, layer: int | None) -> dict[str, tuple[int, ...]]:
        """Hugging Face's full names and shapes; `layer` is None for a weight outside the layers."""
        prefix = "" if layer is None else f"model.layers.{layer}."
        return {prefix + name: shape for name, shape in zip(self.huggingface, self.shapes, strict=True)}


def all_weights(model: Architecture) -> Iterator[tuple[int | None, Weight]]:
    """Every weight in the order of an export, with the number of its layer (None outside the layers)."""
    before, after = outer_weights(model)
    yield from ((None, weight) for weight in before)
    for layer in range(model.layers):
        yield from ((layer, weight) for weight in layer_weights(model))
    yield from ((None, weight) for weight in after)


def _plain(megatron: str, huggingface: str, *shape: int) -> Weight:
    return Weight(megatron, shape, (huggingface,), (shape,))


def outer_weights(model: Architecture) -> tuple[list[Weight], list[Weight]]:
    """The weights before the layers, and those after them."""
    rows, hidden = model.vocabulary, model.hidden
    before = [_plain(EMBEDDING, "model.embed_tokens.weight", rows, hidden)]
    after = [_plain("decoder.final_layernorm.weight", "model.norm.weight", hidden)]
    if not model.tied:
        after.append(_plain("output_layer.weight", "lm_head.weight", rows, hidden))
    return before, after


def layer_weights(model: Architecture) -> list[Weight]:
    """The weights of one layer: Megatron's below `decoder.layers.`, Hugging Face's below `model.layers.<i>.`."""
    hidden, ffn = model.hidden, model.ffn
    attention_out = model.heads * model.head_dim
    weights = [
        _plain("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", hidden),
        _qkv(model, "weight", hidden),
        _plain("self_attention.linear_proj.weight", "self_attn.o_proj.weight", hidden, attention_out),
    ]
    if model.experts:
        weights += _expert_weights(model)
    else:
        weights += [
            _plain("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", hidden),
            _gate_up(model, "weight", hidden),
            _plain("mlp.linear_fc2.weight", "mlp.down_proj.weight", hidden, ffn),
        ]
    if model.qk_norm:
        weights += [
            _plain(f"self_attention.{name}_layernorm.weight", f"self_attn.{name}_norm.weight", model.head_dim)
            for name in "qk"
        ]
    if model.qkv_bias:
        weights.append(_qkv(model, "bias"))
    if model.output_bias:
        weights.append(_plain("self_attention.linear_proj.bias", "self_attn.o_proj.bias", hidden))
    if model.mlp_bias:
        weights.append(_gate_up(model, "bias"))
        weights.append(_plain("mlp.linear_fc2.bias", "mlp.down_proj.bias", hidden))
    return weights


def _qkv(model: Architecture, kind: str, *columns: int) -> Weight:
    """The fused query, key and value projection: its weight [rows, hidden], or its bias [rows]."""
    groups, dim = model.groups, model.head_dim
    queries = model.heads // groups  # query heads of a group

    def split(whole: Tensor) -> list[Tensor]:
        grouped = whole.view(groups, queries + 2, dim, *columns)
        parts = grouped[:, :queries], grouped[:, queries], grouped[:, queries + 1]
        return [part.reshape(-1, *columns) for part in parts]

    def join(parts: list[Tensor]) -> Tensor:
        q, k, v = (part.reshape(groups, -1, dim, *columns) for part in parts)
        return torch.cat([q, k, v], dim=1).reshape(-1, *columns)

    return Weight(
        f"self_attention.linear_qkv.{kind}",
        (sum(model.qkv_rows), *columns),
        tuple(f"self_attn.{name}_proj.{kind}" for name in "qkv"),
        tuple((rows, *columns) for rows in model.qkv_rows),
        split,
        join,
    )


def _expert_weights(model: Architecture) -> list[Weight]:
    """The norm before the experts, the router, and the experts one after another."""
    names = exported_family(model).routed
    assert names is not None  # of all classes that have experts
    weights = [
        _plain("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", model.hidden),
        _plain("mlp.router.weight", f"{names.router}.weight", model.experts, model.hidden),
    ]
    for number in range(model.experts):
        own = f"{names.expert}.{number}"
        first = _gate_up(model, "weight", model.hidden)
        weights += [
            replace(
                first,
                megatron="mlp.experts.experts.linear_fc1.weight",
                huggingface=(f"{own}.{names.gate}.weight", f"{own}.{names.up}.weight"),
                expert=(number,),
            ),
            replace(
                _plain("mlp.experts.experts.linear_fc2.weight", f"{own}.{names.down}.weight", model.hidden, model.ffn),
                expert=(number,),
            ),
        ]
    return weights


def _gate_up(model: Architecture, kind: str, *columns: int) -> Weight:
    """The fused gate and up projection."""
    return Weight(
        f"mlp.linear_fc1.{kind}",
        (2 * model.ffn, *columns),
        (f"mlp.gate_proj.{kind}", f"mlp.up_proj.{kind}"),
        ((model.ffn, *columns), (model.ffn, *columns)),
        lambda whole: list(whole.chunk(2)),
        torch.cat,
    )
