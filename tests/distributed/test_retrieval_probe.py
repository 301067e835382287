"""The retrieval probe during training: the same numbers in every layout, without any effect on the training."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_meap.trainer.probe_task import build
from tests.conftest import Corpus
from tests.launch import MODEL, TRAINING, Run, launch_many

DEEP = [*MODEL, "--num-layers", "4"]
MOE = "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall"
LAYOUTS = {
    "tp2-sp": "--tensor-model-parallel-size 2 --sequence-parallel",
    "pp2": "--pipeline-model-parallel-size 2",
    "pp2-interleaved": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    "dp2": "",
    "dp2-overlap": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    "ep2": f"{MOE} --expert-model-parallel-size 2",
}
EIGHT_STEPS = "--hidden-dropout 0.1 --attention-dropout 0.1 --train-iters 8 --save-interval 8"
_LINE = re.compile(
    r"retrieval probe at iteration (\d+) \| answer log-probability: (\S+) \| accuracy: (\S+) % .*context: ([\d. ]+) %"
)


def probes(run: Run) -> dict[int, tuple[float, float, list[float]]]:
    """Log-probability, accuracy and accuracy by quarter, by step."""
    return {
        int(step): (float(likelihood), float(accuracy), [float(each) for each in quarters.split()])
        for step, likelihood, accuracy, quarters in _LINE.findall(run.output)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("probe")


@pytest.fixture(scope="module")
def runs(corpus: Corpus, folder: Path) -> dict[str, Run]:
    """Weights of a short training probed in every layout, and trainings with and without the probe."""
    common = [*DEEP, *TRAINING, *corpus.data_flags, "--data-cache-path", str(folder / "cache")]
    frozen = ["--finetune", "--lr", "0", "--min-lr", "0", "--train-iters", "2", "--meap-probe-interval", "1"]

    def still(layout: str = "") -> list[str]:
        initial = folder / ("moe" if "experts" in layout else "dense")
        return [*common, *layout.split(), "--load", str(initial), *frozen]

    def training(*names: str) -> dict[str, list[str]]:
        """Each of them plain, then each with the probe: a hook into Megatron's loop stays with the process."""
        flags = [
            *common,
            *["--hidden-dropout", "0.1", "--attention-dropout", "0.1", "--train-iters", "8", "--save-interval", "8"],
        ]
        probe = ["--meap-probe-interval", "3", "--tensorboard-dir", str(folder / "tensorboard")]
        return {
            f"{name}-{kind}": [*flags, *LAYOUTS.get(name, "").split(), "--save", str(folder / f"{name}-{kind}"), *more]
            for kind, more in (("plain", []), ("probed", probe))
            for name in names
        }

    start = [*common, "--train-iters", "5", "--lr", "1e-2", "--save-interval", "5", "--save"]
    done = launch_many(
        1,
        {"dense": [*start, str(folder / "dense")], "moe": [*start, str(folder / "moe"), *MOE.split()]}
        | {"one": still(), "moe-one": still(MOE)},
        folder,
    )
    done |= launch_many(
        2,
        training("tp2-sp", "dp2-overlap") | {name: still(layout) for name, layout in LAYOUTS.items()},
        folder,
    )
    return done


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_agree(runs: dict[str, Run], name: str) -> None:
    """With the weights of one checkpoint, up to rounding; the two steps change no weight."""
    expected = probes(runs["moe-one" if name == "ep2" else "one"])
    found = probes(runs[name])
    assert sorted(found) == sorted(expected) == [1, 2]
    assert expected[1] == expected[2]
    for step in expected:
        assert found[step][0] == pytest.approx(expected[step][0], abs=2e-5)
        assert found[step][1:] == expected[step][1:]
    assert len(runs[name].steps) == 2


def test_the_export_agrees(runs: dict[str, Run], folder: Path) -> None:
    """The same numbers from the logits of the model that a conversion to Hugging Face gives."""
    from megatron_meap.huggingface.generation import Generator

    generator = Generator(str(folder / "dense"))
    special = {generator.tokenizer.bos_token_id, generator.tokenizer.eos_token_id, generator.mask_id}
    padding = generator.tokenizer.pad_token_id
    ordinary = np.setdiff1d(np.arange(512), [*special, *([] if padding is None else [padding])])
    probe = build(64, ordinary)
    with torch.inference_mode():
        likelihood = generator.model(torch.from_numpy(probe.tokens)).logits.float().log_softmax(dim=-1)
    values, hits = [], []
    for sample, position in np.argwhere(probe.question >= 0):
        right, *others = probe.candidates[sample, probe.question[sample, position]]
        row = likelihood[sample, position]
        values.append(row[right].item())
        hits.append(row[right] > max(row[other] for other in others if other >= 0))
    logged, accuracy, _ = probes(runs["one"])[1]
    assert logged == pytest.approx(np.mean(values), abs=1e-4)
    assert accuracy == pytest.approx(100 * np.mean(hits), abs=0.01)


@pytest.mark.parametrize("name", ["tp2-sp", "dp2-overlap"])
def test_training_does_not_notice(runs: dict[str, Run], folder: Path, name: str) -> None:
    """With dropout: losses digit for digit, weights bit for bit."""
    from megatron_meap.checkpoint.reader import open_checkpoint

    plain, probed = runs[f"{name}-plain"], runs[f"{name}-probed"]
    assert sorted(probes(probed)) == [3, 6]
    assert not probes(plain)
    for value in ("lm loss", "lm loss masked inputs", "grad norm"):
        assert probed.losses(value) == plain.losses(value)
    left, right = (open_checkpoint(folder / f"{name}-{kind}") for kind in ("plain", "probed"))
    assert left.weights() == right.weights() != {}
    for weight in left.weights():
        assert torch.equal(left.read(weight), right.read(weight)), weight


def test_cost_is_logged(runs: dict[str, Run]) -> None:
    lines = [line for line in runs["tp2-sp-probed"].output.splitlines() if "retrieval probe at" in line]
    assert all(re.search(r"cost: \d+\.\d\d % of the training time since the last", line) for line in lines)
    dear = re.search(r"cost: (\S+) % .*above 1 %: advised is --meap-probe-interval (\d+) or more", lines[-1])
    assert dear, "a probe of 16 samples every third step of 8 is dear"
    assert int(dear[2]) == pytest.approx(3 * float(dear[1]), abs=1.1)


def test_tensorboard_gets_the_probe(runs: dict[str, Run], folder: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("retrieval probe/")}
    assert tags == {
        f"retrieval probe/{name}" for name in ("answer log-probability", "accuracy", "share of training time")
    }
    assert {event.step for event in events.Scalars("retrieval probe/accuracy")} == {3, 6}
