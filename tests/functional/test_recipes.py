"""The recipes of examples/pretrain: parsed by the real parser, dry-run for their own number of GPUs, bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_meap.study import grid as grids
from tests import warm
from tests.conftest import Corpus
from tests.launch import ENTRY, MODEL, REPOSITORY, TRAINING, environment
from tests.sft import conversations, write_jsonl

PRETRAIN = REPOSITORY / "examples" / "pretrain"
SHORTER = ["--train-iters", "4", "--lr-warmup-iters", "1", "--save-interval", "2"]  # the index of a short run is small

# What the paper's table says: layers, hidden, heads, FFN, steps, parameters with Llama-2's vocabulary in millions.
PAPER = {
    "0.1b": (12, 768, 12, 2048, 1907, 122.4),
    "0.3b": (24, 1024, 16, 2736, 4768, 324.1),
    "0.5b": (24, 1024, 16, 4864, 10000, 481.0),
    "1.1b": (24, 2048, 32, 5632, 40000, 1175.8),
}

RECIPES = {
    **{f"paper-{size}": ("paper.sh", {"SIZE": size}) for size in PAPER},
    "paper-0.1b-ntp": ("paper.sh", {"SIZE": "0.1b", "MASK_RATIO": "0"}),
    "paper-wsd": ("paper_wsd.sh", {"SIZE": "0.1b", "STEPS": "100", "OPTIMIZER": "muon"}),
    "llama-7b": ("llama_7b.sh", {}),
    "llama-70b": ("llama_70b.sh", {}),
    "long-context": ("long_context.sh", {"CHECKPOINT": "checkpoints"}),
    "continue": ("continue.sh", {"CHECKPOINT": "imported"}),
    "finetune": ("finetune.sh", {"CHECKPOINT": "imported", "DATA": "conversations.jsonl", "TEMPLATE": "vicuna"}),
}

REPORTER = """#!{python}
import json, os, sys
names = ("WORLD_SIZE", "NNODES", "MEAP_DEVICE")
print(json.dumps({{"command": sys.argv, "environment": {{name: os.environ.get(name) for name in names}}}}))
"""


class Desk:
    """A copy of the recipes beside a torchrun and a python that only report what they were asked to run."""

    def __init__(self, folder: Path, corpus: Corpus) -> None:
        self.folder = folder
        shutil.copytree(PRETRAIN, folder / "examples" / "pretrain")
        (folder / "bin").mkdir()
        for name in ("torchrun", "python"):
            (folder / "bin" / name).write_text(REPORTER.format(python=sys.executable))
            (folder / "bin" / name).chmod(0o755)
        (folder / "bin" / "nvidia-smi").write_text("#!/bin/sh\n")  # a node without GPUs, whatever this one has
        (folder / "bin" / "nvidia-smi").chmod(0o755)
        (folder / "imported").mkdir()
        flags = (
            "--num-layers 2 --hidden-size 64 --ffn-hidden-size 160 --num-attention-heads 4 --max-position-embeddings "
            "4096 --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
            f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {corpus.tokenizer} --padded-vocab-size 512"
        )
        (folder / "imported" / "megatron_flags.txt").write_text(flags + "\n")
        write_jsonl(folder / "conversations.jsonl", conversations(corpus.documents, 60, longest=60))
        self.data = {"DATA": corpus.prefix, "TOKENIZER": corpus.tokenizer, "SPLIT": "90,10,0"}

    def run(self, recipe: str, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        return subprocess.run(
            ["bash", str(self.folder / "examples" / "pretrain" / recipe), *flags],
            env={**kept, "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin", **variables},
            cwd=self.folder, text=True, capture_output=True, timeout=60,
        )  # fmt: skip

    def asked(self, recipe: str, *flags: str, **variables: str) -> dict:
        done = self.run(recipe, *flags, **(self.data | variables))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def desk(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("desk"), corpus)


def studies(corpus: Corpus) -> dict[str, list[str]]:
    """The flags of a run of each model of the study's grids, by name."""
    found = {}
    for path in sorted((REPOSITORY / "examples" / "study").glob("*.toml")):
        grid = grids.read(path)
        data = Path(corpus.prefix), [Path(corpus.prefix)] * 3, corpus.tokenizer
        for stage in grid.stages:
            for point in stage.points(dict.fromkeys(grid.objectives, (0.1, 0.1))):
                command = grid.command(point, Path("run"), *data)
                found.setdefault(
                    f"study-{path.stem}-{point.model}", command[command.index("pretrain_gpt_meap.py") + 1 :]
                )
    return found


