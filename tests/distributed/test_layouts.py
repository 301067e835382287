"""The training is the same in every layout: real launches on CPU with gloo, all from the same initial weights."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_meap.trainer.output import LOG
from tests.conftest import Corpus
from tests.launch import MODEL, TRAINING, Run, launch_many

LAYOUTS = {
    "tp2": "--tensor-model-parallel-size 2",
    "tp2-sp": "--tensor-model-parallel-size 2 --sequence-parallel",
    "pp2": "--pipeline-model-parallel-size 2",
    "dp2": "",
    "dp2-distributed-optimizer": "--use-distributed-optimizer",
}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def runs(corpus: Corpus, folder: Path) -> dict[str, Run]:
    """Losses of every layout over 20 steps, and of each run resumed from its own checkpoint of step 10."""
    common = [*MODEL, *TRAINING, *corpus.data_flags, "--data-cache-path", str(folder / "cache")]
    initial = str(folder / "initial")
    start = ["--load", initial, "--finetune"]

    def checkpointed(name: str, layout: str) -> dict[str, list[str]]:
        saved = str(folder / name)
        flags = [*common, *layout.split(), "--save", saved, "--save-interval", "10", "--eval-iters", "1"]
        return {name: [*flags, *start], f"{name}-resumed": [*flags, "--load", saved, "--ckpt-step", "10"]}

    def bf16(name: str, layout: str) -> dict[str, list[str]]:
        narrow = [*[flag for flag in common if flag != "--fp32"], "--bf16", *start, *layout.split()]
        return {name: [*narrow, "--save", str(folder / name), "--save-interval", "20"]}

    done = launch_many(
        1,
        {"initial": [*common, "--train-iters", "1", "--save", initial, "--save-interval", "1"]}
        | checkpointed("one", "")
        | bf16("one-bf16", ""),
        folder,
    )
    two = [checkpointed(name, layout) for name, layout in LAYOUTS.items()]
    whole = dict(itertools.chain.from_iterable(each.items() for each in two))
    whole["pp2"] += ["--tensorboard-dir", str(folder / "tensorboard"), "--meap-peak-tflops", "0.5"]
    whole |= bf16("tp2-bf16", LAYOUTS["tp2-sp"])
    done |= launch_many(2, whole, folder)
    return done


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("value", ["lm loss", "lm loss masked inputs", "lm loss clean inputs", "grad norm"])
def test_layout_follows_one_process(runs: dict[str, Run], name: str, value: str) -> None:
    """The layout changes neither the masks nor the mathematics."""
    one = runs["one"].losses(value)
    assert len(one) == 20
    assert one[-1] < one[0] or value == "grad norm"
    # the gradient norm is logged with three decimals
    assert runs[name].losses(value) == pytest.approx(one, abs=1e-3 if value == "grad norm" else TOLERANCE)


def embedding_norms(run: Run) -> list[tuple[float, float]]:
    """Norm of the mask token's embedding and mean norm of the others, by step."""
    names = ("embedding norm mask token", "embedding norm mean of the others")
    return list(zip(*map(run.losses, names), strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_norms_of_the_embeddings_are_those_of_one_process(runs: dict[str, Run], name: str) -> None:
    """Its row is on one rank of a vocabulary that is split, and the log on the last pipeline stage."""
    one = np.array(embedding_norms(runs["one"]))
    assert one.shape == (20, 2)
    assert np.ptp(one[:, 0]) > 10 * TOLERANCE  # it is learned
    np.testing.assert_allclose(embedding_norms(runs[name]), one, atol=TOLERANCE)


@pytest.mark.parametrize("name", LAYOUTS)
def test_bits_per_byte_are_those_of_one_process(runs: dict[str, Run], name: str) -> None:
    """They are as many bits as the loss says, over a few bytes a token."""
    one, other = (
        re.findall(r"lm loss value: (\S+) .* bits per byte value: (\S+) \| $", runs[each].output, re.MULTILINE)
        for each in ("one", name)
    )
    (loss, bits), (other_loss, other_bits) = (map(float, each[-1]) for each in (one, other))
    assert (other_loss, other_bits) == pytest.approx((loss, bits), abs=TOLERANCE)
    assert 1.2 < loss / math.log(2) / bits < 2.5


def test_the_log_says_how_fast(runs: dict[str, Run]) -> None:
    """A step has 8 samples of 64 tokens, on two ranks."""
    for values in runs["pp2"].steps.values():
        seconds = values["elapsed time per iteration (ms)"] / 1000
        assert values["tokens/s"] == pytest.approx(8 * 64 / seconds, rel=0.01)
        assert values["tokens/s/rank"] == pytest.approx(values["tokens/s"] / 2, rel=0.001)
        assert values["MFU (%)"] == pytest.approx(100 * values["model TFLOP/s/rank"] / 0.5, rel=0.001)
    assert "MFU (%)" not in runs["dp2"].steps[20]
    assert runs["pp2"].output.count(" ETA: 0:0") == 19


@pytest.mark.parametrize("name", ["one", *LAYOUTS])
def test_resume_gives_the_same_digits(runs: dict[str, Run], name: str) -> None:
    """A run resumed at step 10 logs for steps 11 to 20 what the uninterrupted one logged."""
    resumed, whole = runs[f"{name}-resumed"].steps, runs[name].steps
    assert sorted(resumed) == list(range(11, 21))
    for step, values in resumed.items():
        for value in ("lm loss", "lm loss masked inputs", "grad norm", "learning rate"):
            assert values[value] == whole[step][value], (step, value)


@pytest.mark.parametrize("name", ["one-bf16", "tp2-bf16"])
def test_bf16_follows_fp32(runs: dict[str, Run], folder: Path, name: str) -> None:
    """Within the precision of bf16, in which a loss near 6 has steps of 0.03; it is computed in fp32."""
    assert "using torch.bfloat16 for parameters" in (folder / name / LOG).read_text()
    assert runs[name].losses() == pytest.approx(runs["one"].losses(), abs=0.03)
    assert runs[name].losses() != runs["one"].losses()


def test_tensorboard_gets_the_losses(runs: dict[str, Run], folder: Path) -> None:
    """From the last pipeline stage, which has no tokens of its own."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for name in ("embedding norm/mask token", "tokens/s", "MFU (%)", "noised inputs"):
        assert len(events.Scalars(name)) == 20
    assert len(events.Scalars("bits per byte validation")) == 1
    for name in ("lm loss", "lm loss masked inputs", "lm loss clean inputs"):
        written = {event.step: event.value for event in events.Scalars(name)}
        logged = {step: values[name] for step, values in runs["pp2"].steps.items()}
        assert written == pytest.approx(logged, abs=1e-5)
