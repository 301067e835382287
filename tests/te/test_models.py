"""The Transformer Engine model against the local one, as far as that goes without a GPU: up to the forward pass.

Skipped where Transformer Engine is not installed: `make te` builds it into an environment of its own, and runs this.
"""

import copy
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if sys.modules.get("transformer_engine") is None:
    pytest.skip("no Transformer Engine here: `make te` builds it and runs these tests", allow_module_level=True)

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.arguments import parse_args, validate_args

from megatron_meap.checkpoint import latest
from megatron_meap.huggingface import megatron_model
from megatron_meap.trainer import run
from megatron_meap.trainer.arguments import add_arguments
from tests.conftest import Corpus
from tests.functional.test_recipes import RECIPES, Desk
from tests.launch import MODEL, TRAINING, launch_many

KINDS: dict[str, list[str]] = {
    "Llama": [],
    "tied embeddings": ["--tied"],
    "QK norm": ["--qk-layernorm"],
    "biases": ["--add-qkv-bias"],
    "GPT-2": ["--normalization", "LayerNorm", "--gelu"],
    "mixture of experts": ["--num-experts", "4", "--moe-router-topk", "2", "--disable-bias-linear"],
    "HybridModel": ["--hybrid-layer-pattern", "*-*-"],
}
"""Flags of each kind of model beside those of `MODEL`; `--tied` and `--gelu` take flags away."""


def flags_of(kind: str) -> list[str]:
    """The model's flags for a kind."""
    flags = [*MODEL, *KINDS[kind]]
    for ours, megatrons in (("--tied", "--untie-embeddings-and-output-weights"), ("--gelu", "--swiglu")):
        if ours in flags:
            flags = [flag for flag in flags if flag not in (ours, megatrons)]
    if "--hybrid-layer-pattern" in flags:
        flags = flags[2:]  # the pattern says how many layers
    return flags


@pytest.fixture(scope="module")
def checkpoints(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of two steps on the CPU with the local layers, by kind."""
    folder = tmp_path_factory.mktemp("trained")
    runs = {
        kind.replace(" ", "-"): [
            *flags_of(kind), *TRAINING, *corpus.data_flags, "--data-cache-path", str(folder / "cache"),
            "--train-iters", "2", "--save", str(folder / kind), "--save-interval", "2",
        ]
        for kind in KINDS
    }  # fmt: skip
    launch_many(1, runs, folder, warm=False)
    return {kind: latest.directory(folder / kind, 2) for kind in KINDS}


@pytest.fixture(autouse=True, scope="module")
def _one_process() -> Iterator[None]:
    with megatron_model.one_process():
        yield


def transformer_engine_model(args: Namespace, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model of a run with Transformer Engine's layers; its weights are not set."""
    alone = copy.copy(args)
    vars(alone).update({**megatron_model.ALONE, "transformer_impl": "transformer_engine"})
    alone.params_dtype, alone.bf16 = dtype, dtype == torch.bfloat16
    config = run.model_config(alone)
    return config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups())


def tensors(model: Any) -> dict[str, tuple[int, ...]]:
    """Global shapes of the tensors in a checkpoint of the model, by key: without Transformer Engine's extra state."""
    sharded = model.sharded_state_dict().values()
    return {part.key: part.global_shape for part in sharded if isinstance(part, ShardedTensor)}


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_trained_on_cpu_loads_into_it(checkpoints: dict[str, Path], kind: str) -> None:
    local, args = megatron_model.load(checkpoints[kind], torch.float32)
    model = transformer_engine_model(args)
    assert any("transformer_engine" in type(module).__module__ for module in model.modules())
    assert tensors(model) == tensors(local)
    assert parameters(model) == parameters(local)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    wanted = {"model": megatron_model._sharded(model)}
    loaded = dist_checkpointing.load(wanted, str(checkpoints[kind]), strict=StrictHandling.RAISE_UNEXPECTED)
    model.load_state_dict(loaded["model"], strict=False)
    expected = by_key(local)
    found = by_key(model)
    assert found.keys() == expected.keys()
    for key in expected:
        assert torch.equal(found[key], expected[key]), key


def by_key(model: Any) -> dict[str, torch.Tensor]:
    """The model's tensors by their keys in a checkpoint; one key for each layer."""
    return {
        f"{part.key}@{part.global_offset}": part.data
        for part in model.sharded_state_dict().values()
        if isinstance(part, ShardedTensor)
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_model_of_a_recipe(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    """Parameters and checkpoint keys of one layer, at the recipe's widths: those of the local layers."""
    script, variables = RECIPES[recipe]
    one_gpu = {"NNODES": "1", "GPUS_PER_NODE": "1", "TP": "1", "PP": "1", "CP": "1", "MEAP_DEVICE": "cpu"}
    flags = Desk(tmp_path, corpus).asked(script, "--num-layers", "1", **(variables | one_gpu))["command"]
    flags = flags[1 + next(place for place, word in enumerate(flags) if word.endswith("pretrain_gpt_meap.py")) :]
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt_meap.py", *flags])
    args = parse_args(add_arguments)
    args.padded_vocab_size = 512
    validate_args(args)
    local = megatron_model.build(args, torch.bfloat16)
    expected = tensors(local), parameters(local)
    del local  # two layers of 70B's width at a time are too much
    model = transformer_engine_model(args, torch.bfloat16)
    assert (tensors(model), parameters(model)) == expected
