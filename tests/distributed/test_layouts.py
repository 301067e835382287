"""The same training whatever the layout: real launches on CPU under gloo, all from the same initial weights."""

import itertools

import pytest

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
def runs(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Losses of every layout over 20 steps, and of each run resumed from its own checkpoint of step 10."""
    folder = tmp_path_factory.mktemp("layouts")
    common = [*MODEL, *TRAINING, *corpus.data_flags, "--data-cache-path", str(folder / "cache")]
    initial = str(folder / "initial")
    start = ["--load", initial, "--finetune"]

    def checkpointed(name: str, layout: str) -> dict[str, list[str]]:
        saved = str(folder / name)
        flags = [*common, *layout.split(), "--save", saved, "--save-interval", "10"]
        return {name: [*flags, *start], f"{name}-resumed": [*flags, "--load", saved, "--ckpt-step", "10"]}

    done = launch_many(
        1,
        {"initial": [*common, "--train-iters", "1", "--save", initial, "--save-interval", "1"]}
        | checkpointed("one", ""),
        folder,
    )
    two = [checkpointed(name, layout) for name, layout in LAYOUTS.items()]
    done |= launch_many(2, dict(itertools.chain.from_iterable(each.items() for each in two)), folder)
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


@pytest.mark.parametrize("name", ["one", *LAYOUTS])
def test_resume_gives_the_same_digits(runs: dict[str, Run], name: str) -> None:
    """A run resumed at step 10 logs for steps 11 to 20 what the uninterrupted one logged."""
    resumed, whole = runs[f"{name}-resumed"].steps, runs[name].steps
    assert sorted(resumed) == list(range(11, 21))
    del resumed[12]  # Megatron's second line after a start is the mean of the first two steps
    for step, values in resumed.items():
        for value in ("lm loss", "lm loss masked inputs", "grad norm", "learning rate"):
            assert values[value] == whole[step][value], (step, value)
