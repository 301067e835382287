"""Kinds of models and data in their usual layouts: each matches the same kind in one process."""

import itertools
from pathlib import Path

import pytest

from tests.conftest import Corpus
from tests.launch import MODEL, TRAINING, Run, launch_many

DEEP = "--num-layers 4"
MOE = "--num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type none --moe-token-dispatcher-type"
HYBRID = "--hybrid-layer-pattern"

FEATURES: dict[str, tuple[str, dict[str, str]]] = {
    # name: flags of the feature, and by name those of the layouts with two processes
    "deep": (
        DEEP,
        {
            "interleaved": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
            "uneven-stages": "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1",
            "recompute": "--tensor-model-parallel-size 2 --recompute-granularity full --recompute-method uniform "
            "--recompute-num-layers 1",
            "selective-recompute": "--recompute-granularity selective",
        },
    ),
    "tied": ("", {"tp2": "--tensor-model-parallel-size 2", "pp2": "--pipeline-model-parallel-size 2"}),
    "moe-alltoall": (f"{MOE} alltoall", {"ep2": "--expert-model-parallel-size 2", "dp2": ""}),
    "moe-allgather": (f"{MOE} allgather", {"ep2": "--expert-model-parallel-size 2"}),
    "blend": (  # copies of samples of a blend, masked as BERT does
        "--meap-objective bert --meap-copy-weight 0.4",
        {"dp2": "", "pp2": "--pipeline-model-parallel-size 2"},
    ),
    "documents": (
        "--dataloader-inter-document-masking --meap-objective spans --meap-mask-ratio-min 0.05",
        {
            "dp2": "",
            "tp2": "--tensor-model-parallel-size 2",
            "pp2": "--pipeline-model-parallel-size 2 --micro-batch-size 1",
        },
    ),
    "fim": (  # vocabulary padding is part of the softmax: the same for one and two tensor-parallel ranks
        "--fim-data --fim-rate 0.5 --fim-spm-rate 0.5 --make-vocab-size-divisible-by 64 --meap-objective replace",
        {"dp2": "", "tp2": "--tensor-model-parallel-size 2"},
    ),
    "official": ("--meap-mask-strategy official", {"dp2": ""}),
    "span": ("--meap-mask-strategy span --meap-mask-warmup-samples 100", {"pp2": "--pipeline-model-parallel-size 2"}),
    "mir": (
        "--meap-objective mir",
        {
            "dp2-apart": "--micro-batch-size 1",  # samples on one rank, their copies on the other
            "pp2": "--pipeline-model-parallel-size 2",
            "tp2-sp": "--tensor-model-parallel-size 2 --sequence-parallel",
        },
    ),
    "replace": (
        "--meap-objective replace --meap-mask-strategy bernoulli --meap-noised-share 0.5",
        {"pp2": "--pipeline-model-parallel-size 2", "tp2": "--tensor-model-parallel-size 2"},
    ),
    "muon": (
        "--optimizer muon --muon-fp32-matmul-prec high --muon-tp-mode duplicated",  # on whole matrices in every layout
        {"dp2": "", "tp2-sp": "--tensor-model-parallel-size 2 --sequence-parallel"},
    ),
    "stages": ("", {"dp2": ""}),
    "hybrid": (
        f"{HYBRID} *-*-",
        {
            "tp2-sp": "--tensor-model-parallel-size 2 --sequence-parallel",
            "pp2": f"--pipeline-model-parallel-size 2 {HYBRID} *-|*-",
            "dp2": "--use-distributed-optimizer",
        },
    ),
}
INITIAL = {
    "deep": "deep",
    "tied": "tied",
    "moe-alltoall": "moe",
    "moe-allgather": "moe",
    "fim": "fim",
    "hybrid": "hybrid",
}
"""Whose initial weights: those of the other features are the same "dense" model's."""
WITHOUT_UNTIED = [flag for flag in MODEL if flag != "--untie-embeddings-and-output-weights"]
WITHOUT_LAYERS = MODEL[2:]


