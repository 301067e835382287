"""Every way to save an optimizer, stopped at a random step and resumed: the same bits, or 1e-4 in another layout.

    python -m pytest -m "" -s tests/distributed/test_resume_matrix.py

runs all of it and prints the table of docs/training.md; without `-m ""` it runs what has been wrong once.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_meap.checkpoint.reader import open_checkpoint
from tests.conftest import Corpus
from tests.launch import MODEL, TRAINING, Run, launch_many

STEPS = 8
FLAT, RESHARDABLE = "", "--dist-ckpt-optim-fully-reshardable"
OPTIMIZERS = {
    "plain": "",
    "distributed": "--use-distributed-optimizer",
    "distributed, 5 padded buckets": "--use-distributed-optimizer --overlap-grad-reduce --ddp-num-buckets 5",
}
CELLS = [(name, layout) for name in OPTIMIZERS for layout in ([FLAT] if name == "plain" else [FLAT, RESHARDABLE])]
LABELS = {FLAT: "default", RESHARDABLE: "fully reshardable"}
QUICK = (3, "fp32")


class Matrix:
    """Runs all cells of one number of processes and one precision, and compares what they end with."""

    def __init__(self, corpus: Corpus, folder: Path, ranks: int, precision: str) -> None:
        self.corpus, self.folder, self.ranks, self.precision = corpus, folder, ranks, precision
        self.random = random.Random(f"{ranks} {precision}")

    def flags(self, cell: int) -> list[str]:
        name, form = CELLS[cell]
        common = [*MODEL, *TRAINING, *self.corpus.data_flags, "--data-cache-path", str(self.folder / "cache")]
        common = [flag for flag in common if self.precision == "fp32" or flag != "--fp32"]
        common += ["--global-batch-size", "12", "--train-iters", str(STEPS)] + ["--bf16"] * (self.precision == "bf16")
        return [*common, *OPTIMIZERS[name].split(), *form.split()]

    def run(self, cells: list[int], resharded: bool) -> dict[int, tuple[float, float]]:
        """For every cell: the largest difference of a weight and of a loss from the run that was not stopped."""
        here, other = {}, {}
        for cell in cells:
            flags, stop = self.flags(cell), self.random.randint(2, STEPS - 2)
            whole, part = str(self.folder / f"{cell}-whole"), str(self.folder / f"{cell}-part-{resharded}")
            here[f"{cell}-whole"] = [*flags, "--save", whole, "--save-interval", str(stop)]
            here[f"{cell}-part"] = [*flags, "--save", part, "--save-interval", "100", "--exit-interval", str(stop)]
            resumed = [*flags, "--save", part, "--load", part, "--save-interval", "100"]
            (other if resharded else here)[f"{cell}-resumed"] = resumed
        done = launch_many(self.ranks, here, self.folder, timeout=1500)
        if resharded:
            done |= launch_many(2 if self.ranks == 1 else 1, other, self.folder, timeout=1500)
        return {cell: self.differences(cell, done, resharded) for cell in cells}

    def differences(self, cell: int, done: dict[str, Run], resharded: bool) -> tuple[float, float]:
        resumed = done[f"{cell}-resumed"]
        assert "can lead to data corruption" not in done[f"{cell}-part"].output
        assert resumed.steps, resumed.output[-2000:]
        assert max(resumed.steps) == STEPS
        whole = done[f"{cell}-whole"].steps
        del resumed.steps[min(resumed.steps) + 1]  # Megatron's second line after a start is the mean of two steps
        loss = max(abs(values["lm loss"] - whole[step]["lm loss"]) for step, values in resumed.steps.items())
        ends = [open_checkpoint(self.folder / f"{cell}-{name}") for name in ("whole", f"part-{resharded}")]
        assert [end.iteration for end in ends] == [STEPS, STEPS]
        names = ends[0].weights()
        weight = max(float((ends[0].read(name).float() - ends[1].read(name).float()).abs().max()) for name in names)
        return weight, loss


@pytest.fixture(scope="module")
def table() -> Iterator[dict[tuple, str]]:
    """What was found, printed at the end as the table of the docs."""
    rows: dict[tuple, str] = {}
    yield rows
    head = sorted({key[1:] for key in rows})
    print("\n\n| optimizer, format | " + " | ".join(f"{r} rank(s), {p}, {t}" for r, p, t in head) + " |")
    print("|---" * (len(head) + 1) + "|")
    for cell, (name, form) in enumerate(CELLS):
        print(f"| {name}, {LABELS[form]} | " + " | ".join(rows.get((cell, *key), "") for key in head) + " |")


@pytest.mark.parametrize(
    ("ranks", "precision", "resharded"),
    [
        pytest.param(
            ranks,
            precision,
            resharded,
            marks=[] if (ranks, precision, resharded) == (*QUICK, False) else pytest.mark.slow,
        )
        for ranks in (1, 2, 3)
        for precision in ("fp32", "bf16")
        for resharded in (False, True)
    ],
)
def test_resumed_runs_end_with_the_same_weights(
    corpus: Corpus,
    tmp_path: Path,
    table: dict,
    request: pytest.FixtureRequest,
    ranks: int,
    precision: str,
    resharded: bool,
) -> None:
    """The quick one: three ranks and padded buckets, whose optimizer state megatron-core 0.19 destroys."""
    everything = request.config.option.markexpr != "not slow"
    cells = list(range(len(CELLS))) if everything else [len(CELLS) - 1]
    found = Matrix(corpus, tmp_path, ranks, precision).run(cells, resharded)
    for cell, (weight, loss) in found.items():
        same = weight == 0 and loss == 0
        table[cell, ranks, precision, "other DP" if resharded else "same"] = "same bits" if same else f"{weight:.0e}"
    for cell, (weight, loss) in found.items():
        limit = 0.0 if not resharded else 1e-4 if precision == "fp32" else 1e-2
        assert loss <= limit, CELLS[cell]
        assert weight <= limit, CELLS[cell]
