"""Training with Transformer Engine's Python code and Megatron's modules for it, with PyTorch for its kernels.

Every run starts from one checkpoint of the local layers, and has to log what the local layers log in one process.
"""

import re

import pytest

from tests.conftest import Corpus
from tests.launch import MODEL, TRAINING, Run, launch_many
from tests.sft import conversations, write_jsonl
from tests.te_stub.on_cpu import SITE

pytestmark = pytest.mark.skipif(
    not (SITE / "transformer_engine").is_dir(), reason=f"Transformer Engine's Python is not in {SITE} (on_cpu.py)"
)

LOCAL = ["--transformer-impl", "local"]
DEEP = ["--num-layers", "4"]
PIPELINE = ["--pipeline-model-parallel-size", "2"]
FEATURES: dict[str, tuple[list[str], dict[str, list[str]]]] = {
    # name: flags of local and Transformer Engine's layers alike, and by name those of layouts with two processes
    "plain": (
        DEEP,
        {
            "tp2-sp": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
            "pp2": PIPELINE,
            "interleaved": [*PIPELINE, "--num-layers-per-virtual-pipeline-stage", "1"],
            "dp2": ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"],
        },
    ),
    "recomputed": (
        [*DEEP, "--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"],
        {},
    ),
    "fused-loss": ([*DEEP, "--cross-entropy-loss-fusion"], {}),
    "documents": ([*DEEP, "--dataloader-inter-document-masking"], {}),
    "mtp": ([*DEEP, "--mtp-num-layers", "1"], {}),
    "reset": ([*DEEP, "--reset-attention-mask"], {}),
    "probe": ([*DEEP, "--meap-probe-interval", "2"], {}),
    "evaluated": ([*DEEP, "--eval-interval", "2", "--eval-iters", "2", "--split", "8,2,0"], {}),
    "finetuned": (
        [*DEEP, "--meap-sft", "--meap-sft-template", "chatml", "--meap-sft-threshold", "10", "--num-workers", "0"],
        {"tp2": ["--tensor-model-parallel-size", "2"], "pp2": [*PIPELINE, "--micro-batch-size", "1"]},
    ),
}
OPTIMIZERS = {
    "plain": [],
    "distributed": ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"],
}
VALUES = ("lm loss", "lm loss masked inputs", "lm loss clean inputs")


@pytest.fixture(scope="module")
def runs(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Losses over 4 steps, of both kinds of layers in one process and of Transformer Engine's in two."""
    folder = tmp_path_factory.mktemp("te")
    model = [*MODEL, *TRAINING, "--train-iters", "4", "--make-vocab-size-divisible-by", "64"]
    common = [*model, *corpus.data_flags, "--data-cache-path", str(folder / "cache")]
    texts = write_jsonl(folder / "conversations.jsonl", conversations(corpus.documents, 60, longest=8))
    asked = [*model, *corpus.data_flags[: corpus.data_flags.index("--data-path")], "--train-data-path", str(texts)]
    asked += ["--seq-length", "256", "--max-position-embeddings", "256"]
    one: dict[str, list[str]] = {}
    two: dict[str, list[str]] = {}
    for name, (flags, layouts) in FEATURES.items():
        initial = str(folder / ("mtp" if name == "mtp" else "plain"))
        start = [*common, *flags, "--load", initial, "--finetune"]
        if name == "finetuned":
            start = [*asked, *flags, "--pretrained-checkpoint", initial]
        if name in ("plain", "mtp"):
            first = ["--train-iters", "1", "--save", initial, "--save-interval", "1"]
            one[f"{name}-initial"] = [*common, *flags, *first, *LOCAL]
        one[f"{name}-local"] = [*start, *LOCAL]
        one[name] = start
        two |= {f"{name}-{layout}": [*start, *extra] for layout, extra in layouts.items()}
    for name, optimizer in OPTIMIZERS.items():
        for kind, other in (([], LOCAL), (LOCAL, [])):
            save = ["--save", str(folder / f"{name}{len(kind)}"), "--save-interval", "2"]
            label = f"{name}-{'local' if kind else 'te'}"
            start = [*common, *DEEP, *optimizer]
            begin = ["--load", str(folder / "plain"), "--finetune", "--exit-interval", "2"]
            one[f"{label}-first"] = [*start, *begin, *save, *kind]
            one[f"{label}-changed"] = [*start, "--load", save[1], *other]
    done = launch_many(1, one, folder, script="te_stub/run_many.py", warm=False)
    return done | launch_many(2, two, folder, script="te_stub/run_many.py", warm=False)


LAYOUTS = [(name, "") for name in FEATURES] + [
    (name, f"-{layout}") for name, (_, layouts) in FEATURES.items() for layout in layouts
]


@pytest.mark.parametrize(("feature", "layout"), LAYOUTS)
def test_it_follows_the_local_layers(runs: dict[str, Run], feature: str, layout: str) -> None:
    local, engine = runs[f"{feature}-local"], runs[f"{feature}{layout}"]
    assert len(local.steps) == 4
    values = {value for step in local.steps.values() for value in step if value.startswith("lm loss")}
    assert values >= {"lm loss masked answers"} if feature == "finetuned" else values == set(VALUES)
    for value in values:
        assert engine.losses(value) == pytest.approx(local.losses(value), abs=1e-4)


def test_the_evaluation_agrees(runs: dict[str, Run]) -> None:
    found = {}
    for name in ("evaluated-local", "evaluated"):
        said = re.findall(r"validation loss at iteration \d+ .*?lm loss value: (\S+)", runs[name].output)
        found[name] = [float(value) for value in said]
    assert len(found["evaluated"]) == 3  # at steps 2 and 4, and at the end
    assert found["evaluated"] == pytest.approx(found["evaluated-local"], abs=1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("first", ["local", "te"])
def test_a_run_continues_with_the_other_layers(runs: dict[str, Run], optimizer: str, first: str) -> None:
    changed = runs[f"{optimizer}-{first}-changed"]
    assert sorted(changed.steps) == [3, 4]
    assert "warning" in changed.output
    for value in VALUES:
        whole = runs["plain-local"].losses(value)
        assert changed.losses(value)[0] == pytest.approx(whole[2], abs=1e-4)


def test_its_layers_were_used(runs: dict[str, Run]) -> None:
    """Each run says which layers it has; and the stub was called."""
    for name, run in runs.items():
        is_local = name.endswith(("-local", "-initial", "-local-first", "-te-changed"))
        assert ("local layers" if is_local else "Transformer Engine") in run.output, name
    assert any("'generic_gemm'" in run.output for run in runs.values())


def test_features_are_really_on(runs: dict[str, Run]) -> None:
    """Those that change the mathematics, in Transformer Engine's layers."""
    last = {name: runs[name].losses()[-1] for name in ("plain", "reset", "mtp")}
    assert len(set(last.values())) == len(last), last
    assert runs["documents"].losses() == pytest.approx(runs["reset"].losses(), abs=1e-4)  # two ways to say the same
