"""Impossible conversions: one clear line, and nothing is left behind that looks finished."""

import copy
import errno
import json
import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as distributed_checkpoint
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_meap.checkpoint import latest
from megatron_meap.checkpoint.reader import open_checkpoint
from megatron_meap.errors import UsageError
from megatron_meap.huggingface import architecture, export
from megatron_meap.huggingface.export import ExportJob, parse_size
from megatron_meap.huggingface.importer import ImportJob, import_model
from megatron_meap.huggingface.output import new_directory
from megatron_meap.huggingface.selfcheck import CheckFailed
from megatron_meap.huggingface.weights import inspect
from megatron_meap.trainer import resume

CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def huggingface(huggingface_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untied Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("bad") / "model"
    tokenizer = AutoTokenizer.from_pretrained(str(huggingface_folder))
    LlamaForCausalLM(LlamaConfig(**CONFIG, vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def megatron(huggingface: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a Megatron checkpoint."""
    folder = tmp_path_factory.mktemp("bad") / "checkpoint"
    import_model(ImportJob(str(huggingface), str(folder), check=False))
    return folder


def refused(message: str, job: Any) -> None:
    """The job ends with one line that says so, and leaves nothing."""
    run = export.export if isinstance(job, ExportJob) else import_model
    parent = Path(job.output).parent
    before = sorted(parent.iterdir()) if parent.is_dir() else []
    with pytest.raises(UsageError, match=message) as caught:
        run(job)
    assert "\n" not in str(caught.value)
    assert (sorted(parent.iterdir()) if parent.is_dir() else []) == before


def copied(folder: Path, to: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(folder, to / "damaged"))


def test_not_a_checkpoint(tmp_path: Path, huggingface: Path) -> None:
    """Paths that are neither checkpoints nor models."""
    out = str(tmp_path / "out" / "made")
    refused("no such directory", ExportJob(str(tmp_path / "nothing"), out))
    refused("not a directory", ExportJob(__file__, out))
    refused("not a Megatron checkpoint", ExportJob(str(huggingface), out))
    refused("not a Hugging Face model directory", ImportJob(str(tmp_path), out))
    (tmp_path / "old" / "iter_0000005" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "old" / "latest_checkpointed_iteration.txt").write_text("5")
    refused("old format", ExportJob(str(tmp_path / "old"), out))
    (tmp_path / "old" / "latest_checkpointed_iteration.txt").write_text("7")
    refused("names iter_0000007, which is not there", ExportJob(str(tmp_path / "old"), out))
    (tmp_path / "old" / "latest_checkpointed_iteration.txt").write_text("seven")
    refused("expected an iteration", ExportJob(str(tmp_path / "old"), out))
    refused("has no iteration 6; it has 5", ExportJob(str(tmp_path / "old"), out, iteration=6))


def test_damaged_checkpoint(tmp_path: Path, megatron: Path) -> None:
    """A torn index, a torn data file, a missing one, and a flipped bit."""
    out = str(tmp_path / "out")
    folder = copied(megatron, tmp_path)
    data, index = folder / "release" / "__0_0.distcp", folder / "release" / ".metadata"
    whole, entries = data.read_bytes(), index.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    refused("the checkpoint is not complete", ExportJob(str(folder), out))
    data.unlink()
    refused("the checkpoint is not complete", ExportJob(str(folder), out))
    data.write_bytes(whole[:-1000] + bytes([whole[-1000] ^ 1]) + whole[-999:])
    refused("the checkpoint is damaged", ExportJob(str(folder), out))
    index.write_bytes(entries[:100])
    refused("cannot be read", ExportJob(str(folder), out))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 3}, r"is \[2, .*by the checkpoint's own arguments it is \[3, "),
        ({"hidden_size": 64}, "by the checkpoint's own arguments"),
        ({"num_query_groups": 2}, "linear_qkv.weight"),
        ({"add_qkv_bias": True}, "linear_qkv.bias is missing"),
        ({"untie_embeddings_and_output_weights": False}, "holds output_layer.weight"),
        ({"num_experts": 8, "moe_ffn_hidden_size": 48}, "pre_mlp_layernorm.weight is missing"),
        ({"num_experts": 8, "moe_latent_size": 8}, "moe-latent-size is not supported; supported are Llama-style"),
        ({"hybrid_layer_pattern": "M*-"}, "hybrid models"),
        ({"multi_latent_attention": True}, "multi-latent"),
        ({"normalization": "LayerNorm"}, "LayerNorm"),
        ({"position_embedding_type": "learned_absolute"}, "learned_absolute"),
        ({"rotary_interleaved": True}, "rotary-interleaved"),
        ({"swiglu": False}, "swiglu"),
        ({"qk_layernorm": True}, "q_layernorm.weight is missing"),
        ({"window_size": (8, 0), "window_attn_skip_freq": 2}, "a window in some layers only"),
        ({"hidden_size": 33}, "not a multiple of --num-attention-heads"),
        ({"padded_vocab_size": 600}, "by the checkpoint's own arguments"),
    ],
)
def test_arguments_that_do_not_fit(megatron: Path, changes: dict[str, Any], message: str) -> None:
    """Another shape than the weights', or another architecture, is named before anything is written."""
    checkpoint = open_checkpoint(megatron)
    args = copy.copy(checkpoint.args)
    vars(args).update(changes)
    object.__setattr__(checkpoint, "args", args)
    with pytest.raises(UsageError, match=message):
        inspect(checkpoint, None)


def test_a_model_that_will_not_convert_is_named_before_it_trains(megatron: Path) -> None:
    """By its arguments alone: another architecture, or extras that no class has together."""
    args = open_checkpoint(megatron).args
    assert architecture.not_exported(args) == []
    args.num_experts, args.moe_shared_expert_intermediate_size = 8, 16
    assert "cannot be exported to Hugging Face: conversion of shared experts" in architecture.not_exported(args)[0]
    args.num_experts, args.window_size, args.qk_layernorm = None, (8, 0), True
    assert "no model class of transformers has at once qk_norm, window (" in architecture.not_exported(args)[0]


def test_every_llama_argument_survives(megatron: Path) -> None:
    """From arguments to the architecture, to flags, to a config, and back."""
    model = architecture.from_megatron(open_checkpoint(megatron).args)
    config = LlamaConfig(**architecture.huggingface_config(model, "float32", {}))
    assert architecture.from_huggingface(config) == model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 9},
            r"more experts per token \(9\) than there are \(4\) is not supported",
        ),
        ({"model_type": "qwen2_moe"}, "'qwen2_moe' is not supported: it has experts .* llama"),
        ({"model_type": "unheard-of"}, "config.json"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, "rope_type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 12345.5}}, "not a whole number"),
        ({"num_hidden_layers": 3}, "model.layers.2.* is missing"),
        ({"intermediate_size": 40}, r"by config.json it is \[40, 32\]"),
        ({"num_hidden_layers": 1}, "model.layers.1.* is not a weight of the model"),
        ({"tie_word_embeddings": True}, "lm_head.weight is another matrix"),
        ({"attention_bias": True}, "q_proj.bias is missing"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "layer_types .*sliding"),
        ({"model_type": "olmo2"}, "'olmo2' is not supported: its norms come after .*; supported are llama"),
        ({"model_type": "gemma2"}, "'gemma2' is not supported"),
        ({"model_type": "phi3"}, "'phi3' is not supported"),
    ],
)
def test_model_that_cannot_be_imported(
    huggingface: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Another architecture, or weights other than the config says: transformers would invent or drop some."""
    folder = copied(huggingface, tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(message, ImportJob(str(folder), str(tmp_path / "out")))


def test_llama3_rope_with_other_frequencies(huggingface: Path, tmp_path: Path) -> None:
    """Megatron has only Llama 3.1's scaling; any other would silently be computed wrongly."""
    folder = copied(huggingface, tmp_path)
    scaling = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"rope_parameters": scaling | {"original_max_position_embeddings": 32}}
    path.write_text(json.dumps(config))
    refused("llama3 RoPE scaling other than Megatron's", ImportJob(str(folder), str(tmp_path / "out")))


def test_weights_that_cannot_be_read(huggingface: Path, tmp_path: Path) -> None:
    """A torn file, and none at all."""
    folder = copied(huggingface, tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    refused("not a safetensors file, or damaged", ImportJob(str(folder), str(tmp_path / "out")))
    file.unlink()
    refused("has no model.safetensors and no index", ImportJob(str(folder), str(tmp_path / "out")))


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_weights_without_their_scales(kind: torch.dtype, huggingface: Path, tmp_path: Path) -> None:
    """Of a quantized model whose config does not say so."""
    folder = copied(huggingface, tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].to(kind)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(rf"{name} is stored as [IF]8.*: quantized weights are not", ImportJob(str(folder), str(tmp_path / "out")))
    refused("divisible-by 0: at least 1", ImportJob(str(huggingface), str(tmp_path / "out"), divisible_by=0))


def test_tokenizer_of_another_size(huggingface: Path, corpus: Any, tmp_path: Path) -> None:
    """More tokens than rows, or far fewer than any padding explains; an ordinary token cannot be the mask token."""
    folder = copied(huggingface, tmp_path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights = load_file(folder / "model.safetensors")
        weights[name] = torch.zeros(500, 32)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"vocab_size": 500}))
    refused("tokenizer has 600 tokens, the weights have 500 rows", ImportJob(str(folder), str(tmp_path / "out")))
    refused("is an ordinary token", ImportJob(str(huggingface), str(tmp_path / "out"), mask_token="e"))
    empty = tmp_path / "empty"
    empty.mkdir()
    job = ImportJob(str(huggingface), str(tmp_path / "out"), tokenizer=str(empty))
    refused("holds no Hugging Face tokenizer", job)


