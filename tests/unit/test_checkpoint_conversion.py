"""Conversion from and to Hugging Face in one process: random small models, no download."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from megatron_meap.checkpoint.reader import open_checkpoint
from megatron_meap.errors import UsageError
from megatron_meap.huggingface import importer, megatron_model, selfcheck, source
from megatron_meap.huggingface.export import ExportJob, export
from megatron_meap.huggingface.generation import model_in_memory
from megatron_meap.huggingface.importer import ImportJob, import_model
from megatron_meap.huggingface.mup import Multipliers
from megatron_meap.huggingface.selfcheck import CheckFailed
from megatron_meap.huggingface.weights import inspect
from megatron_meap.sft.published import TEMPLATES
from megatron_meap.sft.turns import TurnEncoder
from megatron_meap.tokenization.huggingface import (
    begin_with_bos,
    begin_without_bos,
    from_sentencepiece,
    save_tokenizer,
)
from tests.models import LLAMA3, MODELS, SMALL, save_random_model


@dataclass(frozen=True)
class Pair:
    """A model and what became of it."""

    original: Path
    imported: Path
    exported: Path


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, huggingface_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Each model, imported and exported again, both with the self-check."""
    folder = tmp_path_factory.mktemp(request.param)
    made = Pair(folder / "original", folder / "imported", folder / "exported")
    save_random_model(MODELS[request.param], huggingface_folder, made.original)
    import_model(ImportJob(str(made.original), str(made.imported)))
    export(ExportJob(str(made.imported), str(made.exported)))
    return made


