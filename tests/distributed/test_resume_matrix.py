"""Every way to save an optimizer, killed at a random step and resumed: bit for bit, or nearly so in another layout.

    python -m pytest -m "" -s tests/distributed/test_resume_matrix.py

runs all of it and prints the table of docs/training.md; without `-m ""` it runs what has been wrong once.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_meap.checkpoint.reader import open_checkpoint
from tests.conftest import Corpus
from tests.launch import MODEL, TRAINING, Run, launch_killed, launch_many

STEPS = 8
OBJECTIVE = ["--meap-objective", "mir"]
"""Noised copies: what can go wrong with masks on a resume can with them, and the place of a copy beside its sample."""
FLAT, RESHARDABLE = "", "--dist-ckpt-optim-fully-reshardable"
OPTIMIZERS = {
    "plain": "",
    "distributed": "--use-distributed-optimizer",
    "distributed, 5 padded buckets": "--use-distributed-optimizer --overlap-grad-reduce --ddp-num-buckets 5",
}
CELLS = [(name, layout) for name in OPTIMIZERS for layout in ([FLAT] if name == "plain" else [FLAT, RESHARDABLE])]
LABELS = {FLAT: "default", RESHARDABLE: "fully reshardable"}
QUICK = (3, "fp32")
SAME = "same"
TOLERANCE = {"fp32": (1e-4, 1e-4), "bf16": (2**-7, 1e-4)}
"""Of weights and of losses, where the layout that resumes adds up gradients in another order.

