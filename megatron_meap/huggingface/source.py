"""A Hugging Face directory as a source of weights, checked for completeness before anything is converted."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from megatron_meap.errors import UsageError, refusing
from megatron_meap.huggingface.architecture import Architecture, from_huggingface
from megatron_meap.huggingface.mapping import Weight, all_weights
from megatron_meap.records import read_json

_FLOATS = ("F64", "F32", "F16", "BF16")  # other types need scales, which would not be applied


@dataclass(frozen=True)
class HuggingFaceWeights:
    """The weights of a directory, each read when it is asked for."""

    folder: Path
    model: Architecture
    places: dict[str, Path]
    """The file of each weight."""

    def read(self, name: str) -> Tensor:
        """One weight."""
        with safe_open(self.places[name], framework="pt") as file:
            return file.get_tensor(name)

    def described(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape of a weight and safetensors' name of its type, without reading it."""
        with safe_open(self.places[name], framework="pt") as file:
            stored = file.get_slice(name)
            return tuple(stored.get_shape()), str(stored.get_dtype())

    def fused(self, layer: int | None, weight: Weight) -> Tensor:
        """A weight of Megatron's, made of those here; biases that are not here are zero.

        Megatron has biases on all linear layers, or only on Q, K and V.
        """
        parts = weight.parts(layer).items()
        return weight.join([self.read(name) if name in self.places else torch.zeros(shape) for name, shape in parts])

    def dtype(self) -> torch.dtype:
        """Type to keep the weights in: bf16 stays bf16, all others become fp32."""
        stored = self.read("model.embed_tokens.weight").dtype
        return stored if stored == torch.bfloat16 else torch.float32


def read_directory(folder: Path) -> HuggingFaceWeights:
    """Find out which model a directory holds, and check that it is complete.

    Raises:
        UsageError: no model, an unsupported architecture, or weights that do not match the config.
    """
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder}: not a Hugging Face model directory: it has no config.json")
    with refusing(f"{folder / 'config.json'}: transformers cannot read it"):  # an unknown architecture, or no JSON
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
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
    of an earlier save) do not belong to the model.

    Raises:
        UsageError: a file is damaged or missing, or the index names a weight that its file does not hold.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return dict.fromkeys(_names_in(whole), whole)
    if not index.is_file():
        return {}
    places = read_json(index, {"weight_map": {str: str}}, "copy the directory again")["weight_map"]
    places = {name: folder / file for name, file in places.items()}
    for path in sorted(set(places.values())):
        if not path.is_file():
            raise UsageError(f"{path}: missing, but {index.name} names it; copy the directory again")
        there = _names_in(path)
        if lacking := sorted(name for name, place in places.items() if place == path and name not in there):
            raise UsageError(f"{path}: has no {lacking[0]}, but {index.name} says so: it belongs to another save")
    return places


def _names_in(path: Path) -> set[str]:
    """Names of the weights in one file."""
    # A damaged header can be wrong in any way.
    with refusing(f"{path}: not a safetensors file, or damaged"), safe_open(path, framework="pt") as file:
        return set(file.keys())


def _check_weights(found: HuggingFaceWeights) -> None:
    """Refuse weights that do not match the config exactly: transformers would make up or drop the difference."""
    expected: dict[str, tuple[int, ...]] = {}
    for layer, weight in all_weights(found.model):
        expected |= weight.parts(layer)
    for name, shape in expected.items():
        if name not in found.places:
            raise UsageError(f"{found.folder}: {name} is missing; by config.json the model has it")
        stored, kind = found.described(name)
        if stored != shape:
            raise UsageError(f"{found.folder}: {name} is {list(stored)}, but by config.json it is {list(shape)}")
        if kind not in _FLOATS:
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
