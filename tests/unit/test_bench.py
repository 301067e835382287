"""`make bench`: the benchmarks accept its commands, and its table has everything that a figure needs."""

import argparse
import importlib
import runpy
import shutil
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from megatron_meap.evaluation.models import Model
from tests.launch import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"


class Parsed(Exception):
    """A benchmark has parsed its flags; it goes no further."""


@pytest.fixture(autouse=True)
def _beside_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return importlib.import_module("bench")


def test_every_command_is_one_that_its_benchmark_takes(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def only_parse(parser: argparse.ArgumentParser) -> None:
        parse(parser)
        raise Parsed

    found = list(bench.benchmarks("--corpus novels.jsonl --train-vocab 128000"))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    assert {"startup.py", "cpu_training.py", "checkpoint.py", "preprocess.py"} <= {each.script for each in found}
    for each in found:
        for whole in (True, False):
            monkeypatch.setattr(sys, "argv", each.command(whole))
            with pytest.raises(Parsed):
                runpy.run_path(str(BENCHMARKS / each.script))["main"]()


def test_the_peer_of_the_evaluation_gets_its_tasks_and_samples(character_tokenizer: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    evaluation = importlib.import_module("evaluation")
    shutil.copytree(character_tokenizer, tmp_path / "model")
    LlamaConfig(max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    flags = evaluation.EVALUATIONS["two tasks"][1].split()
    tasks, metadata = evaluation.samples_of(Model("0", tmp_path / "model", "", "0"), flags)
    assert sorted(tasks) == ["meap_kv_logprob", "meap_needle_logprob"]
    assert {"max_seq_lengths": [1024], "samples": 8, "kv_digits": 4}.items() <= metadata.items()


def test_a_round_begins_if_there_is_time_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within half of what is left; one is made in any case."""
    results = importlib.import_module("results")
    now = iter(range(0, 1000, 10))  # a round takes 10 s
    monkeypatch.setattr(results.time, "time", lambda: float(next(now)))
    assert list(results.turns(5, warm_up=2)) == [0, 1, 2, 3, 4, 5, 6]
    now = iter(range(0, 1000, 10))
    monkeypatch.setenv("BENCH_UNTIL", "110")
    assert list(results.turns(5, warm_up=2)) == [0, 1, 2, 3]
    now = iter(range(200, 1000, 10))
    assert list(results.turns(5, warm_up=2)) == [0, 1, 2]


def test_quick_runs_end_in_35_minutes(bench: ModuleType) -> None:
    assert sum(each.minutes for each in bench.benchmarks(None)) <= 35


def test_what_fails_or_hangs_is_named_and_the_others_go_on(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier figures count, and a benchmark that was ended leaves no scratch file."""
    monkeypatch.setenv("BENCH_RESULTS", str(tmp_path / "figure"))
    monkeypatch.setenv("BENCH_COMMAND", "python benchmarks/hangs.py")
    importlib.import_module("results").record("start", [3.0, 1.0, 2.5], "s")
    records = f"open(os.environ['BENCH_RESULTS'], 'a').write(open({str(tmp_path / 'figure')!r}).read())"
    programs = {
        "hangs": f"{records}; tempfile.mkdtemp(); time.sleep(60)",
        "fails": "raise SystemExit(3)",
        "works": f"{records}; assert os.environ['BENCH_COMMAND'] == 'python benchmarks/works.py --rounds 1'",
    }
    for name, program in programs.items():
        (tmp_path / f"{name}.py").write_text(f"import os, sys, tempfile, time; {program}\n")
    minutes = {"hangs": 0.05}
    chosen = [bench.Benchmark(f"{name}.py", "", "--rounds 1", minutes.get(name, 1)) for name in programs]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.setattr(bench, "benchmarks", lambda _: chosen)
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setattr(sys, "argv", ["bench.py", "--output", str(tmp_path / "out")])
    begun = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 1
    assert time.monotonic() - begun < 50
    said = (tmp_path / "out" / "bench.md").read_text()
    assert said in capsys.readouterr().out
    assert said.count("| start | 2.5 s | 1 to 3 | 3 |") == 2
    assert "failed with status 3, see its output: `fails.py --rounds 1`" in said
    assert "ended at its limit, 0.1 minutes, figures until then: 1: `hangs.py --rounds 1`" in said
    assert "shortened by `--rounds 1`: `works.py`" in said
    assert list(scratch.iterdir()) == []
    chosen[:] = chosen[:1]
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert not ended.value.code  # a machine that is busy or slow is no failure, unless nothing is measured at all
    chosen[:] = [bench.Benchmark("hangs.py", minutes=0.0)]
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 1
    assert (tmp_path / "out" / "bench.md").read_text().startswith("No figures: no benchmark came to its first one.")
    monkeypatch.setattr(sys, "argv", ["bench.py", "--only", "nothing"])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert "--only nothing: no such benchmark" in capsys.readouterr().err


def test_a_figure_comes_with_its_spread_its_command_and_its_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results = importlib.import_module("results")
    results.record("nobody asked", [1.0], "s")
    file = tmp_path / "bench.jsonl"
    monkeypatch.setenv("BENCH_RESULTS", str(file))
    monkeypatch.setenv("BENCH_COMMAND", "python benchmarks/startup.py --rounds 3")
    results.record("start", [3.0, 1.0, 2.5], "s")
    results.record("memory", [1234.5], "MB")
    said = results.table(file)
    assert said.startswith("`python benchmarks/startup.py --rounds 3`\n")
    assert "| start | 2.5 s | 1 to 3 | 3 |" in said
    assert "| memory | 1,234 MB |  | 1 |" in said
    assert "nobody asked" not in said
    assert results.machine()["machine"] in said
    assert results.machine()["date"] in said