@pytest.fixture(scope="module")
def runs(corpus: Corpus, huggingface_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Losses over 8 steps of every feature in one process and in its layouts, from the same initial weights."""
    folder = tmp_path_factory.mktemp("features")
    schedule = [*TRAINING, "--train-iters", "8"]
    one: dict[str, list[str]] = {}
    two: dict[str, list[str]] = {}
    four: dict[str, list[str]] = {}
    for name, (flags, layouts) in FEATURES.items():
        model = {"tied": WITHOUT_UNTIED, "hybrid": WITHOUT_LAYERS}.get(name, MODEL)
        data = corpus.data_flags
        if name == "fim":
            tokens = itertools.chain.from_iterable(
                (f"--fim-{each}-token", f"<{each}>") for each in ("prefix", "middle", "suffix", "pad")
            )
            tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(huggingface_folder)]
            data = [*data, *tokenizer, *tokens, "--fim-eod-token", "<eos>"]
        if name == "blend":
            data = [*data, "--data-path", "0.7", corpus.prefix, "0.3", corpus.second_prefix]
        if name == "stages":  # which change within a global batch
            listed = f"- until: 20 samples\n  blend: {{{corpus.prefix}: 1}}\n- until: 2.5k tokens\n  blend: "
            listed += f"{{{corpus.second_prefix}: 1, {corpus.prefix}: 2}}\n- blend: {{{corpus.second_prefix}: 1}}\n"
            (folder / "stages.yaml").write_text(listed)
            place = data.index("--data-path")
            data = [*data[:place], *data[place + 4 :], "--meap-data-stages", str(folder / "stages.yaml")]
        common = [*model, *schedule, *data, *flags.split(), "--data-cache-path", str(folder / "cache")]
        initial = str(folder / INITIAL.get(name, "dense"))
        start = [*common, "--load", initial, "--finetune"]
        first = [*common, "--train-iters", "1", "--save", initial, "--save-interval", "1"]
        one.setdefault(f"{INITIAL.get(name, 'dense')}-initial", first)
        one[name] = start
        two |= {f"{name}-{layout}": [*start, *extra.split()] for layout, extra in layouts.items()}
        if name == "deep":
            four["deep-tp2-pp2"] = [
                *start, "--tensor-model-parallel-size", "2", "--sequence-parallel",
                "--pipeline-model-parallel-size", "2",
            ]  # fmt: skip
        if name == "muon":  # its matrices shared out over the ranks
            shared = [flag for flag in start if flag != "--fp32"] + ["--bf16", "--use-distributed-optimizer"]
            kept = str(folder / "muon-shared")
            two["muon-shared"] = [*shared, "--save", kept, "--save-interval", "4"]
            two["muon-resumed"] = [
                *(each for each in shared if each != "--finetune"),
                "--load",
                kept,
                "--ckpt-step",
                "4",
            ]
        if name == "hybrid":
            # the same weights as a GPTModel's: its checkpoint continues in the hybrid one
            gpt = str(folder / "deep-for-hybrid")
            whole = [*MODEL, *schedule, *corpus.data_flags, "--data-cache-path", str(folder / "cache"), "--save", gpt]
            whole += ["--save-interval", "4"]
            one["gpt"] = whole
            one["gpt-to-hybrid"] = [*common, "--load", gpt, "--ckpt-step", "4"]
    done = launch_many(1, one, folder)
    done |= launch_many(2, two, folder)
    done |= launch_many(4, four, folder)
    return done


LAYOUTS = [(name, layout) for name, (_, layouts) in FEATURES.items() for layout in layouts] + [("deep", "tp2-pp2")]


@pytest.mark.parametrize(("feature", "layout"), LAYOUTS)
def test_layout_follows_one_process(runs: dict[str, Run], feature: str, layout: str) -> None:
    one, other = runs[feature], runs[f"{feature}-{layout}"]
    assert len(one.steps) == 8
    for value in ("lm loss", "lm loss masked inputs", "lm loss clean inputs"):
        assert other.losses(value) == pytest.approx(one.losses(value), abs=1e-4)


def test_features_are_really_on(runs: dict[str, Run]) -> None:
    """Every feature gives other losses than the others."""
    last = {name: runs[name].losses()[-1] for name in FEATURES if name != "moe-allgather"}  # the same mathematics
    assert len(set(last.values())) == len(last), last
    assert all(runs[name].losses()[-1] < runs[name].losses()[0] for name in FEATURES)


@pytest.mark.parametrize("run", ["mir", "mir-dp2-apart", "blend", "blend-dp2"])
def test_the_loss_of_copies_counts_its_weight(runs: dict[str, Run], run: str) -> None:
    names = ("lm loss", "lm loss clean samples", "lm loss noised copies")
    for loss, clean, copies in zip(*map(runs[run].losses, names), strict=True):
        assert loss == pytest.approx(clean + 0.4 * copies, abs=1e-4)


def test_a_gpt_checkpoint_continues_in_a_hybrid_model(runs: dict[str, Run]) -> None:
    whole, continued = runs["gpt"].steps, runs["gpt-to-hybrid"].steps
    assert sorted(continued) == [5, 6, 7, 8]
    for step in (5, 6, 7, 8):
        assert continued[step]["lm loss"] == pytest.approx(whole[step]["lm loss"], abs=1e-4)


def test_muon_is_resumed_exactly_with_its_matrices_shared_out(runs: dict[str, Run]) -> None:
    whole, resumed = runs["muon-shared"], runs["muon-resumed"]
    assert whole.losses() == pytest.approx(runs["muon"].losses(), abs=0.02)  # bf16
    assert sorted(resumed.steps) == [5, 6, 7, 8]
    for step in (5, 7, 8):  # Megatron's second line after a start is the mean of two steps
        assert resumed.steps[step]["lm loss"] == whole.steps[step]["lm loss"]
        assert resumed.steps[step]["grad norm"] == whole.steps[step]["grad norm"]


def test_the_deprecation_of_gptmodel_stays_out_of_the_log(runs: dict[str, Run]) -> None:
    assert "DEPRECATED" not in runs["deep"].output
