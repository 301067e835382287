"""Figures of benchmarks, for `make bench`: medians with their spread, and the machine they come from."""

import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch


def turns(rounds: int, warm_up: int = 0) -> Iterator[int]:
    """Numbers of the rounds, those to warm up first; fewer rounds, but at least one, if `make bench` lacks the time.

    They may take half of the time that is left, for a benchmark can have several such loops.
    """
    begun = time.time()
    until = (begun + float(os.environ.get("BENCH_UNTIL", "inf"))) / 2
    for turn in range(warm_up + rounds):
        now = time.time()
        if turn > warm_up and now + (now - begun) / turn > until:
            break
        yield turn


def record(what: str, values: list[float], unit: str) -> None:
    """Append a figure to the file that `make bench` names in $BENCH_RESULTS; without it do nothing."""
    if (file := os.environ.get("BENCH_RESULTS")) is None:
        return
    found = {"what": what, "median": statistics.median(values), "low": min(values), "high": max(values), "unit": unit}
    with open(file, "a") as results:
        results.write(
            json.dumps(found | {"rounds": len(values), "command": os.environ["BENCH_COMMAND"]} | machine()) + "\n"
        )


def machine() -> dict[str, Any]:
    """Where and when a figure was measured."""
    with open("/proc/cpuinfo") as lines:
        names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    units = [name for name, there in (("AVX512_BF16", torch.cpu._is_avx512_bf16_supported()),
                                      ("AMX", torch.cpu._is_amx_tile_supported())) if there]  # fmt: skip
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    return {
        "machine": f"{', '.join(names) or platform.machine()}, {cores} cores, {' and '.join(units) or 'no bf16 units'}",
        "load": round(load, 1),
        "date": str(date.today()),
        "torch": torch.__version__,
    }


def table(file: Path) -> str:
    """The figures of a file in Markdown: a table for each command."""
    found = [json.loads(line) for line in file.read_text().splitlines()]
    if not found:
        return "No figures: no benchmark came to its first one."
    lines = []
    for command, figures in itertools.groupby(found, lambda each: each["command"]):
        lines += [f"`{command}`", "", "| what | median | spread | rounds |", "|---|---|---|---|"]
        for each in figures:
            middle, low, high = (digits(each[name]) for name in ("median", "low", "high"))
            spread = f"{low} to {high}" if each["rounds"] > 1 else ""
            lines.append(f"| {each['what']} | {middle} {each['unit']} | {spread} | {each['rounds']} |")
        lines.append("")
    places = sorted({f"{each['machine']}; {each['date']}; PyTorch {each['torch']}" for each in found})
    loads = [each["load"] for each in found]
    told = f"Load (jobs that want a core) while measuring: {min(loads)} to {max(loads)}."
    return "\n".join([*lines, *places, told])


def digits(value: float) -> str:
    """A figure to three digits, or to the unit where it has more."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