def without_checkpoint(flags: list[str]) -> list[str]:
    """There is no model of that size to start from here."""
    if "--pretrained-checkpoint" not in flags:
        return flags
    at = flags.index("--pretrained-checkpoint")
    return flags[:at] + flags[at + 2 :]


@pytest.fixture(scope="module")
def results(desk: Desk, corpus: Corpus) -> dict[str, dict]:
    """Arguments and dry run of every recipe and every model of the study, in one process."""
    commands = {}
    for name, (recipe, variables) in RECIPES.items():
        asked = desk.asked(recipe, "--dry-run", **variables)
        assert asked["environment"]["MEAP_DEVICE"] == "cuda"  # a run for GPUs, wherever it is looked at
        flags = without_checkpoint(asked["command"][2:])
        commands[name] = {"world": asked["environment"]["WORLD_SIZE"], "flags": flags, "shorter": SHORTER}
    for name, flags in studies(corpus).items():
        shorter = ["--train-iters", "120", "--save-interval", "2"]
        commands[name] = {"world": "1", "flags": flags, "shorter": shorter}
    listing = desk.folder / "commands.json"
    listing.write_text(json.dumps(commands))
    command = [REPOSITORY / "tests" / "dry_run_many.py", listing]
    done = warm.run(command, environment() | {"MEAP_DEVICE": "cuda"}, desk.folder, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.split("results: ")[-1])


@pytest.mark.parametrize("size", PAPER)
def test_paper_sizes_are_the_papers(results: dict, size: str) -> None:
    layers, hidden, heads, ffn, steps, millions = PAPER[size]
    args = results[f"paper-{size}"]["args"]
    expected = {
        "num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "ffn_hidden_size": ffn,
        "train_iters": steps, "lr_warmup_iters": steps // 10, "num_query_groups": 2, "kv_channels": 64,
        "seq_length": 4096, "rotary_base": 10000, "layernorm_epsilon": 1e-5, "lr": 4e-4, "min_lr": 4e-5,
        "lr_decay_style": "cosine", "weight_decay": 0.05, "adam_beta1": 0.9, "adam_beta2": 0.95, "clip_grad": 1.0,
        "seed": 3407, "bf16": True, "global_batch_size": 256, "meap_mask_ratio": 0.15, "meap_official_init": True,
        "meap_decay_all_parameters": True, "add_bias_linear": False, "untie_embeddings_and_output_weights": True,
    }  # fmt: skip
    assert {key: args[key] for key in expected} == expected
    counted = int(results[f"paper-{size}"]["output"].split()[1].replace(",", ""))
    larger_vocabulary = 2 * (32064 - args["padded_vocab_size"]) * hidden
    assert (counted + larger_vocabulary) / 1e6 == pytest.approx(millions, abs=0.05)


def test_llama_2_tokenizer_and_mask_make_32064_rows(desk: Desk, shared_data: Path) -> None:
    from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding

    asked = desk.asked("paper.sh", "--dry-run")["command"]
    divisible = asked[asked.index("--make-vocab-size-divisible-by") + 1]

    class Args:
        make_vocab_size_divisible_by = int(divisible)
        tensor_model_parallel_size = 1
        rank = 1

    assert vocab_size_with_padding(32001, Args) == 32064


