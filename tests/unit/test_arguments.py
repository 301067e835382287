"""Defaults and refusals that depend on what is installed; a GPU and Transformer Engine are simulated."""

import importlib.util
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear

from megatron_meap.backend import device, megatron_patches
from megatron_meap.errors import UsageError
from megatron_meap.flags import with_files
from megatron_meap.huggingface import megatron_model
from megatron_meap.trainer import arguments


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Sets the command line of a process on a GPU, with or without Transformer Engine."""

    def run_there(*flags: str, with_te: bool) -> None:
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt_meap.py", *flags])
        monkeypatch.setattr(device, "is_cpu", lambda: False)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if with_te else None)

    return run_there


def test_local_layers_have_all_their_settings_whatever_is_installed(gpu) -> None:
    gpu(with_te=True)
    assert arguments._local_defaults() == {}
    gpu(with_te=False)
    assert arguments._local_defaults() == arguments.LOCAL_LAYERS
    for asked in (["--transformer-impl", "local"], ["--transformer-impl=local"]):
        gpu("--num-layers", "2", *asked, with_te=True)
        assert arguments._local_defaults() == arguments.LOCAL_LAYERS
    gpu("--transformer-impl", "transformer_engine", with_te=False)
    assert arguments._local_defaults() == {}


def test_context_parallelism_needs_transformer_engine(gpu) -> None:
    gpu(with_te=True)
    args = Namespace(context_parallel_size=2, transformer_impl="transformer_engine")
    arguments._refuse_what_this_device_cannot(args)
    args.transformer_impl = "local"
    with pytest.raises(UsageError, match="--context-parallel-size 2: needs Transformer Engine"):
        arguments._refuse_what_this_device_cannot(args)


def test_megatrons_own_linear_layers_are_made_without_apex() -> None:
    megatron_patches.apply()
    config = ModelParallelConfig(gradient_accumulation_fusion=True, perform_initialization=False)
    config.use_cpu_initialization = True
    with megatron_model.one_process():
        layer = ColumnParallelLinear(8, 16, config=config, init_method=lambda weight: weight, bias=False)
    assert not layer.gradient_accumulation_fusion
    assert config.gradient_accumulation_fusion  # Transformer Engine's layers keep it


def test_flags_are_read_from_a_file(tmp_path: Path) -> None:
    """With its quotes, which a shell would not take for quotes."""
    file = tmp_path / "its flags.txt"
    file.write_text("--tokenizer-model '/a b/c' --no-rope-freq '[0,1]'\n")
    words = with_files(["train", f"@{file}", "--lr", "1"])
    assert words == ["train", "--tokenizer-model", "/a b/c", "--no-rope-freq", "[0,1]", "--lr", "1"]
    with pytest.raises(UsageError, match=r"^@mask: cannot be read as flags"):
        with_files(["train", "@mask"])
    with pytest.raises(UsageError, match="write @FILE instead of"):
        with_files(file.read_text().split())
