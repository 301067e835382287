"""The dry run and the training agree: both go through, or both refuse in the same line; no end is a traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Corpus
from tests.launch import MODEL, REPOSITORY, TRAINING, environment

DIVERGES = "--lr 1e38 --clip-grad 0 --train-iters 4"
CASES: dict[str, tuple[int, str, int, str]] = {
    "the layers of a layout": (
        2, "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|ttL", 2,
        "--pipeline-model-parallel-layout",
    ),
    "layers that do not fill the pipeline": (
        2, "--pipeline-model-parallel-size 2 --num-layers 4 --decoder-first-pipeline-num-layers 1 "
        "--decoder-last-pipeline-num-layers 1", 2, "--decoder-last-pipeline-num-layers",
    ),
    "a pattern of another length": (1, "--num-experts 4 --moe-layer-freq [0,1,1]", 2, "--moe-layer-freq"),
    "groups of experts": (
        1, "--num-experts 4 --moe-router-num-groups 3 --moe-router-group-topk 2", 2, "--moe-router-num-groups",
    ),
    "not a number": (1, DIVERGES, 16, "error: step 2: found NaN"),
    "not a number, once": (1, f"{DIVERGES} --rerun-mode disabled", 17, "error: step 2: found NaN"),
    "experts": (1, "--num-experts 4 --moe-router-topk 2", 0, ""),
    "a split of layers": (1, "--decoder-last-pipeline-num-layers 1", 2, "--decoder-last-pipeline-num-layers"),
}  # fmt: skip
"""Ranks, flags, the training's exit status, and what its last words must have: of faults that were found."""

SOON = {"the layers of a layout", "not a number"}


def judged(cases: dict, corpus: Corpus, folder: Path) -> dict:
    """Verdicts of tests/agreement.py."""
    base = [*MODEL, *TRAINING, *corpus.data_flags, "--data-cache-path", str(folder / "cache"), "--train-iters", "2"]
    listing = folder / "cases.json"
    listing.write_text(
        json.dumps({name: {"flags": [*base, *flags.split()], "world": world} for name, (world, flags) in cases.items()})
    )
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tests" / "agreement.py"), str(listing)],
        env=environment(), cwd=REPOSITORY, text=True, capture_output=True, timeout=3000,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.split("results: ")[-1])


def agree(verdict: dict) -> None:
    """Fail where the dry run lies, or an end is no line."""
    (dry, foretold), (status, said) = verdict["dry"], verdict["run"]
    assert "Traceback" not in foretold + said
    if dry == 0:
        assert status in (0, 16, 17), said[-3000:]
        assert "dry run: all checks passed" in foretold
    else:
        assert dry == status == 2, foretold[-3000:] + said[-3000:]
        assert last_line(foretold) == last_line(said)


def last_line(output: str) -> str:
    """The last one with `error: `."""
    return [line for line in output.splitlines() if line.startswith("error: ")][-1]


@pytest.mark.parametrize("which", ["soon", pytest.param("later", marks=pytest.mark.slow)])
def test_cases_that_were_wrong(which: str, corpus: Corpus, tmp_path: Path) -> None:
    chosen = {name: CASES[name] for name in CASES if (name in SOON) == (which == "soon")}
    verdicts = judged({name: (world, flags) for name, (world, flags, *_) in chosen.items()}, corpus, tmp_path)
    for name, (_, _, status, words) in chosen.items():
        agree(verdicts[name])
        assert verdicts[name]["run"][0] == status, name
        assert words in (last_line(verdicts[name]["run"][1]) if status else "")
