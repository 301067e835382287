"""A Hugging Face directory as a source of weights: found complete before anything is converted."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from megatron_meap.errors import UsageError, one_line
from megatron_meap.huggingface.architecture import Architecture, from_huggingface
from megatron_meap.huggingface.mapping import Weight, layer_weights, outer_weights

_FLOATS = ("F64", "F32", "F16", "BF16")  # others are scaled by something that nobody would apply


@dataclass(frozen=True)
class HuggingFaceWeights:
    """The weights of a directory, read one by one when they are asked for."""

    folder: Path
    model: Architecture
    places: dict[str, Path]
    """The file of each weight."""

    def read(self, name: str) -> Tensor:
        """One weight."""
        with safe_open(self.places[name], framework="pt") as file:
            return file.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight, without reading it."""
        with safe_open(self.places[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def kind(self, name: str) -> str:
        """How safetensors calls the type of a weight."""
        with safe_open(self.places[name], framework="pt") as file:
            return str(file.get_slice(name).get_dtype())

    def fused(self, weight: Weight, prefix: str = "") -> Tensor:
        """A weight of Megatron's, made of those here; biases that are not here are zero.

        Megatron has biases on all linear layers, or on Q, K and V alone.
        """
        names = [prefix + name for name in weight.huggingface]
        return weight.join(
            [
                self.read(name) if name in self.places else torch.zeros(shape)
                for name, shape in zip(names, weight.shapes, strict=True)
            ]
        )

    def dtype(self) -> torch.dtype:
        """Type to keep the weights in: bf16 as it is, 32 bits for all others."""
        stored = self.read("model.embed_tokens.weight").dtype
        return stored if stored == torch.bfloat16 else torch.float32


def read_directory(folder: Path) -> HuggingFaceWeights:
    """Find out what model a directory holds, and that it holds all of it.

    Raises:
        UsageError: no model, another architecture, or weights other than its config says.
    """
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder}: not a Hugging Face model directory: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # an architecture that transformers does not know, or a file that is not JSON
        raise UsageError(f"{folder / 'config.json'}: {one_line(error)}") from error
    found = HuggingFaceWeights(folder, from_huggingface(config), weights_in(folder))
    if not found.places:
        raise UsageError(
            f"{folder}: has no model.safetensors and no index of shards (model.safetensors.index.json); "
            "save the model with save_pretrained of transformers"
        )
    _check_weights(found)
    return found


def weights_in(folder: Path) -> dict[str, Path]:
    """Names of all weights that transformers reads from a directory, and the file of each.

    That is `model.safetensors`, or the files in the index. Others there (`consolidated.safetensors`, an adapter, shards
    of an earlier save) are none of the model's.

    Raises:
        UsageError: a file is damaged or missing, or the index names a weight that its file does not hold.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return dict.fromkeys(_names_in(whole), whole)
    if not index.is_file():
        return {}
    try:
        places = {str(name): folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{index}: not an index of weights ({one_line(error)})") from error
    for path in sorted(set(places.values())):
        if not path.is_file():
            raise UsageError(f"{path}: missing, but {index.name} names it; copy the directory again")
        there = _names_in(path)
        if lacking := sorted(name for name, place in places.items() if place == path and name not in there):
            raise UsageError(f"{path}: has no {lacking[0]}, but {index.name} says so: it belongs to another save")
    return places


def _names_in(path: Path) -> set[str]:
    """Names of the weights in one file."""
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except Exception as error:  # a damaged header can be wrong in any way
        raise UsageError(f"{path}: not a safetensors file, or damaged ({one_line(error)})") from error


def _check_weights(found: HuggingFaceWeights) -> None:
    """Refuse weights that are not exactly those of the config: transformers would make up or drop the rest."""
    before, after = outer_weights(found.model)
    expected = {name: shape for w in before + after for name, shape in zip(w.huggingface, w.shapes, strict=True)}
    for layer in range(found.model.layers):
        for weight in layer_weights(found.model):
            names = (f"model.layers.{layer}.{name}" for name in weight.huggingface)
            expected |= dict(zip(names, weight.shapes, strict=True))
    for name, shape in expected.items():
        if name not in found.places:
            raise UsageError(f"{found.folder}: {name} is missing; by config.json the model has it")
        if found.shape(name) != shape:
            stored = list(found.shape(name))
            raise UsageError(f"{found.folder}: {name} is {stored}, but by config.json it is {list(shape)}")
        if (kind := found.kind(name)) not in _FLOATS:
            raise UsageError(f"{found.folder}: {name} is stored as {kind}: quantized weights are not supported")
    superfluous = {name for name in found.places.keys() - expected.keys() if not name.endswith("rotary_emb.inv_freq")}
    if "lm_head.weight" in superfluous and found.model.tied:
        if not torch.equal(found.read("lm_head.weight"), found.read("model.embed_tokens.weight")):
            raise UsageError(
                f"{found.folder}: config.json ties the head to the embedding, but lm_head.weight is another matrix; "
                "set tie_word_embeddings to false if the head is meant"
            )
        superfluous.remove("lm_head.weight")
    if superfluous:
        raise UsageError(f"{found.folder}: {min(superfluous)} is not a weight of the model in config.json")
