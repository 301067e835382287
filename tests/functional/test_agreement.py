"""The dry run and the training agree: both succeed, or both refuse with the same line, never with a traceback."""

import json
import re
from pathlib import Path

import pytest

from tests import combinations, warm
from tests.combinations import Case
from tests.conftest import Corpus
from tests.launch import REPOSITORY, environment

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
    "not a number, on one rank": (  # which the other one only loses
        2, f"{DIVERGES} --rerun-mode disabled --pipeline-model-parallel-size 2", 17, "error: step 2: found NaN",
    ),
    "not a number, in validation": (
        1, f"{DIVERGES} --eval-iters 1 --eval-interval 1", 17, "error: step 1: found NaN in an evaluation",
    ),
    "few micro batches for interleaved stages": (
        2, "--pipeline-model-parallel-size 2 --num-layers 4 --num-layers-per-virtual-pipeline-stage 1 "
        "--micro-batch-size 8", 2, "a step of 8 sequences",
    ),
    "data named twice": (1, "--per-split-data-args-path any", 2, "--per-split-data-args-path: not possible with"),
    "a profile of no step": (1, "--profile --use-pytorch-profiler --tensorboard-dir b", 2, "--profile-step-start 10"),
    "SGD shared out": (2, "--optimizer sgd --use-distributed-optimizer", 2, "--use-distributed-optimizer"),
    "an odd sequence in parallel": (
        2, "--tensor-model-parallel-size 2 --sequence-parallel --seq-length 63", 2, "--seq-length 63",
    ),
    "averages of losses per token": (
        2, "--ddp-average-in-collective --calculate-per-token-loss", 2, "--ddp-average-in-collective",
    ),
    "weights without values": (1, "--init-model-with-meta-device", 2, "--init-model-with-meta-device"),
    "experts over ranks that are not there": (1, "--num-experts 4 --expert-model-parallel-size 2", 2, "WORLD_SIZE"),
    "pipelines over another backend": (
        2, "--pipeline-model-parallel-size 2 --pipeline-model-parallel-comm-backend nccl", 2,
        "--pipeline-model-parallel-comm-backend",
    ),
    "names of validation sets": (
        1, "--multiple-validation-sets --full-validation --validation-set-names a b --eval-iters 1", 2,
        "--validation-set-names a b",
    ),
    "the inputs of experts": (1, "--num-experts 4 --moe-apply-probs-on-input", 2, "--moe-apply-probs-on-input"),
    "a file that is not there": (
        1, "--heterogeneous-layers-config-path absent", 2, "--heterogeneous-layers-config-path absent: No such file",
    ),
    "layers that do not learn": (1, "--freeze-all-layers", 2, "--freeze-all-layers"),
    "experts": (1, "--num-experts 4 --moe-router-topk 2", 0, ""),
    "a split of layers": (1, "--decoder-last-pipeline-num-layers 1", 2, "--decoder-last-pipeline-num-layers"),
}  # fmt: skip
"""Ranks, flags, the training's exit status, and what its last words must have: of faults that were found."""

SOON = {"the layers of a layout", "not a number", "names of validation sets"}
DRAWN = range(300)
"""Seeds of `combinations.drawn`."""


def judged(cases: dict[str, Case], corpus: Corpus, folder: Path, dry: bool = True) -> dict:
    """Verdicts of tests/agreement.py; `dry` is whether those of the dry run are among them."""
    data = [*corpus.data_flags, "--data-cache-path", str(folder / "cache")]
    listing = folder / "cases.json"
    listing.write_text(
        json.dumps(
            {name: {"flags": case.command_line(data), "world": case.world, "dry": dry} for name, case in cases.items()}
        )
    )
    script = REPOSITORY / "tests" / "agreement.py"
    done = warm.run([script, listing], environment(), cwd=folder, timeout=60 + 120 * len(cases))
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.split("results: ")[-1])


def agree(verdict: dict) -> None:
    """Fail if the dry run is wrong, or a run does not end with one line."""
    (dry, foretold), (status, said) = verdict["dry"], verdict["run"]
    assert "Traceback" not in foretold + said
    if dry == 0:
        assert status in (0, 16, 17), said[-3000:]
        assert "dry run: all checks passed" in foretold
    else:
        assert dry == status == 2, foretold[-3000:] + said[-3000:]
        assert last_line(foretold).partition(" (to look at ")[0] == last_line(said).partition(" (to look at ")[0]


def last_line(output: str) -> str:
    """The last one with `error: `."""
    return [line for line in output.splitlines() if line.startswith("error: ")][-1]


@pytest.mark.parametrize("which", ["soon", pytest.param("later", marks=pytest.mark.slow)])
def test_cases_that_were_wrong(which: str, corpus: Corpus, tmp_path: Path) -> None:
    chosen = {name: CASES[name] for name in CASES if (name in SOON) == (which == "soon")}
    cases = {name: Case("dense", flags.split(), ranks=ranks) for name, (ranks, flags, *_) in chosen.items()}
    verdicts = judged(cases, corpus, tmp_path)
    for name, (_, _, status, words) in chosen.items():
        agree(verdicts[name])
        assert verdicts[name]["run"][0] == status, name
        assert words in (last_line(verdicts[name]["run"][1]) if status else "")


@pytest.mark.parametrize("seeds", [DRAWN[:2], pytest.param(DRAWN[2:], marks=pytest.mark.slow)], ids=["few", "many"])
def test_drawn_command_lines(seeds: range, corpus: Corpus, tmp_path: Path) -> None:
    parser = combinations.parser()
    cases = {str(seed): combinations.drawn(parser, seed) for seed in seeds}
    wrong = {}
    for name, verdict in judged(cases, corpus, tmp_path).items():
        try:
            agree(verdict)
        except AssertionError as error:
            wrong[f"{name}, {cases[name].context}: {' '.join(cases[name].more)}"] = str(error)[:600]
    assert not wrong, "\n\n".join(f"{name}\n{said}" for name, said in wrong.items())


@pytest.mark.slow
def test_no_flag_is_silent(corpus: Corpus, tmp_path: Path) -> None:
    """What should change the data or the mathematics changes a loss or the weights of two steps, or is refused."""
    bases = {context: Case(context) for context in combinations.CONTEXTS}
    flags = {" ".join(case.more): case for case in combinations.single(combinations.parser())}
    verdicts = judged(bases | flags, corpus, tmp_path, dry=False)
    same = [
        name for name, case in flags.items()
        if verdicts[name]["run"][0] == 0 and result(verdicts[name]) == result(verdicts[case.context])
    ]  # fmt: skip
    assert same == []


def result(verdict: dict) -> list[str]:
    """Results of a training: its losses on training and validation data, and its weights."""
    return re.findall(r"lm loss[^|]*|weights of rank.*", verdict["run"][1])
