"""Plans, compared with the memory of real runs, measured independently, and with FLOPs counted by PyTorch."""

import json
from pathlib import Path

import pytest

from tests import warm
from tests.conftest import Corpus
from tests.launch import REPOSITORY, environment, run_ranks

MODEL = (
    "--num-layers 4 --hidden-size 128 --num-attention-heads 8 --group-query-attention --num-query-groups 2 "
    "--ffn-hidden-size 320 --seq-length 128 --max-position-embeddings 128 --position-embedding-type rope "
    "--normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights "
    "--attention-dropout 0 --hidden-dropout 0 --micro-batch-size 2 --global-batch-size 16 --train-iters 2 "
    "--lr 1e-3 --eval-iters 0 --make-vocab-size-divisible-by 64 --num-workers 0"
)

RUNS: dict[str, tuple[int, str]] = {
    "fp32": (1, "--fp32"),
    "bf16": (1, "--bf16"),
    "full": (1, "--bf16 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    "selective": (1, "--fp32 --recompute-granularity selective --recompute-modules mlp core_attn"),
    "tied": (1, "--bf16"),
    "dp2": (2, "--bf16 --use-distributed-optimizer"),
    "muon": (1, "--bf16 --optimizer muon"),
    "tp2": (2, "--bf16 --tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--fp32 --pipeline-model-parallel-size 2"),
    "pp2-interleaved": (2, "--bf16 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
}


def flags_of(name: str, corpus: Corpus, folder: Path) -> list[str]:
    model = [flag for flag in MODEL.split() if name != "tied" or flag != "--untie-embeddings-and-output-weights"]
    return [*model, *corpus.data_flags, "--data-cache-path", str(folder / "cache"), *RUNS[name][1].split()]


def plan_all(runs: dict[str, tuple[int, list[str]]], folder: Path, **more: str) -> dict:
    listing = folder / "plans.json"
    listing.write_text(json.dumps(runs))
    done = warm.run([REPOSITORY / "tests" / "plan_many.py", listing], environment() | more)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.split("plans: ")[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planning")


@pytest.fixture(scope="module")
def measured(corpus: Corpus, folder: Path) -> dict[str, list[dict[str, int]]]:
    """What every rank of every run has, by rank."""
    found: dict[str, list[dict[str, int]]] = {}
    for world in (1, 2):
        here = folder / str(world)
        here.mkdir()
        runs = {name: flags_of(name, corpus, folder) for name, (size, _) in RUNS.items() if size == world}
        runs[next(iter(runs))] += ["--save", str(here / "saved"), "--save-interval", "2"]
        (here / "runs.json").write_text(json.dumps(runs))
        run_ranks(world, str(REPOSITORY / "tests" / "measure_many.py"), str(here / "runs.json"))
        ranks = [json.loads((here / f"measured-{rank}.json").read_text()) for rank in range(world)]
        found |= {name: [rank[name] for rank in ranks] for name in runs}
    return found


@pytest.fixture(scope="module")
def planned(corpus: Corpus, folder: Path) -> dict:
    return plan_all({name: (world, flags_of(name, corpus, folder)) for name, (world, _) in RUNS.items()}, folder)


@pytest.mark.parametrize("name", RUNS)
def test_memory_is_as_measured(measured: dict, planned: dict, name: str) -> None:
    """Weights, gradients, optimizer state and activations of every rank, each within 5%; parameters exactly."""
    stages = planned[name]["stages"]
    for rank, real in enumerate(measured[name]):
        stage = stages[rank if len(stages) > 1 else 0]
        assert stage["parameters"] == real["parameters"]
        for kind in ("weights", "gradients", "optimizer"):
            assert stage[kind] == pytest.approx(real[kind], rel=0.05), (rank, kind)
        assert stage["activations"] + stage["loss"] == pytest.approx(real["kept"], rel=0.05), rank


def test_a_checkpoint_has_the_planned_size(measured: dict, planned: dict, folder: Path) -> None:
    for world, name in ((1, "fp32"), (2, "dp2")):
        files = (folder / str(world) / "saved" / "iter_0000002").glob("*.distcp")
        assert sum(file.stat().st_size for file in files) == pytest.approx(planned[name]["checkpoint"], rel=0.05)