Measured: 9e-9 and 1e-6 in fp32; 5e-4 and 5e-5 in bf16, where weights are stored rounded, those near 1 by up to 2**-8.
"""

Found = dict[tuple[int, str], tuple[float, float]]
"""By cell and layout: the largest difference of a weight, and of a loss, from the run that nobody stopped."""


class Matrix:
    """Runs cells of one number of processes and one precision, and compares what they end with."""

    def __init__(self, corpus: Corpus, folder: Path, ranks: int, precision: str) -> None:
        self.corpus, self.folder, self.ranks, self.precision = corpus, folder, ranks, precision
        self.random = random.Random(f"{ranks} {precision}")

    def flags(self, cell: int) -> list[str]:
        name, form = CELLS[cell]
        common = [*MODEL, *TRAINING, *self.corpus.data_flags, "--data-cache-path", str(self.folder / "cache")]
        common = [flag for flag in common if self.precision == "fp32" or flag != "--fp32"]
        common += ["--global-batch-size", "12", "--train-iters", str(STEPS)] + ["--bf16"] * (self.precision == "bf16")
        return [*common, *OBJECTIVE, *OPTIMIZERS[name].split(), *form.split()]

    def run(self, cells: list[int], layouts: dict[str, int]) -> Found:
        """Run cells in the layout of this matrix, and resume each in others.

        Args:
            cells: which.
            layouts: processes that resume, by what the layout is called.
        """
        done: dict[str, Run] = {}
        whole: dict[str, list[str]] = {}
        resumed: dict[str, dict[str, list[str]]] = {layout: {} for layout in layouts}
        for cell in cells:
            saved = self.random.randint(2, STEPS - 3)
            step = self.random.randint(saved + 1, min(STEPS - 1, 2 * saved))
            flags, part = [*self.flags(cell), "--save-interval", str(saved)], str(self.folder / f"{cell}-part")
            whole[f"{cell}-whole"] = [*flags, "--save", str(self.folder / f"{cell}-whole")]
            done[f"{cell}-part"] = launch_killed(self.ranks, [*flags, "--save", part], step)
            for layout in layouts:
                save = ["--load", part, "--save", str(self.folder / f"{cell}-{layout}")]
                resumed[layout][f"{cell}-{layout}"] = [*flags, *save]
        done |= launch_many(self.ranks, whole, self.folder, timeout=1500)
        for layout, ranks in layouts.items():
            done |= launch_many(ranks, resumed[layout], self.folder, timeout=1500)
        return {(cell, layout): self.difference(cell, layout, done) for cell in cells for layout in layouts}

    def difference(self, cell: int, layout: str, done: dict[str, Run]) -> tuple[float, float]:
        whole, part, resumed = (done[f"{cell}-{name}"] for name in ("whole", "part", layout))
        assert "can lead to data corruption" not in part.output
        assert max(part.steps) < STEPS
        assert min(resumed.steps) <= max(part.steps)
        assert max(resumed.steps) == STEPS
        loss = max(abs(values["lm loss"] - whole.steps[step]["lm loss"]) for step, values in resumed.steps.items())
        ends = [open_checkpoint(self.folder / f"{cell}-{name}") for name in ("whole", layout)]
        assert [end.iteration for end in ends] == [STEPS, STEPS]
        names = ends[0].weights()
        weight = max(float((ends[0].read(name).float() - ends[1].read(name).float()).abs().max()) for name in names)
        return weight, loss


@pytest.fixture(scope="module")
def table() -> Iterator[dict[tuple, str]]:
    """What was found, printed at the end as the table of the docs."""
    rows: dict[tuple, str] = {}
    yield rows
    print("\n\n| saved by -> resumed by | " + " | ".join(f"{name}, {LABELS[form]}" for name, form in CELLS) + " |")
    print("|---" * (len(CELLS) + 1) + "|")
    for precision, saved, resumed in sorted({key[1:] for key in rows}, reverse=True):
        found = (rows.get((cell, precision, saved, resumed), "") for cell in range(len(CELLS)))
        print(f"| {precision}, DP {saved} -> DP {resumed} | " + " | ".join(found) + " |")


@pytest.mark.parametrize(
    ("ranks", "precision"),
    [
        pytest.param(ranks, precision, marks=[] if (ranks, precision) == QUICK else pytest.mark.slow)
        for ranks in (1, 2, 3)
        for precision in ("fp32", "bf16")
    ],
)
def test_resumed_runs_end_with_the_same_weights(
    corpus: Corpus, tmp_path: Path, table: dict, request: pytest.FixtureRequest, ranks: int, precision: str
) -> None:
    """The quick one: three ranks and padded buckets, whose optimizer state megatron-core 0.19 destroys."""
    everything = request.config.option.markexpr != "not slow"
    cells = list(range(len(CELLS))) if everything else [len(CELLS) - 1]
    layouts = {SAME: ranks} | ({"other": 2 if ranks == 1 else 1} if everything else {})
    found = Matrix(corpus, tmp_path, ranks, precision).run(cells, layouts)
    for (cell, layout), (weight, loss) in found.items():
        written = "same bits" if weight == 0 and loss == 0 else f"{weight:.0e}, loss {loss:.0e}"
        table[cell, precision, ranks, layouts[layout]] = written
    for (cell, layout), (weight, loss) in found.items():
        limits = (0.0, 0.0) if layout == SAME else TOLERANCE[precision]
        assert weight <= limits[0], (*CELLS[cell], layout)
        assert loss <= limits[1], (*CELLS[cell], layout)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_in_a_later_stage_and_resumed(corpus: Corpus, tmp_path: Path, processes: int) -> None:
    """Killed in the second and in the third stage: the losses and the weights of a run that nobody stopped."""
    one, two = corpus.prefix, corpus.second_prefix
    (tmp_path / "stages.yaml").write_text(
        f"- {{until: 24 samples, blend: {{{one}: 1}}}}\n- {{until: 60 samples, blend: {{{one}: 1, {two}: 3}}}}\n"
        f"- blend: {{{two}: 1}}\n"
    )
    tokenizer = corpus.data_flags[: corpus.data_flags.index("--data-path")]
    flags = [*MODEL, *TRAINING, *tokenizer, "--data-cache-path", str(tmp_path / "cache"), "--train-iters", "12"]
    flags += ["--meap-data-stages", str(tmp_path / "stages.yaml"), "--save-interval", "2"]

    def saving(name: str) -> list[str]:
        return [*flags, "--save", str(tmp_path / name), "--load", str(tmp_path / name)]

    parts = [launch_killed(processes, saving("part"), step) for step in (5, 10)]  # samples 40 and 80
    done = launch_many(processes, {"whole": saving("whole"), "part": saving("part")}, tmp_path)
    assert [min(part.steps) for part in (*parts, done["part"])] == [1, 5, 9]
    for part in (*parts, done["part"]):
        for iteration, values in part.steps.items():
            assert values["lm loss"] == done["whole"].steps[iteration]["lm loss"]
    whole, part = (open_checkpoint(tmp_path / name) for name in ("whole", "part"))
    assert whole.iteration == part.iteration == 12
    for name in whole.weights():
        assert torch.equal(whole.read(name), part.read(name)), name
