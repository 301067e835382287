"""Conversion through the command line and through real training runs in several layouts."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_meap.checkpoint.reader import open_checkpoint
from megatron_meap.huggingface import megatron_model
from megatron_meap.huggingface.export import ExportJob, export
from megatron_meap.huggingface.generation import Generator, Sampling
from megatron_meap.huggingface.importer import ImportJob, import_model
from tests import warm
from tests.conftest import REPOSITORY, Corpus
from tests.launch import MODEL, TRAINING, Run, environment, launch_many

ONE_STEP = ["--train-iters", "1", "--save-interval", "1", "--eval-iters", "0"]
STANDING_STILL = [*ONE_STEP, "--lr", "0", "--min-lr", "0", "--weight-decay", "0"]


def convert(*flags: str) -> subprocess.CompletedProcess[str]:
    """One call of the tool."""
    return warm.run([REPOSITORY / "tools" / "convert_checkpoint.py", *flags], environment())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where everything is made."""
    return tmp_path_factory.mktemp("convert")


@pytest.fixture(scope="module")
def original(work: Path, huggingface_folder: Path) -> Path:
    """A random Llama in bf16, four layers for two pipeline stages of two."""
    tokenizer = AutoTokenizer.from_pretrained(str(huggingface_folder))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(work / "original")
    tokenizer.save_pretrained(work / "original")
    return work / "original"


@pytest.fixture(scope="module")
def runs(work: Path, original: Path, corpus: Corpus) -> dict[str, Run]:
    """Training in TP 2, and the imported model through TP 2, PP 2 and interleaved PP 2, each saving what it loaded."""
    import_model(ImportJob(str(original), str(work / "imported")))
    flags = shlex.split((work / "imported" / "megatron_flags.txt").read_text())
    still = [*flags, *TRAINING, *STANDING_STILL, "--seq-length", "64", "--mock-data", "--bf16"]
    still.remove("--fp32")
    tp, pp = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
    interleaved = [*pp, "--num-layers-per-virtual-pipeline-stage", "1"]

    def passing(source: str, target: str, layout: list[str]) -> list[str]:
        return [*still, *layout, "--pretrained-checkpoint", str(work / source), "--save", str(work / target)]

    return launch_many(
        2,
        {
            "trained-tp2": [
                *MODEL, *TRAINING, *corpus.data_flags, *tp, "--sequence-parallel", "--add-qkv-bias",
                "--train-iters", "8", "--save", str(work / "trained-tp2"), "--save-interval", "8",
            ],
            "tp2": passing("imported", "tp2", tp),
            "pp2": passing("tp2", "pp2", pp),
            "pp2-interleaved": passing("pp2", "pp2-interleaved", [*interleaved, "--use-distributed-optimizer"]),
        },
        work,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["tp2", "pp2", "pp2-interleaved"])
def test_round_trip_through_layouts_is_bit_equal(runs: dict[str, Run], work: Path, original: Path, name: str) -> None:
    """Imported, loaded and saved by TP 2, then by PP 2, then interleaved, and exported: the same bits."""
    export(ExportJob(str(work / name), str(work / f"exported-{name}")))
    before, after = (load_file(folder / "model.safetensors") for folder in (original, work / f"exported-{name}"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype == torch.bfloat16
        assert torch.equal(tensor, after[key][: len(tensor)])


def test_trained_in_tp2_then_exported_has_megatrons_logits(runs: dict[str, Run], work: Path, corpus: Corpus) -> None:
    """On a real text, within 1e-4 in fp32, with biases on Q, K and V.

    With a SentencePiece tokenizer it is exported as a Llama: for a Qwen2 transformers would take Qwen2's tokenizer.
    """
    losses = runs["trained-tp2"].losses()
    assert losses[-1] < losses[0]
    done = convert("export", "--load", str(work / "trained-tp2"), "--output", str(work / "trained"))
    assert done.returncode == 0, done.stderr
    assert "largest difference of the logits" in done.stdout
    assert "peak memory" in done.stdout
    assert done.stderr == ""
    model = AutoModelForCausalLM.from_pretrained(work / "trained").eval()
    tokenizer = AutoTokenizer.from_pretrained(work / "trained")
    assert model.config.model_type == "llama"
    tokens = torch.tensor([tokenizer(corpus.documents[0])["input_ids"][:64]])
    with torch.inference_mode():
        theirs = model(tokens).logits
    with megatron_model.one_process():
        ours, _ = megatron_model.load(open_checkpoint(work / "trained-tp2").directory, torch.float32)
        expected = megatron_model.logits(ours, tokens)
    torch.testing.assert_close(theirs, expected[..., : len(tokenizer)], rtol=0, atol=1e-4)
    card = (work / "trained" / "README.md").read_text()
    assert "| MEAP mask ratio | 0.15 |" in card
    assert f"| Tokens seen | {8 * 8 * 64:,} |" in card


def test_trained_model_generates_the_same_text_before_and_after(runs: dict[str, Run], work: Path) -> None:
    """`tools/generate.py` on the Megatron checkpoint, and its export in Python: the same text."""
    command = [REPOSITORY / "tools" / "generate.py", "--load", work / "trained-tp2"]
    command += ["--prompt", "The class", "--prompt", "[MASK] is", "--max-new-tokens", "12", "--seed", "3"]
    done = warm.run(command, environment())
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    export(ExportJob(str(work / "trained-tp2"), str(work / "to-generate"), check=False))
    exported = Generator(str(work / "to-generate"))
    texts = [exported.generate(prompt, Sampling(12, seed=3)) for prompt in ("The class", "[MASK] is")]
    assert texts[0].startswith("The class")
    assert texts[1].startswith("[MASK] is")
    assert done.stdout == "".join(text + "\n" for text in texts)


def test_tool_refuses_in_one_line(work: Path) -> None:
    """A directory that is not a checkpoint: status 2, one line, no traceback."""
    done = convert("export", "--load", str(work), "--output", str(work / "nothing"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (work / "nothing").exists()


@pytest.mark.slow
def test_peak_memory_is_the_weights_and_one_layer(work: Path, huggingface_folder: Path) -> None:
    """As the tool prints it, for weights large enough to stand out from everything else."""
    tokenizer = AutoTokenizer.from_pretrained(str(huggingface_folder))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=1024, intermediate_size=2816, num_hidden_layers=20,
        num_attention_heads=16, num_key_value_heads=4,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(work / "large")
    tokenizer.save_pretrained(work / "large")
    assert (
        convert("import", "--load", str(work / "large"), "--output", str(work / "large-m"), "--no-check").returncode
        == 0
    )
    done = convert("export", "--load", str(work / "large-m"), "--output", str(work / "large-e"), "--no-check")
    weights, peak = (float(re.search(text, done.stdout)[1]) for text in (r"([\d.]+) MB in", r"(\d+) MB of it"))
    assert weights > 400
    assert peak < weights + weights / 20 + 20  # and what Python itself needs
