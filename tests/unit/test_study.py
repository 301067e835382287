"""A study: its grid is read, run and resumed, and judged by the rules written down beforehand."""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_meap.errors import JobError, UsageError
from megatron_meap.study import command
from megatron_meap.study import grid as grids
from megatron_meap.study.analysis import compare, copying_begins, points_of, tuned, worth
from megatron_meap.study.grid import Point
from megatron_meap.study.page import Written, write_page
from megatron_meap.study.planting import plant
from megatron_meap.study.runs import AGAIN, Runner, finished, read_results, write_results
from megatron_meap.study.texts import Texts

REPOSITORY = Path(__file__).parents[2]
STUDY = REPOSITORY / "examples" / "study"
GRID = """
models = { tiny = "--num-layers 1" }
[data]
folder = "study"
train = "train.jsonl"
valid = "valid.jsonl"
vocabulary = 400
valid_documents = 3
valid_tokens = 20
[training]
launch = "python"
seq_length = 8
batch = 2
evaluations = 4
flags = "--fp32"
[objectives]
ntp = "--meap-objective ntp"
meap = "--meap-objective meap"
mir = { flags = "--meap-objective mir", passes = 2, tuned_as = "meap" }
[[stage]]
name = "tuning"
seed = [9]
model = ["tiny"]
tokens = [64]
epochs = [1]
weight_decay = [0.1, 1.0]
dropout = [0.0]
objective = ["ntp", "meap"]
[[stage]]
name = "comparison"
tuned_by = "tuning"
seed = [1, 2, 3]
model = ["tiny"]
tokens = [64, 128]
epochs = [1]
objective = ["ntp", "meap", "mir"]
"""
# Stands for the trainer: its log has a loss that falls, and it fails where it is told to.
TRAINER = """
import pathlib, sys
flags = dict(zip(sys.argv, sys.argv[1:]))
for flag in "--train-data-path", "--valid-data-path":
    assert pathlib.Path(flags[flag] + ".bin").stat().st_size > 0
planted = 3 if pathlib.Path(pathlib.Path(flags["--train-data-path"]).parent, "valid-planted.bin").exists() else 1
if pathlib.Path("broken").exists() and flags["--weight-decay"] == "1.0": sys.exit(3)
steps = int(flags["--train-iters"])
print(f" [x] iteration {steps}/ {steps} | consumed samples: 8 | lm loss: 5.0E+00 |")
for step in range(int(flags["--eval-interval"]), steps + 1, int(flags["--eval-interval"])):
    loss = 6 - step / 100 - float(flags["--weight-decay"])
    for i in range(planted):
        print(f" validation-{i} loss at iteration {step} | lm loss value: {loss + i * step} | ")
"""


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    return grids.read(path)


def test_the_grids_that_are_shipped_are_commands_of_the_trainer():
    for path in sorted(STUDY.glob("*.toml")):
        grid = grids.read(path)
        for stage in grid.stages:
            points = stage.points(dict.fromkeys(grid.objectives, (0.1, 0.0)))
            assert len({point.name for point in points}) == len(points) > 0
            command = shlex.join(grid.command(points[0], Path("run"), Path("text"), [Path("valid")], Path("tokenizer")))
            assert f"--seed {points[0].seed}" in command
            assert "--train-data-path text " in command
            assert "--valid-data-path valid --" in command


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("[objectives]", "[objective]", "missing or unknown: objective, objectives"),
        ('tuned_by = "tuning"', 'tuned_by = "x"', "stage comparison: tuned_by x: no stage before it has this name"),
        ("epochs = [1]", "", "stage tuning: its axes must be"),
        ("epochs = [1]", "epochs = 1", "stage tuning: every axis is a list of values"),
        ('["ntp", "meap"]', '["ntp", "mepa"]', "stage tuning: objective mepa: none of ntp, meap, mir"),
        ("[training]", "[training", "cannot be read as TOML"),
    ],
)
def test_a_grid_that_is_wrong_is_refused_by_a_line(tmp_path, old, new, line):
    path = tmp_path / "grid.toml"
    path.write_text(GRID.replace(old, new, 1))
    with pytest.raises(UsageError, match=line):
        grids.read(path)


