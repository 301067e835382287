"""A self-contained HTML page: models side by side, intervals, significance, pictures, samples, how it was made."""

import base64
import json
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment

from megatron_meap import __version__
from megatron_meap.evaluation.reporting.results import (
    Comparison,
    ModelResults,
    compare,
    first_with,
    headline,
    is_share,
    tasks_of,
)
from megatron_meap.evaluation.suites import Plan
from megatron_meap.evaluation.tasks.scoring import cell_name, likeliest

TEMPLATE = Path(__file__).parent / "report.html.jinja"
SHOWN_SAMPLES = 3
CHANCE = {
    "meap_needle_logprob": "10%",
    "meap_kv_logprob": "10% from 10 pairs on",
    "meap_kinship_logprob": "one in twice the number of needles",
    "meap_piqa": "50%",
}


def write(results: list[ModelResults], plan: Plan, pictures: Sequence[Path], command: str, path: Path) -> None:
    """Write the page.

    Args:
        results: the first is the baseline.
        plan: what was planned.
        pictures: PNG files to include.
        command: how to reproduce it.
        path: file to write.
    """
    tasks, comparisons = tasks_of(results), compare(results)
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text())
    path.write_text(
        page.render(
            models=[result.model for result in results],
            rows=[_row(results, comparisons, task) for task in tasks],
            pictures=[(one.stem, base64.b64encode(one.read_bytes()).decode()) for one in pictures],
            samples=[(task, _samples(results, task)) for task in tasks],
            left_out=plan.left_out,
            settings=json.dumps(plan.metadata, indent=1),
            command=command,
            made=time.strftime("%Y-%m-%d %H:%M"),
            versions=f"megatron-meap {__version__}, lm-eval {version('lm_eval')}, transformers "
            f"{version('transformers')}, torch {version('torch')}, Python {platform.python_version()}",
        )
    )


def _row(results: list[ModelResults], comparisons: dict[tuple[str, str], Comparison], task: str) -> dict[str, Any]:
    """A task's line in the table."""
    metric = headline(first_with(task, results), task) or "-"
    found = [result.estimate(task, metric) if task in result.samples else None for result in results]
    scale, digits = (100, 1) if is_share(metric) else (1, 3)
    cells = []
    for result, one in zip(results, found, strict=True):
        against = comparisons.get((task, result.model.name))
        cells.append(
            None
            if one is None
            else {
                "mean": f"{scale * one.mean:.{digits}f}",
                "interval": f"{scale * one.low:.{digits}f} to {scale * one.high:.{digits}f}",
                "difference": f"{scale * against.found.mean:+.{digits}f}" if against else None,
                "p": f"{against.adjusted_p:.3g}" if against else None,
                "significant": bool(against and against.adjusted_p < 0.05),
            }
        )
    return {
        "task": task,
        "metric": metric + (" (%)" if is_share(metric) else ""),
        "chance": CHANCE.get(task, ""),
        "samples": max((one.samples for one in found if one), default=0),
        "cells": cells,
    }


def _samples(results: list[ModelResults], task: str) -> list[dict[str, Any]]:
    """A few samples spread over the task, with what each model said."""
    records = first_with(task, results).samples[task]
    step = max(1, len(records) // SHOWN_SAMPLES)
    shown = []
    for record in records[::step][:SHOWN_SAMPLES]:
        said = []
        for result in results:
            same = [one for one in result.samples.get(task, []) if one["doc_hash"] == record["doc_hash"]]
            said += [(result.model.name, _said(one)) for one in same[:1]]
        answer = record["doc"].get("answer") or record["doc"].get("answers") or record["target"]
        shown.append(
            {
                "cell": cell_name(record["doc"].get("cell")),
                "prompt": record["arguments"][0][0],
                "answer": ", ".join(answer) if isinstance(answer, list) else str(answer),
                "said": said,
            }
        )
    return shown


def _said(record: dict[str, Any]) -> str:
    """The generated text, or the likeliest choice."""
    answers = record["filtered_resps"]
    if isinstance(answers[0], str):
        return answers[0].strip() or "(nothing)"
    likelihoods = [float(one[0]) for one in answers]
    best = likeliest(record["doc"], likelihoods)
    return f"{record['arguments'][best][1].strip()} ({likelihoods[best]:.2f} nats)"


def summary(results: list[ModelResults]) -> str:
    """The table of the page as plain text, for the terminal."""
    tasks, comparisons = tasks_of(results), compare(results)
    lines = [f"{'task':34}" + "".join(f"{result.model.name[:24]:>26}" for result in results)]
    for task in tasks:
        row = _row(results, comparisons, task)
        cells = ["–" if cell is None else f"{cell['mean']} ({cell['interval']})" for cell in row["cells"]]
        lines.append(f"{task + ' ' + row['metric'].split()[0]:34}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)
