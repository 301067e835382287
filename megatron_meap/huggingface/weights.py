"""A checkpoint's weights as Hugging Face's, one after another: only one is in memory at a time."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_meap.checkpoint.reader import LAYERS, Checkpoint
from megatron_meap.errors import UsageError, refusing
from megatron_meap.huggingface.architecture import Architecture, exported_family, from_megatron, huggingface_config
from megatron_meap.huggingface.families import family_of
from megatron_meap.huggingface.mapping import EMBEDDING, Weight, all_weights, layer_weights, outer_weights


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint that has been found convertible."""

    checkpoint: Checkpoint
    model: Architecture
    """As exported, but with the vocabulary's padding; it may have fewer biases than are stored, or more (zeros)."""
    rows: int
    """Rows of the vocabulary that are tokens; the others are padding."""

    def exported(self) -> Architecture:
        """The model without the vocabulary's padding."""
        return dataclasses.replace(self.model, vocabulary=self.rows)

    def names(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the Hugging Face weights, in the order of `tensors`."""
        for layer, weight in all_weights(self.exported()):
            yield from weight.parts(layer).items()

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face weights, each read only when it is asked for."""
        for layer, weight in all_weights(self.model):
            for name, part in zip(weight.parts(layer), weight.split(self._stored(layer, weight)), strict=True):
                yield self._exported(name, part, dtype)

    def _stored(self, layer: int | None, weight: Weight) -> Tensor:
        """A weight of the checkpoint, without the padding of the vocabulary; a bias that it lacks is zero."""
        if layer is not None:
            stored = self.checkpoint.has_layers(weight.megatron)
            return (
                self.checkpoint.read_layer(weight.megatron, layer, weight.expert)
                if stored
                else torch.zeros(weight.shape)
            )
        there = weight.megatron in self.checkpoint.metadata.state_dict_metadata  # the head of a tied model is not
        whole = self.checkpoint.read(weight.megatron if there else EMBEDDING)
        return whole[: self.rows] if len(weight.shape) == 2 else whole  # the embedding and the head

    def _exported(self, name: str, part: Tensor, dtype: torch.dtype) -> tuple[str, Tensor]:
        """A weight as it is written: with muP's factor, and copied, so that the rest of its tensor is freed."""
        factor = self.model.multipliers.of(name, self.model.qk_norm)
        return name, (part if factor == 1 else part.float() * factor).to(dtype, copy=True).contiguous()

    def config(self, dtype: torch.dtype, tokenizer: Any | None) -> dict[str, Any]:
        """Contents of config.json."""
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
        return huggingface_config(self.exported(), str(dtype).removeprefix("torch."), ids)


def inspect(checkpoint: Checkpoint, tokenizer: Any | None) -> Source:
    """Find out whether and how a checkpoint can be converted, only from its arguments and its index.

    Args:
        checkpoint: as `open_checkpoint` returns it.
        tokenizer: the Hugging Face tokenizer, mask token included; None if the run had none.

    Raises:
        UsageError: an unsupported architecture; or layers, shapes or a vocabulary that do not match the arguments.
    """
    with refusing(f"{checkpoint.directory}: its arguments are not those of a GPT model", AttributeError):
        model = from_megatron(checkpoint.args)
    _check_shapes(checkpoint, model)
    rows = vocabulary_rows(checkpoint, tokenizer)
    if rows > model.vocabulary:
        raise UsageError(
            f"{checkpoint.directory}: the tokenizer has {rows} tokens with the mask token, but the embedding only "
            f"{model.vocabulary} rows: it is not the tokenizer of this checkpoint"
        )
    written = _biases_to_write(checkpoint, model, tokenizer)
    apart = model.multipliers.embedding != model.multipliers.output
    written = dataclasses.replace(written, tied=model.tied and not apart)
    exported_family(written)  # or it is refused
    return Source(checkpoint, written, rows)


def vocabulary_rows(checkpoint: Checkpoint, tokenizer: Any | None) -> int:
    """Rows of the embedding that are tokens, including the mask token."""
    if tokenizer is not None:
        return len(tokenizer)
    args = checkpoint.args
    mask_id = getattr(args, "meap_mask_token_id", -1)
    return max(getattr(args, "meap_tokenizer_vocab_size", args.padded_vocab_size), mask_id + 1)


def _check_shapes(checkpoint: Checkpoint, model: Architecture) -> None:
    """Refuse a checkpoint that does not hold exactly the weights that its arguments promise."""
    stored = checkpoint.weights()
    stacked = not any(name.startswith(f"{LAYERS}0.") for name in stored)
    expected = {weight.megatron: weight.shape for group in outer_weights(model) for weight in group}
    for weight in layer_weights(model):
        shape = (*[model.experts] * len(weight.expert), *weight.shape)
        if stacked:
            expected[LAYERS + weight.megatron] = (model.layers, *shape)
        else:
            expected |= {f"{LAYERS}{layer}.{weight.megatron}": shape for layer in range(model.layers)}
    for name, shape in expected.items():
        if stored.get(name) != shape:
            found = f"is {list(stored[name])}" if name in stored else "is missing"
            raise UsageError(
                f"{checkpoint.directory}: {name} {found}, but by the checkpoint's own arguments it is {list(shape)}: "
                "it is damaged, or was put together from different runs"
            )
    unknown = sorted(stored.keys() - expected.keys())
    if unknown:
        raise UsageError(
            f"{checkpoint.directory}: holds {unknown[0]}{' and others' if unknown[1:] else ''}, "
            "which a Llama-style model does not have; its conversion is not supported"
        )


def _biases_to_write(checkpoint: Checkpoint, model: Architecture, tokenizer: Any | None) -> Architecture:
    """Choose the biases of the exported model so that there is a model class for them.

    Megatron has biases on all linear layers or only on Q, K and V. Hugging Face's Llama has switches for those of the
    attention (including the output projection) and those of the MLP; Qwen2 has those of Q, K and V. So biases that are
    all zero, as an import writes them, are dropped; and a model with those of Q, K and V becomes a Qwen2 only if it has
    Qwen2's tokenizer, because for a Qwen2 transformers 5 uses that class whatever the files say. Any other gets zero
    biases on its output projections.
    """
    if model.qkv_bias and not model.output_bias:
        qwen2 = tokenizer is None or type(tokenizer).__name__.startswith("Qwen2Tokenizer")
        keep = family_of(model) is not None and qwen2
        return model if keep else dataclasses.replace(model, output_bias=True)
    if not model.output_bias:
        return model

    def all_zero(*names: str) -> bool:
        return not any(checkpoint.read_layer(name, i).any() for name in names for i in range(model.layers))

    attention = all_zero("self_attention.linear_qkv.bias", "self_attention.linear_proj.bias")
    mlp = all_zero("mlp.linear_fc1.bias", "mlp.linear_fc2.bias")
    return dataclasses.replace(model, qkv_bias=not attention, output_bias=not attention, mlp_bias=not mlp)