@pytest.fixture(scope="module")
def untied(huggingface_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """One untied Llama, for tests that change something."""
    folder = tmp_path_factory.mktemp("untied")
    made = Pair(folder / "original", folder / "imported", folder / "exported")
    save_random_model(LlamaConfig(**SMALL), huggingface_folder, made.original)
    import_model(ImportJob(str(made.original), str(made.imported), check=False))
    export(ExportJob(str(made.imported), str(made.exported), check=False))
    return made


def test_import_then_export_is_bit_equal(pair: Pair) -> None:
    """The same tensors under the same names; of the vocabulary the tokens, plus the mask token."""
    before, after = load_file(pair.original / "model.safetensors"), load_file(pair.exported / "model.safetensors")
    rows = len(before["model.embed_tokens.weight"])
    tokens = AutoTokenizer.from_pretrained(pair.exported).mask_token_id
    assert tokens < rows
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if len(tensor) == rows:
            assert len(after[name]) == tokens + 1
            assert torch.equal(tensor[:tokens], after[name][:tokens])
        else:
            assert torch.equal(tensor, after[name])


def test_logits_are_those_of_the_original(pair: Pair) -> None:
    """Megatron computes what transformers computed before, within 1e-4 in fp32."""
    original = AutoModelForCausalLM.from_pretrained(pair.original).eval()
    tokens = torch.randint(600, (2, 96), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = original(tokens).logits
    with megatron_model.one_process():
        model, _ = megatron_model.load(pair.imported / "release", torch.float32)
        found = megatron_model.logits(model, tokens)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(found[..., :600], expected[..., :600], rtol=0, atol=1e-4)


def test_export_loads_with_an_empty_report(pair: Pair) -> None:
    """Nothing is missing, unexpected or mismatched, and the mask token is there and suppressed."""
    model, report = AutoModelForCausalLM.from_pretrained(pair.exported, output_loading_info=True)
    assert not any(report.values())
    tokenizer = AutoTokenizer.from_pretrained(pair.exported)
    assert model.config.vocab_size == len(tokenizer) == tokenizer.mask_token_id + 1
    assert model.generation_config.suppress_tokens == [tokenizer.mask_token_id]
    written = json.loads((pair.exported / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]


def test_the_model_that_generates_is_the_exported_one(pair: Pair) -> None:
    """`generate.py` and the evaluation make it of the checkpoint in memory."""
    exported, tokenizer = (kind.from_pretrained(pair.exported) for kind in (AutoModelForCausalLM, AutoTokenizer))
    made = model_in_memory(inspect(open_checkpoint(pair.imported), tokenizer), torch.float32).eval()
    tokens = torch.arange(96)[None]
    with torch.inference_mode():
        torch.testing.assert_close(made(tokens).logits, exported.eval()(tokens).logits)


MUP = "--use-mup --mup-base-hidden-size 32 --mup-embedding-mult 4 --mup-base-head-dim 8"
"""A width of 2, and heads of 16 whose scores are multiplied with 8 ** 0.5 / 16 * 16 ** 0.5."""


@pytest.mark.parametrize(
    ("flags", "multipliers"),
    [
        pytest.param(MUP, (4.0, 0.5, 8**0.5 / 4), marks=pytest.mark.slow),
        (f"{MUP} --untie-embeddings-and-output-weights --qk-layernorm", (4.0, 0.5, 8**0.5 / 4)),
        pytest.param("--use-mup --mup-base-head-dim 16 --mup-output-mult 2", (1.0, 2.0, 1.0), marks=pytest.mark.slow),
        ("--use-mup --mup-base-hidden-size 16 --mup-embedding-mult 0.25 --mup-attn-scale-power 0.5", (0.25, 0.25, 1.0)),
    ],
)
def test_mups_multipliers_become_part_of_the_weights(
    untied: Pair, tmp_path: Path, flags: str, multipliers: tuple[float, ...]
) -> None:
    """The logits are those of Megatron's own model: the export checks that."""
    words = (untied.imported / "megatron_flags.txt").read_text().replace("--untie-embeddings-and-output-weights", "")
    args = importer._megatron_args([*shlex.split(words), *flags.split()], torch.float32)
    (tmp_path / "saved").mkdir()
    with megatron_model.one_process():
        model = megatron_model.build(args, torch.float32)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
        megatron_model.save(model, args, tmp_path / "saved" / "release")
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("release")
    assert tuple(vars(Multipliers.from_megatron(args)).values()) == pytest.approx(multipliers)
    export(ExportJob(str(tmp_path / "saved"), str(tmp_path / "out")))
    tied = json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    assert tied is (multipliers[0] == multipliers[1])
    narrow = ExportJob(str(tmp_path / "saved"), str(tmp_path / "narrow"), dtype="bfloat16")
    if multipliers[2] == 1.0:
        export(narrow)
    else:
        with pytest.raises(UsageError, match=r"multipliers \(attention 0.707107\) are not powers of two"):
            export(narrow)


def test_new_rows_are_the_mean_with_a_little_noise(untied: Pair) -> None:
    """The mask token and the padding start as average tokens, no two the same, alike for the same seed."""
    checkpoint = open_checkpoint(untied.imported)
    tokens = checkpoint.args.meap_mask_token_id
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        rows = checkpoint.read(name)
        assert rows.shape[0] % 128 == 0
        new, mean, deviation = rows[tokens:], rows[:tokens].mean(dim=0), rows[:tokens].std(dim=0)
        assert len(new) > 1
        assert ((new - mean).abs() < 0.06 * deviation).all()
        assert not torch.equal(new[0], new[1])


def test_several_files_and_another_dtype(untied: Pair, tmp_path: Path) -> None:
    """Files stay below the requested size; the index names them all; the weights are the same, rounded."""
    export(ExportJob(str(untied.imported), str(tmp_path / "out"), dtype="bfloat16", max_shard_size="100KB"))
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    whole = load_file(untied.exported / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "out" / file)[name], whole[name].bfloat16())


def break_weights(folder: Path, change: Any) -> None:
    """Change the weights of an exported directory."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def break_config(folder: Path, **changes: Any) -> None:
    """Change the config of an exported directory."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def swap_halves(weights: dict[str, torch.Tensor]) -> None:
    """Rows of a query projection in the order of the interleaved RoPE."""
    name = "model.layers.0.self_attn.q_proj.weight"
    rows = weights[name].view(4, 2, 8, 64)
    weights[name] = rows.transpose(1, 2).reshape(64, 64).contiguous()


TRAPS = {  # each of these loads without an error
    "untied model without a head": lambda folder: break_weights(folder, lambda w: w.pop("lm_head.weight")),
    "tied model with a separate head": lambda folder: break_config(folder, tie_word_embeddings=True),
    "missing projection": lambda folder: break_weights(
        folder, lambda w: w.pop("model.layers.1.self_attn.q_proj.weight")
    ),
    "wrong rope_theta": lambda folder: break_config(folder, rope_theta=5e5, rope_parameters=None),
    "wrong rope scaling": lambda folder: break_config(folder, rope_scaling=LLAMA3 | {"rope_theta": 10000.0}),
    "interleaved rotary layout": lambda folder: break_weights(folder, swap_halves),
    "superfluous weight": lambda folder: break_weights(folder, lambda w: w.update(extra=torch.zeros(1))),
    "other epsilon": lambda folder: break_config(folder, rms_norm_eps=1e-2),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_trap_is_caught(untied: Pair, tmp_path: Path, trap: str) -> None:
    """A model that loads silently but computes something else fails the self-check."""
    folder = copied(untied.exported, tmp_path)
    selfcheck.load_completely(folder)
    TRAPS[trap](folder)
    AutoModelForCausalLM.from_pretrained(folder)  # no error here: that is the trap
    with pytest.raises(UsageError):
        selfcheck.compare(folder, untied.imported / "release", torch.float32, None)


def test_unpruned_vocabulary_and_unsuppressed_mask_are_caught(untied: Pair, tmp_path: Path) -> None:
    """Padding rows must be gone, and generation must not give the mask token."""
    args = open_checkpoint(untied.imported).args
    folder = copied(untied.exported, tmp_path)
    selfcheck.check_tokenizer(folder, megatron_args(untied.imported))
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(CheckFailed, match="not suppressed"):
        selfcheck.check_tokenizer(folder, args)
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size < args.padded_vocab_size


def test_another_tokenizer_is_caught(untied: Pair, corpus: Any, tmp_path: Path) -> None:
    """A tokenizer with other ids than in training fails the self-check, or its size gives it away before."""
    args = megatron_args(untied.imported)
    args.tokenizer_type, args.tokenizer_model = "SentencePieceTokenizer", corpus.tokenizer
    with pytest.raises(CheckFailed, match="other ids"):
        selfcheck.check_tokenizer(untied.exported, args)
    save_tokenizer(from_sentencepiece(Path(corpus.tokenizer)), tmp_path / "other", 128)
    with pytest.raises(UsageError, match="not the tokenizer of this checkpoint"):
        export(ExportJob(str(untied.imported), str(tmp_path / "out"), tokenizer=str(tmp_path / "other")))
    assert not (tmp_path / "out").exists()


def megatron_args(imported: Path) -> Any:
    """Arguments of a checkpoint, as Megatron loads them."""
    from megatron.core import dist_checkpointing

    return dist_checkpointing.load_common_state_dict(str(imported / "release"))["args"]


def copied(folder: Path, to: Path) -> Path:
    """A copy of a directory to break."""
    import shutil

    return Path(shutil.copytree(folder, to / "copy"))


def test_weights_are_those_that_transformers_reads(untied: Pair, tmp_path: Path) -> None:
    """By the index: files of other kinds, and shards of an earlier save, do not count; what it names must be there."""
    export(ExportJob(str(untied.imported), str(tmp_path / "a b"), max_shard_size="100KB", check=False))
    folder = tmp_path / "a b"
    zeros = {"model.norm.weight": torch.zeros(64), "lora.weight": torch.zeros(1)}
    for other in ("consolidated.safetensors", "adapter_model.safetensors", "model-00001-of-00099.safetensors"):
        save_file(zeros, folder / other, metadata={"format": "pt"})
    places = source.weights_in(folder)
    assert places.keys() == load_file(untied.exported / "model.safetensors").keys()
    assert not any(path.name.endswith("00099.safetensors") for path in places.values())
    import_model(ImportJob(str(folder), str(tmp_path / "imported again")))
    shard = places["model.norm.weight"]
    save_file({"lora.weight": torch.zeros(1)}, shard, metadata={"format": "pt"})
    with pytest.raises(UsageError, match="belongs to another save"):
        source.weights_in(folder)
    shard.unlink()
    with pytest.raises(UsageError, match="missing, but model"):
        source.weights_in(folder)


def test_what_older_saves_hold_besides_is_left_out(huggingface_folder: Path, tmp_path: Path) -> None:
    """The head of a tied model beside its embedding, rotary frequencies; EOS ids in config.json alone."""
    folder = tmp_path / "original"
    save_random_model(MODELS["llama-tied"], huggingface_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "generation_config.json").unlink()
    break_config(folder, eos_token_id=[3, 4])
    import_model(ImportJob(str(folder), str(tmp_path / "imported")))
    export(ExportJob(str(tmp_path / "imported"), str(tmp_path / "exported")))
    assert "lm_head.weight" not in load_file(tmp_path / "exported" / "model.safetensors")
    assert json.loads((tmp_path / "exported" / "generation_config.json").read_text())["eos_token_id"] == [0, 3, 4]


@pytest.mark.parametrize("rows", [-1, 2385])
def test_vocabularies_of_other_sizes_than_the_weights(rows: int, huggingface_folder: Path, tmp_path: Path) -> None:
    """An added token without a row gets one; thousands of rows without a token are left out; all EOS ids stay."""
    known = AutoTokenizer.from_pretrained(str(huggingface_folder))
    known.add_special_tokens({"pad_token": "<added>"})
    known.chat_template = {"default": TEMPLATES["chatml"], "tool_use": "{{ messages }}"}
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, vocab_size=len(known) + rows)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "original")
    known.save_pretrained(tmp_path / "original")
    ours = tmp_path / "original" / "generation_config.json"
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.05}
    ours.write_text(
        json.dumps(sampling | {"eos_token_id": [5, 7], "suppress_tokens": [9], "transformers_version": "4"})
    )
    import_model(ImportJob(str(tmp_path / "original"), str(tmp_path / "imported")))
    export(ExportJob(str(tmp_path / "imported"), str(tmp_path / "exported")))
    before, after = (
        load_file(tmp_path / name / "model.safetensors")["model.embed_tokens.weight"]
        for name in ("original", "exported")
    )
    kept = min(len(known), len(before))
    assert torch.equal(before[:kept], after[:kept])
    assert len(after) == len(known) + 1
    settings = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [known.eos_token_id, 5, 7]
    assert settings["suppress_tokens"] == [9, len(known)]
    assert sampling.items() <= settings.items()
    assert "transformers_version" not in settings
    for damaged in ("{", "[]", '{"eos_token_id": "</s>"}'):
        ours.write_text(damaged)
        with pytest.raises(UsageError, match=r"generation_config\.json: cannot be read: .*; correct it"):
            import_model(ImportJob(str(tmp_path / "original"), str(tmp_path / "again")))
    encoder = TurnEncoder(AutoTokenizer.from_pretrained(tmp_path / "exported"), None)
    assert encoder.template == TEMPLATES["chatml"]


def test_a_tokenizer_that_adds_bos_itself_can_be_told_not_to(huggingface_folder: Path, tmp_path: Path) -> None:
    known = AutoTokenizer.from_pretrained(str(huggingface_folder))
    known.add_special_tokens({"bos_token": "<bos>"})
    begin_with_bos(known)
    begin_without_bos(known)
    save_tokenizer(known, tmp_path, 128)
    assert (
        AutoTokenizer.from_pretrained(tmp_path)("x")["input_ids"] == known("x", add_special_tokens=False)["input_ids"]
    )
