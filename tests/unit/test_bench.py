"""`make bench`: its commands are ones that the benchmarks take, and its table says all that a figure needs."""

import argparse
import importlib
import runpy
import sys
from pathlib import Path

import pytest

from tests.launch import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"


class Parsed(Exception):
    """A benchmark has parsed its flags; it goes no further."""


@pytest.fixture(autouse=True)
def _beside_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_every_command_is_one_that_its_benchmark_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def only_parse(parser: argparse.ArgumentParser) -> None:
        parse(parser)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    commands = list(
        runpy.run_path(str(BENCHMARKS / "bench.py"))["commands"]("--corpus novels.jsonl --train-vocab 128000")
    )
    assert {"startup.py", "cpu_training.py", "checkpoint.py", "preprocess.py"} <= {script for script, *_ in commands}
    for script, *flags in commands:
        monkeypatch.setattr(sys, "argv", [script, *flags])
        with pytest.raises(Parsed):
            runpy.run_path(str(BENCHMARKS / script))["main"]()


def test_a_figure_comes_with_its_spread_its_command_and_its_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results = importlib.import_module("results")
    monkeypatch.setattr(sys, "argv", ["/somewhere/startup.py", "--rounds", "3"])
    results.record("nobody asked", [1.0], "s")
    file = tmp_path / "bench.jsonl"
    monkeypatch.setenv("BENCH_RESULTS", str(file))
    results.record("start", [3.0, 1.0, 2.5], "s")
    results.record("ratio", [0.5], "x")
    said = results.table(file)
    assert "| start | 2.5 s | 1 to 3 | 3 | `benchmarks/startup.py --rounds 3` |" in said
    assert "| ratio | 0.5 x | 0.5 to 0.5 | 1 |" in said
    assert "nobody asked" not in said
    assert results.machine()["machine"] in said
    assert results.machine()["date"] in said