def test_copies_at_equal_data_double_the_batch_alone(grid):
    ntp, mir = (Point("tiny", 64, 4, name, 0.1, 0.0, 1) for name in ("ntp", "mir"))
    assert grid.steps(ntp) == grid.steps(mir) == 16
    assert (grid.samples(ntp), grid.samples(mir)) == (32, 64)


def texts(grid, folder):
    for name, documents in (("train", 40), ("valid", 7)):
        lines = (json.dumps({"text": f"{name} {i}: the quick brown fox, {i * i} lazy dogs"}) for i in range(documents))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return Texts(grid, folder, folder / "runs" / "data")


def test_runs_are_resumed_and_only_those_without_a_result(tmp_path, grid, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pretrain_gpt_meap.py").write_text(TRAINER)
    Path("broken").touch()
    said = []
    runs, points = Path("runs"), grid.stages[0].points()
    with pytest.raises(JobError, match="2 of 4 runs have no result yet"):
        Runner(grid, texts(grid, tmp_path), runs, [{}, {}], said.append).run(points)
    assert {point.weight_decay for point in finished(runs)} == {0.1}
    Path("broken").unlink()
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/result.json")}
    Runner(grid, texts(grid, tmp_path), runs, [{}], said.append).run(points)
    assert finished(runs).keys() == set(points)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert "4 runs, 2 of them done" in said
    result = finished(runs)[points[0]]
    Runner(grid, texts(grid, tmp_path), runs, [{}], said.append).again(result)
    again = finished(runs, AGAIN)[points[0]]
    assert (again["validation"], again["texts"]) == (result["validation"], result["texts"])
    assert len({each["texts"] for each in finished(runs).values()}) == 1  # one size and seed
    assert list(result["validation"].values()) == pytest.approx([5.89, 5.88, 5.87, 5.86])
    assert (result["steps"], result["trained_tokens"]) == (4, 64)
    assert Path("runs/data/train-t64-s9.bin").stat().st_size == 2 * 64  # exactly the tokens asked for
    write_results(Path("results.jsonl"), finished(runs))
    assert read_results(Path("results.jsonl")) == finished(runs)


def test_a_signal_ends_what_runs_and_begins_nothing_else(tmp_path, grid, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pretrain_gpt_meap.py").write_text(
        "import os, pathlib, time\npathlib.Path(f'began-{os.getpid()}').touch()\ntime.sleep(60)"
    )

    def interrupt():
        while len(list(tmp_path.glob("began-*"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Runner(grid, texts(grid, tmp_path), Path("runs"), [{}, {}], print).run(grid.stages[0].points())
    assert time.monotonic() - begun < 30
    began = [int(path.name.removeprefix("began-")) for path in tmp_path.glob("began-*")]
    assert len(began) == 2 < len(grid.stages[0].points())
    assert not any(Path(f"/proc/{pid}").exists() for pid in began)


def test_a_text_that_is_too_short_is_refused(tmp_path, grid):
    with pytest.raises(UsageError, match="the training text has only"):
        texts(grid, tmp_path).make([Point("tiny", 10**6, 1, "ntp", 0.1, 0.0, 1)])
    with pytest.raises(UsageError, match=r"--texts .*: no train.jsonl there"):
        Texts(grid, tmp_path / "empty", tmp_path / "other").make([Point("tiny", 64, 1, "ntp", 0.1, 0.0, 1)])


def test_what_copying_saves_is_measured_where_passages_are_planted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pretrain_gpt_meap.py").write_text(TRAINER)
    planted = "valid_tokens = 20\nplanted = { passages = 1, length = 3, times = 2, pieces = 8 }"
    Path("grid.toml").write_text(GRID.replace("valid_tokens = 20", planted))
    grid = grids.read(Path("grid.toml"))
    points = grid.stages[0].points()
    Runner(grid, texts(grid, tmp_path), Path("runs"), [{}], print).run(points[:1])
    result = finished(Path("runs"))[points[0]]
    # The third set costs 1 nat a token more than the second at step 1: 4 for each of two known pieces of 8 tokens.
    assert result["copying"] == pytest.approx({"1": 4, "2": 8, "3": 12, "4": 16})
    assert copying_begins(result) == 4  # 1 nat, a quarter of the way to the first evaluation after 2 x 8 tokens
    assert copying_begins(result | {"copying": {"1": 0.5, "3": 1.5}}) == 32
    assert copying_begins(result | {"copying": {"1": 0.5, "2": 0.9}}) is None
    assert result["planted"] == pytest.approx({"1": 6.89, "2": 7.88, "3": 8.87, "4": 9.86})
    half = result | {"copying": {step: each / 2 for step, each in result["copying"].items()}}
    results = {point: half if point.objective == "meap" else result for point in points if point.weight_decay == 0.1}
    write_page([Written(replace(grid, stages=grid.stages[:1]), results, {}, Path())], Path("page.md"))
    page = Path("page.md").read_text()
    assert "| `ntp` | 9 | 1 of 1 | 4 | - | - | baseline | 16.00 | 9.86 |" in page
    assert "| `meap` | 9 | 1 of 1 | 8 | +0.693 | 1.000 | **too few seeds** | 8.00, -8.000 | 9.86, +0.000 |" in page
    text = np.memmap("runs/data/train-t64-s9.bin", np.uint16).reshape(-1, 8)
    assert len(text) == 64 // 8
    bytes_ = [row[(row >= 4) & (row < 12)] for row in text]  # a passage of three, twice
    assert all(len(each) == 6 and len(set(each)) == 3 for each in bytes_)
    planted, reordered = (np.memmap(f"runs/data/valid-{name}.bin", np.uint16) for name in ("planted", "reordered"))
    assert not np.array_equal(planted, reordered)
    assert np.array_equal(*(np.sort(each.reshape(-1, 8)) for each in (planted, reordered)))


@pytest.mark.parametrize("length", [4, 8])
def test_a_passage_goes_on_the_same_wherever_it_comes_again(length):
    prose, pieces = np.arange(1000, 1100), np.arange(4, 132)
    text, anew = (
        plant(prose, 8, length, 6, pieces, np.random.default_rng(3), consistent) for consistent in (True, False)
    )
    assert len(text) == 100 + 8 * length * 6
    assert np.array_equal(text[text >= 1000], prose)
    for each, different in ((text, 8), (anew, 30)):
        planted = each[each < 132].reshape(-1, length)
        assert sorted(np.unique(planted[:, 0], return_counts=True)[1]) == [6] * 8
        assert (len(np.unique(planted, axis=0)) == 8) == (different == 8)
        assert len(np.unique(planted, axis=0)) >= different
    changed = (text != anew)[text < 132].reshape(-1, length)
    assert not changed[:, 0].any()  # only what can be copied, nearly all of it
    assert changed[:, 1:].mean() > 0.6
    assert np.array_equal(*(np.sort(each[each < 132].reshape(-1, length)) for each in (text, anew)))
    assert np.array_equal(anew >= 1000, text >= 1000)


def made_up(points, effect=0.0, noise=0.0, slope=0.3):
    """Results in which losses fall with the logarithm of the tokens, and `meap` differs by `effect` at every size."""
    random = np.random.default_rng(0)
    results = {}
    for point in points:
        loss = 8 - slope * math.log(point.tokens) + 0.1 * point.seed + noise * random.normal()
        loss += effect * (point.objective == "meap") + 0.2 * (point.weight_decay == 0.1)
        results[point] = {
            "validation": {"1": loss + 1, "2": loss, "3": loss + 0.5}, "steps": 3, "cpu_seconds": 60.0,
            "machine": "a processor", "command": "python x", "environment": {},
        }  # fmt: skip
    return results


def test_the_best_setting_of_each_objective_is_taken_once_all_of_its_runs_are_done(grid):
    tuning, comparison = grid.stages
    results = made_up(tuning.points())
    assert tuned(grid, tuning, results) == {"ntp": (1.0, 0.0), "meap": (1.0, 0.0), "mir": (1.0, 0.0)}
    del results[tuning.points()[0]]  # of ntp
    assert {point.objective for point in points_of(grid, comparison, results)} == {"meap", "mir"}


@pytest.mark.parametrize(
    ("effect", "noise", "verdict"),
    [(-0.1, 0.001, "better"), (0.1, 0.001, "worse"), (0.0, 0.001, "no effect"), (0.005, 0.0001, "no effect"),
     (0.0, 0.1, "undecided")],
)  # fmt: skip
def test_a_known_effect_is_found_and_none_is_called_none(effect, noise, verdict):
    points = [Point("tiny", 64, 1, name, 1.0, 0.0, seed) for name in ("ntp", "meap") for seed in (1, 2, 3)]
    base, meap = compare(points, made_up(points, effect, noise))
    assert base.difference == 0
    assert meap.verdict == verdict
    assert replace(meap, seeds=meap.seeds[:2]).verdict == "too few seeds"
    assert meap.low <= meap.difference <= meap.high
    assert meap.difference == pytest.approx(effect, abs=3 * noise + 1e-9)


def test_many_comparisons_are_corrected():
    names = ("ntp", "meap", *(f"other{i}" for i in range(4)))
    points = [Point("tiny", 64, 1, name, 1.0, 0.0, seed) for name in names for seed in (1, 2, 3)]
    results = made_up(points, -0.1, 0.02)
    alone = compare([point for point in points if point.objective in ("ntp", "meap")], results)[1]
    among = next(each for each in compare(points, results) if each.point.objective == "meap")
    assert among.p_value == pytest.approx(5 * alone.p_value)  # the smallest of five


def test_runs_that_read_different_texts_are_no_pair():
    points = [Point("tiny", 64, 1, name, 1.0, 0.0, seed) for name in ("ntp", "meap") for seed in (1, 2, 3)]
    results = made_up(points)
    for point in points:
        if point.seed < 3:  # of the third, as of older runs, it is not known
            results[point]["texts"] = f"{point.seed}"
    assert compare(points, results)[1].seeds == (1, 2, 3)
    results[points[3]]["texts"] = "another"
    assert compare(points, results)[1].seeds == (2, 3)


def test_the_worth_in_tokens_is_what_the_losses_were_made_of():
    points = [
        Point("tiny", tokens, 1, name, 1.0, 0.0, seed)
        for name in ("ntp", "meap") for tokens in (50, 100, 200) for seed in (1, 2, 3)
    ]  # fmt: skip
    found = worth(points, made_up(points, effect=-0.3 * math.log(2), noise=0.002))
    assert found.keys() == {"meap"}
    assert found["meap"].low < found["meap"].times < found["meap"].high
    assert found["meap"].times == pytest.approx(2, rel=0.05)
    assert found["meap"].sizes == (50, 100, 200)
    assert worth([point for point in points if point.tokens < 200], made_up(points)) == {}
    one_size = [Point("tiny", 50, 1, name, 1.0, 0.0, seed) for name in ("ntp", "meap", "mir") for seed in (1, 2, 3, 4)]
    more = [Point("tiny", 400, 1, "ntp", 1.0, 0.0, seed) for seed in (1, 2, 3)]
    every = {*points, *one_size, *more}  # of each objective, what it shares with the baseline
    assert worth(every, made_up(sorted(every)))["meap"].sizes == (50, 100, 200)
    assert worth(every, made_up(sorted(every))).keys() == {"meap"}


def test_the_page_says_what_is_found_and_what_is_missing(grid, tmp_path):
    tuning, comparison = grid.stages
    page, source = tmp_path / "docs" / "results.md", Path("results.jsonl")
    write_page([Written(grid, {}, {}, source)], page)
    assert "**Not run**: it waits for" in page.read_text()
    results = made_up(tuning.points())
    points = points_of(grid, comparison, results)
    results |= made_up([point for point in points if point.tokens == 64], effect=-0.1, noise=0.001)
    write_page([Written(grid, results, {}, source)], page)
    text = page.read_text()
    assert "- comparison: 9 of 18 runs" in text
    assert "**better**" in text
    assert "sizes.svg" not in text
    picture = page.with_suffix("") / "grid-2-losses.svg"
    drawn = picture.read_bytes()
    write_page([Written(grid, results, {}, source)], page)
    assert picture.read_bytes() == drawn  # the same results give the same files
    alone = {point: each for point, each in results.items() if point.objective == "ntp" or point in tuning.points()}
    write_page([Written(grid, {**alone, replace(points[1]): results[points[1]]}, {}, source)], page)
    assert "too few seeds" in page.read_text()
    write_page([Written(grid, results | made_up(points, effect=-0.1, noise=0.001), {}, source)], page)
    assert "](results/sizes.svg)" in page.read_text()
    assert (page.with_suffix("") / "sizes.svg").stat().st_size > 5000


def test_the_command_runs_repeats_lists_and_writes_up(tmp_path, grid, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("pretrain_gpt_meap.py").write_text(TRAINER)
    texts(grid, tmp_path)

    def study(do, *flags):
        monkeypatch.setattr("sys.argv", ["study.py", do, "--grid", "grid.toml", "--results", "results", *flags])
        command.main()
        return capsys.readouterr().out

    assert study("list").count("done") == 0
    assert "no finished run to repeat" in study("again")
    assert "waits for “tuning”" in study("run", "--stage", "comparison")
    study("run", "--jobs", "2")
    assert study("list").count("  done") == 4 + 18
    study("again", "--stage", "tuning")
    shutil.copytree("runs", "moved")
    with pytest.raises(UsageError, match=r"--runs moved: .* reads runs/study/data/train-t64-s9"):
        study("again", "--stage", "tuning", "--runs", "moved")
    study("page", "--page", "page.md")
    page = Path("page.md").read_text()
    assert page.count("gave the same numbers, digit for digit") == 1
    assert "Nothing of the grids" in page
    assert len(Path("results/grid.jsonl").read_text().splitlines()) == 22
    again = Path("results/grid-again.jsonl")
    again.write_text(json.dumps(json.loads(again.read_text()) | {"validation": {"4": 1.0}}) + "\n")
    next(Path("runs").glob("*/*/again.json")).unlink()
    study("page", "--page", "page.md")
    page = Path("page.md").read_text()
    assert "**differs** in validation" in page
    assert "22 runs recorded a digest of their texts; 0 older ones did not" in page
    with pytest.raises(UsageError, match="--stage x: none of tuning, comparison"):
        study("run", "--stage", "x")


@pytest.mark.slow
def test_the_small_study_comes_to_its_page(tmp_path):
    """`make study-small` as a whole, in a copy of the checkout so that its own runs are not touched."""
    for name in ("Makefile", "pretrain_gpt_meap.py", "examples", "tools", "megatron_meap", ".venv"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    subprocess.run(["make", "-o", ".venv/installed", "study-small"], cwd=tmp_path, check=True, timeout=1200)
    page = (tmp_path / "runs" / "study-small" / "results.md").read_text()
    assert "6 of 6 runs are done" in page
    assert "Nothing of the grids" in page