def test_output_that_exists(megatron: Path, tmp_path: Path) -> None:
    """Refused without the flag; with it only what an earlier conversion made is replaced."""
    out = tmp_path / "out"
    out.mkdir()
    export.export(ExportJob(str(megatron), str(out), check=False))  # empty: fine
    refused("exists and is not empty; add --overwrite", ExportJob(str(megatron), str(out), check=False))
    (out / "left-over").touch()
    export.export(ExportJob(str(megatron), str(out), check=False, overwrite=True))
    assert not (out / "left-over").exists()
    other = tmp_path / "documents"
    other.mkdir()
    (other / "letter.txt").touch()
    refused("is not an earlier output", ExportJob(str(megatron), str(other), check=False, overwrite=True))
    refused("which is being read", ExportJob(str(megatron), str(megatron), check=False, overwrite=True))
    refused("not a directory", ExportJob(str(megatron), __file__, check=False))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents", "out"]


def test_disk_that_fills_up(megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If known in advance, it is refused; if found during the conversion, the output is removed."""
    out = ExportJob(str(megatron), str(tmp_path / "out"), check=False)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
        refused("are needed there", out)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(export, "save_file", full)
        refused("the disk is full", out)


def test_failed_check_leaves_nothing(megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that computes something else never gets its name."""
    monkeypatch.setattr(
        export, "write_json", lambda path, content: path.write_text(json.dumps(content | {"rms_norm_eps": 0.5}))
    )
    job = ExportJob(str(megatron), str(tmp_path / "out"))
    with pytest.raises(CheckFailed):
        export.export(job)
    assert not list(tmp_path.iterdir())


def test_interrupted_conversion_leaves_nothing(megatron: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle."""

    def interrupted() -> None:
        with new_directory(tmp_path / "out", source=megatron, overwrite=False, mark="", needed=0) as directory:
            (directory / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("100", 100), ("2K", 2000)])
def test_size(text: str, size: int) -> None:
    """Sizes as people write them."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "five", "-1GB", "0", "5TB"])
def test_no_size(text: str) -> None:
    """Anything else."""
    with pytest.raises(UsageError, match="expected a size"):
        parse_size(text)


def test_a_checkpoint_of_fsdp_is_read_and_compared(tmp_path: Path) -> None:
    """As Megatron saves it with `--ckpt-format fsdp_dtensor`: in PyTorch's format, without its own `metadata.json`."""
    folder = latest.directory(tmp_path, 4)
    saved = Namespace(ckpt_format="fsdp_dtensor", seed=7)
    state = {"args": saved, "iteration": 4, "model": {"a": torch.ones(2)}, "opt_param_scheduler": {"max_lr": 0.5}}
    distributed_checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    (tmp_path / latest.POINTER).write_text("4")
    choice = latest.choose(tmp_path, None, refuse_damaged=True)
    assert choice is not None
    assert (choice.path, choice.warning) == (folder, None)
    found = resume._state_from_fsdp("--load", folder, Namespace(ckpt_format="fsdp_dtensor"))
    assert found == {"args": saved, "opt_param_scheduler": {"max_lr": 0.5}}
    with pytest.raises(UsageError, match="is a checkpoint of FSDP; add --ckpt-format fsdp_dtensor"):
        resume._state_from_fsdp("--load", folder, Namespace(ckpt_format="torch_dist"))
    with pytest.raises(UsageError, match="holds no common state"):
        open_checkpoint(tmp_path)
    (folder / ".metadata").write_bytes(b"torn")
    with pytest.raises(UsageError, match=r"metadata\.json is missing"):
        latest.choose(tmp_path, None, refuse_damaged=True)
