"""`tools/analyze_attention.py`: a Megatron checkpoint beside the Hugging Face model it comes from, and bad input."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_meap.errors import UsageError
from megatron_meap.evaluation.attention.job import AttentionJob, analyze
from megatron_meap.evaluation.attention.recipe import Recipe
from megatron_meap.huggingface.importer import ImportJob, import_model
from tests import warm
from tests.launch import environment


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, huggingface_folder: Path, corpus: Any) -> Path:
    """A model as Hugging Face directory, as Megatron checkpoint, without a mask token, with another tokenizer."""
    folder = tmp_path_factory.mktemp("attention")
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(huggingface_folder)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer) + 1, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "unmasked")
    tokenizer.save_pretrained(folder / "unmasked")
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    for name in ("model", "other"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    vocabulary = json.loads((folder / "other" / "tokenizer.json").read_text())
    pieces = vocabulary["model"]["vocab"]
    pieces["e"], pieces["t"] = pieces["t"], pieces["e"]
    (folder / "other" / "tokenizer.json").write_text(json.dumps(vocabulary))
    (folder / "text.txt").write_text("\n".join(corpus.documents[:20]))
    import_model(ImportJob(str(folder / "model"), str(folder / "megatron"), check=False))
    return folder


def test_both_kinds_of_models_on_the_same_inputs(folder: Path) -> None:
    """The same weights give the same figures; everything is written."""
    output = folder / "output"
    command = ["tools/analyze_attention.py", "--samples", "3", "--text", str(folder / "text.txt")]
    models = [f"NTP={folder / 'model'}", f"MEAP={folder / 'megatron'}"]
    done = warm.run([*command, *models, "--output", output], environment())
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "NTP: attention on masked positions" in done.stdout
    report = json.loads((output / "attention.json").read_text())
    assert report["settings"]["length"] == 64
    ntp, meap = report["models"]["NTP"], report["models"]["MEAP"]
    for measure, figures in ntp.items():
        assert figures["mean"] == pytest.approx(meap[measure]["mean"], rel=1e-4)
        assert figures["interval"][0] <= figures["mean"] <= figures["interval"][1]
        assert len(figures["by layer"]) == 2
        assert [len(heads) for heads in figures["by layer and head"]] == [4, 4]
    assert report["comparison"]["attention decay"]["value"] == pytest.approx(0.0, abs=1e-3)
    with open(output / "attention.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 8 * (1 + 2 + 2 * 4)
    (cell,) = [
        row
        for row in rows
        if (row["model"], row["measure"], row["layer"], row["head"]) == ("MEAP", "answer mass", "1", "3")
    ]
    assert float(cell["value"]) == meap["answer mass"]["by layer and head"][1][3]
    for picture in ("segments.png", "layers.png", "heads.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match=r"--output .*attention.json: already exists; .* --overwrite"):
        AttentionJob(models, "text.txt", output)


@pytest.mark.parametrize(
    ("models", "more", "message"),
    [
        (["model"], {"recipe": Recipe(65)}, "--length 65: the context of .*/model has only 64 tokens"),
        (["model"], {"recipe": Recipe(0)}, "--length 0: must be at least 2"),
        (["unmasked"], {}, "unmasked: its tokenizer has no mask token"),
        (["model", "other"], {}, ".*/model and .*/other have different tokenizers"),
        (["nothing"], {}, "nothing"),
        (["megatron@7"], {}, "7"),
        (["megatron@all"], {}, "megatron@all: name one iteration"),
        (["model", "model"], {}, "two models are called 'model'; name them: NAME=PATH"),
        (["model"] * 3, {}, "3 models; compare two"),
        (
            ["model"],
            {"recipe": Recipe(samples=2), "output": Path("/dev/null/x")},
            "--output /dev/null/x: cannot be written",
        ),
    ],
)
def test_bad_input_is_one_line(folder: Path, tmp_path: Path, models: list[str], more: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        analyze(
            AttentionJob(
                **{
                    "models": [str(folder / name) for name in models],
                    "text": str(folder / "text.txt"),
                    "output": tmp_path / "output",
                    **more,
                }
            )
        )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "output").exists()