def test_a_twin_differs_in_the_mask_ratio_alone(desk: Desk, results: dict) -> None:
    meap, ntp = (results[name]["args"] for name in ("paper-0.1b", "paper-0.1b-ntp"))
    assert {key for key in meap if meap[key] != ntp[key]} == {"meap_mask_ratio"}
    assert "masks         none" in results["paper-0.1b-ntp"]["output"]
    assert "⟦" not in results["paper-0.1b-ntp"]["output"]
    assert "runs/paper-0.1b-ntp/checkpoints" in desk.asked("paper.sh", MASK_RATIO="0", MEAP_DEVICE="cpu")["command"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_dry_run_shows_the_run(results: dict, desk: Desk, name: str) -> None:
    output = results[name]["output"]
    for heading in ("model", "layout", "batch", "schedule", "validation", "masks", "checkpoint", "data"):
        assert f"\n{heading} " in "\n" + output
    assert output.strip().endswith("nothing was trained or saved")
    assert not (desk.folder / "runs").exists()
    assert ("⟦" in output) == (name != "paper-0.1b-ntp")
    if name == "finetune":
        assert "10% of the tokens of a copy of each answer of more than 50 tokens become [MASK]" in output
        assert "fine-tuning data (train)" in output


def test_the_study_s_grids_can_be_run(results: dict) -> None:
    studied = {name: each for name, each in results.items() if name.startswith("study-")}
    assert len(studied) == 5
    for each in studied.values():
        assert each["output"].strip().endswith("nothing was trained or saved")
    for size in ("0.1b", "0.3b"):
        args = studied[f"study-gpu-paper-{size}"]["args"]
        paper = results[f"paper-{size}"]["args"]
        shape = "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "seq_length"
        assert [args[name] for name in shape] == [paper[name] for name in shape]


def test_branches_of_the_papers_budgets(desk: Desk, results: dict) -> None:
    """The stable run keeps what is branched from; a branch is made first, and then takes its own flags."""
    stable = desk.asked("paper_wsd.sh", "--dry-run")["command"]
    asked = {flag: stable[len(stable) - stable[::-1].index(flag)] for flag in stable if flag.startswith("--meap-")}
    assert (asked["--meap-keep-every"], asked["--meap-data-samples"]) == ("18000", str(60000 * 256))
    assert "muon for matrices (momentum 0.95, spectral scale x 0.2), adam for" in results["paper-wsd"]["output"]
    assert "0.0004 to 4e-05, constant" in results["paper-wsd"]["output"]
    missing = desk.run("paper_wsd.sh", BUDGET="40", **desk.data)
    tool = "tools/branch_run.py runs/paper-wsd-1.1b-meap/checkpoints --at 36000 --decay 4000 --save $RUN"
    assert tool.replace("$RUN", "runs/paper-wsd-1.1b-meap-40b/checkpoints") in missing.stderr
    (desk.folder / "branch" / "checkpoints").mkdir(parents=True)
    flags = desk.folder / "branch" / "checkpoints" / "branch_flags.txt"
    flags.write_text("--train-iters 40000\n")
    assert f"@{flags}" in desk.asked("paper_wsd.sh", "--dry-run", BUDGET="40", RUN=str(flags.parent.parent))["command"]


def test_big_recipes_have_their_layouts(results: dict) -> None:
    args = results["llama-70b"]["args"]
    parts = ("tensor", "pipeline", "context")
    assert [args[f"{part}_{'' if part == 'context' else 'model_'}parallel_size"] for part in parts] == [4, 4, 2]
    assert (args["data_parallel_size"], args["virtual_pipeline_model_parallel_size"]) == (4, 4)
    assert "on 128 GPUs" in results["llama-70b"]["output"]
    assert results["llama-7b"]["args"]["data_parallel_size"] == 16
    assert results["long-context"]["args"]["rotary_base"] == 640000
    assert results["long-context"]["args"]["seq_length"] == 65536


def test_a_dry_run_leaves_nothing_and_refuses_what_the_run_would(corpus: Corpus, tmp_path: Path) -> None:
    flags = [*MODEL, *TRAINING, *corpus.data_flags, "--data-cache-path", str(tmp_path / "cache")]

    def dry_run(*more: str, device: str = "cpu") -> subprocess.CompletedProcess[str]:
        return warm.run([ENTRY, "--dry-run", *flags, *more], environment() | {"MEAP_DEVICE": device}, tmp_path)

    logging = [f"--tensorboard-dir={tmp_path / 'board'}", "--wandb-project", "any", "--save-interval", "5"]
    done = dry_run(*logging, "--save", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    refused = dry_run("--save-interval", "5", "--save", "/dev/null/run")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --save /dev/null/run: cannot be written")
    for device, where in {"cpu": "on 1 CPU process", "auto": "on 1 CPU process", "cuda": "on 1 GPU"}.items():
        if device != "auto" or not torch.cuda.is_available():
            assert where in dry_run(device=device).stdout


def test_torchrun_is_asked_for_the_nodes(desk: Desk) -> None:
    several = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "1234"}
    command = desk.asked("paper.sh", "--train-iters", "5", MEAP_DEVICE="cpu", GPUS_PER_NODE="2", **several)["command"]
    asked = " ".join(command)
    assert "--nnodes 2 --node_rank 1 --master_addr node1 --master_port 1234 --nproc_per_node 2" in asked
    assert "--signals-to-handle SIGTERM,SIGINT,SIGUSR1" in asked
    assert command[-2:] == ["--train-iters", "5"]  # the caller's flags win
    alone = desk.asked("paper.sh", MEAP_DEVICE="cpu", GPUS_PER_NODE="2")["command"]
    assert "--standalone" in alone


def test_a_gpu_recipe_never_trains_on_the_cpu(desk: Desk) -> None:
    """The driver lists GPUs; whether PyTorch can use them is for the ranks to find out, and to refuse."""
    driver = desk.folder / "driver"
    driver.mkdir()
    (driver / "nvidia-smi").write_text("#!/bin/sh\nfor n in 0 1; do echo GPU $n: NVIDIA H100; done\n")
    (driver / "nvidia-smi").chmod(0o755)
    path = f"{driver}:{desk.folder / 'bin'}:/usr/bin:/bin"
    asked = desk.asked("paper.sh", PATH=path, GPUS_PER_NODE="2", FP8="hybrid", FP8_RECIPE="tensorwise")
    assert asked["environment"]["MEAP_DEVICE"] == "cuda"
    words = " ".join(asked["command"])
    assert "--cross-entropy-loss-fusion --fp8-format hybrid --fp8-recipe tensorwise --num-layers 12" in words
    assert desk.asked("paper.sh", MEAP_DEVICE="cpu", GPUS_PER_NODE="2")["environment"]["MEAP_DEVICE"] == "cpu"


@pytest.mark.parametrize(
    "recipe", ["paper.sh", "llama_7b.sh", "llama_70b.sh", "long_context.sh", "continue.sh", "finetune.sh"]
)
def test_every_recipe_honours_the_documented_variables(desk: Desk, recipe: str) -> None:
    asked = {"TRAIN_ITERS": "77", "MICRO_BATCH": "3", "GLOBAL_BATCH": "48", "TP": "2", "PP": "2", "RUN": "runs/mine"}
    asked |= {"CP": "1" if recipe == "finetune.sh" else "2"}
    command = " ".join(desk.asked(recipe, "--dry-run", CHECKPOINT="imported", **asked)["command"])
    for flag in ("--train-iters 77", "--micro-batch-size 3", "--global-batch-size 48", "--save runs/mine/checkpoints"):
        assert f" {flag} " in command + " "
    for name, variable in (("tensor-model", "TP"), ("pipeline-model", "PP"), ("context", "CP")):
        if asked[variable] != "1":
            assert f" --{name}-parallel-size {asked[variable]} " in command + " "


def test_a_variable_that_is_almost_one_of_the_recipe_is_warned_of(desk: Desk) -> None:
    asked = {"TRAIN_ITER": "5", "MICROBATCH": "2", "SLURM_NNODES": "1", "SPLITS": "1"}
    said = desk.run("paper.sh", "--dry-run", **(desk.data | asked)).stderr.splitlines()
    assert [line.partition("mean ")[2] for line in said] == ["MICRO_BATCH?", "SPLIT?", "TRAIN_ITERS?"]


def test_plan_goes_to_the_tool(desk: Desk) -> None:
    asked = desk.asked("llama_70b.sh", "--plan", "--gpu", "h200")
    assert asked["command"][1].endswith("tools/plan_run.py")
    assert "--plan" not in asked["command"]
    assert asked["environment"]["WORLD_SIZE"] == "128"


@pytest.mark.parametrize(
    ("recipe", "variables", "message"),
    [
        ("paper.sh", {}, "error: TOKENIZER is not set"),
        ("paper.sh", {"TOKENIZER": "t.model"}, "error: DATA is not set"),
        ("paper_wsd.sh", {"BUDGET": "30"}, "error: BUDGET=30: must be 20, 40 or 60"),
        ("paper.sh", {"SIZE": "2b"}, "error: SIZE=2b: the paper's sizes are"),
        ("paper.sh", {"TOKENIZER": "t.model", "DATA": "d"}, "has 0 GPUs, the recipe wants GPUS_PER_NODE=8"),
        (
            "llama_70b.sh",
            {"TOKENIZER": "t.model", "DATA": "d", "NNODES": "1"},
            "needs a multiple of 32 GPUs (TP 4 x PP 4 x CP 2), but NNODES 1 x GPUS_PER_NODE 8 is 8",
        ),
        (
            "paper.sh",
            {"TOKENIZER": "t.model", "DATA": "d", "NNODES": "2", "MEAP_DEVICE": "cpu"},
            "error: MASTER_ADDR is not set",
        ),
        ("finetune.sh", {"CP": "2"}, "error: CP=2: packed rows are not cut"),
        ("continue.sh", {}, "error: CHECKPOINT is not set"),
        ("continue.sh", {"CHECKPOINT": "nowhere"}, "CHECKPOINT=nowhere: has no megatron_flags.txt"),
        ("long_context.sh", {}, "error: CHECKPOINT is not set"),
        ("paper.sh", {"TOKENIZER": "t.model", "DATA": "d", "GPUS_PER_NODE": "x"}, "error: GPUS_PER_NODE=x: must be a"),
        (
            "finetune.sh",
            {"TP": "0", "CHECKPOINT": "imported", "DATA": "d"},
            "error: TP=0: must be a whole number above 0",
        ),
    ],
)
def test_bad_input_is_one_line(desk: Desk, recipe: str, variables: dict[str, str], message: str) -> None:
    done = desk.run(recipe, **variables)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
