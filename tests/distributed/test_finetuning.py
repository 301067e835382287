"""Real launches of fine-tuning: layouts, packing, resumption and baselines of `--meap-sft`."""

import re

import pytest

from megatron_meap.sft import data
from tests.conftest import Corpus
from tests.launch import MODEL, TRAINING, Run, launch_many
from tests.sft import conversations, prepare, write_jsonl

LAYOUTS = {
    "tp2": ["--tensor-model-parallel-size", "2"],
    "tp2-sp": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "pp2": ["--pipeline-model-parallel-size", "2", "--micro-batch-size", "1"],
    "dp2": [],
}
LENGTH = ["--seq-length", "256", "--max-position-embeddings", "256"]
STANDING_STILL = ["--lr", "0", "--min-lr", "0", "--weight-decay", "0", "--train-iters", "1"]


@pytest.fixture(scope="module")
def runs(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Pretrain for a few steps, then fine-tune from there in many ways."""
    folder = tmp_path_factory.mktemp("finetuning")
    path = write_jsonl(folder / "train.jsonl", conversations(corpus.documents, 60, longest=8))
    pretrained = str(folder / "pretrained")
    common = [*MODEL, *LENGTH, *TRAINING, "--train-iters", "4", "--make-vocab-size-divisible-by", "64"]
    base = [*common, *corpus.data_flags, "--train-iters", "8", "--lr", "1e-2", "--save", pretrained]
    base += ["--save-interval", "8"]
    tokenizer = corpus.data_flags[: corpus.data_flags.index("--data-path")]
    sft = [*common, *tokenizer, "--num-workers", "0", "--meap-sft", "--meap-sft-template", "chatml"]
    sft += ["--meap-sft-threshold", "10", "--meap-mask-ratio", "0.2", "--train-data-path", str(path)]
    start = [*sft, "--pretrained-checkpoint", pretrained]
    valid = ["--valid-data-path", str(path), "--eval-iters", "2", "--eval-interval", "2"]
    saved = ["--save", str(folder / "saved"), "--load", str(folder / "saved"), "--save-interval", "2"]
    one = {
        "pretraining": base,
        "one": start,
        "workers": [*start, "--num-workers", "2"],
        "validated": [*start, *valid],
        "ntp": [*start, "--meap-mask-ratio", "0"],
        "ntp-equal": [*start, "--meap-mask-ratio", "0", "--meap-sft-ntp-budget", "equal"],
        "concat": [*start, "--meap-sft-rows", "concat"],
        "combined": [*start, "--meap-sft-combined-loss"],
        "stopped": [*start, *saved, "--exit-interval", "2"],
    }
    for name, flags in {"packed": [], "unpacked": ["--meap-sft-no-packing"]}.items():
        # the whole epoch in one step: its loss is the mean over all labels, however they are packed
        (epoch,) = (each for each in data.datasets(prepare(*sft, *flags), [None] * 3) if each is not None)
        one[name] = [*start, *flags, *STANDING_STILL, "--micro-batch-size", "1", "--global-batch-size", str(len(epoch))]
    done = launch_many(1, one, folder)
    two = {name: [*start, *flags] for name, flags in LAYOUTS.items()}
    two["resumed-dp2"] = [*start, *saved]
    return done | launch_many(2, two, folder)


def len_of_epoch(run: Run) -> int:
    """Samples of an epoch, as the log says."""
    return int(re.search(r"an epoch is (\d+) samples", run.output)[1])


def rows_of(run: Run) -> int:
    """Rows of an epoch, as the log says."""
    return int(re.search(r"(\d+) rows, (\d+) of them with masks", run.output)[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_follows_one_process(runs: dict[str, Run], layout: str) -> None:
    one, other = runs["one"], runs[layout]
    assert len(one.steps) == 4
    for value in ("lm loss", "lm loss masked answers", "lm loss clean answers", "grad norm"):
        assert other.losses(value) == pytest.approx(one.losses(value), abs=1e-4), value


def test_data_workers_change_nothing(runs: dict[str, Run]) -> None:
    assert runs["workers"].losses() == runs["one"].losses()


def test_resumes_in_another_layout(runs: dict[str, Run]) -> None:
    assert sorted(runs["stopped"].steps) == [1, 2]
    resumed = runs["resumed-dp2"].steps
    assert sorted(resumed) == [3, 4]
    assert resumed[3]["lm loss"] == pytest.approx(runs["one"].steps[3]["lm loss"], abs=1e-4)


def test_packing_does_not_change_the_loss(runs: dict[str, Run]) -> None:
    packed, unpacked = runs["packed"], runs["unpacked"]
    assert len_of_epoch(packed) * 1.5 < len_of_epoch(unpacked)
    for value in ("lm loss", "lm loss masked answers", "lm loss clean answers", "grad norm"):
        assert packed.losses(value) == pytest.approx(unpacked.losses(value), abs=1e-5), value


def test_starts_from_the_pretrained_model(runs: dict[str, Run]) -> None:
    """After some steps of pretraining the loss is below that of the uniform guess among 512 pieces, 6.24."""
    assert runs["ntp"].losses()[0] < 6.0


def test_options_train_something_else(runs: dict[str, Run]) -> None:
    names = ["one", "ntp", "ntp-equal", "concat", "combined"]
    assert len({runs[name].losses()[-1] for name in names}) == len(names)
    assert rows_of(runs["one"]) == rows_of(runs["ntp-equal"]) > rows_of(runs["ntp"])
    assert "lm loss masked answers" not in runs["ntp"].steps[1]


def test_validation_is_clean_and_separate(runs: dict[str, Run]) -> None:
    run = runs["validated"]
    assert "fine-tuning data (valid)" in run.output
    assert len(re.findall(r"validation loss at iteration \d+ \| lm loss value", run.output)) >= 1
    assert run.losses() == runs["one"].losses()
