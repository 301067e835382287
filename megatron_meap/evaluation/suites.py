"""Which tasks are run on which samples: by name, or as the suites `quick` and `paper`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_meap.errors import UsageError
from megatron_meap.evaluation.tasks.commonsense import HUB_TASKS
from megatron_meap.evaluation.tasks.judge import ENVIRONMENT as JUDGE

TASKS = Path(__file__).parent / "tasks"
"""Our task files, for lm-eval's `--include_path`."""

MULTIDOC = tuple(
    f"meap_multidoc{kind}{form}" for form in ("", "_logprob") for kind in ("10", "20", "_closedbook", "_oracle")
)
QUICK_LONGEST = 4096
QUICK_PIQA = 200
PAPER_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)

NEEDS = {"meap_multidoc": "qa_file", "meap_piqa": "piqa_file", "meap_faithfulness": "summaries_file"}
"""Beginnings of task names, and the file that such a task needs."""


@dataclass(frozen=True)
class Plan:
    """What to run."""

    tasks: list[str]
    metadata: dict[str, Any]
    """For lm-eval's tasks; the keys are those of `Options`."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Tasks of the suite that are not run, and why."""
    suite: str | None = None
    """Of a suite, a task that cannot load its data is left out instead of ending the evaluation."""


def make_plan(suite: str | None, tasks: Sequence[str], given: dict[str, Any], context: int) -> Plan:
    """The tasks and their settings.

    Args:
        suite: `quick`, `paper` or None.
        tasks: further tasks by name, ours or lm-eval's.
        given: the `Options` set by the user; the suite chooses the others.
        context: tokens of the shortest context among the models.

    Raises:
        UsageError: a context length is longer than the models', or a task named by the user lacks its file.
    """
    settings = {"quick": _quick, "paper": _paper}.get(suite or "", _plain)(context)
    metadata = settings | {name: value for name, value in given.items() if value is not None}
    for length in metadata["max_seq_lengths"]:
        if length > context:
            raise UsageError(
                f"--context-lengths {length}: a model's context is only {context} tokens; use shorter ones"
            )
    wanted = {"quick": quick_tasks(metadata), "paper": paper_tasks(metadata)}.get(suite or "", [])
    left_out = {task: f"needs --{flag.replace('_', '-')}" for task in wanted if (flag := missing(task, metadata))}
    for task in tasks:
        if flag := missing(task, metadata):
            raise UsageError(f"--{flag.replace('_', '-')}: needed for {task}")
    chosen = [*(task for task in wanted if task not in left_out), *tasks]
    if not chosen:
        raise UsageError("nothing to run: give --suite quick, --suite paper, or --tasks")
    return Plan(list(dict.fromkeys(chosen)), metadata, left_out, suite)


def missing(task: str, metadata: dict[str, Any]) -> str | None:
    """The option that a task needs and has not been given: a file, or the judge."""
    for beginning, name in NEEDS.items():
        if task.startswith(beginning) and not metadata.get(name):
            return name
    if task == "meap_faithfulness" and not all(os.environ.get(name) for name in JUDGE):
        return "judge_url and --judge-model"
    return None


def quick_tasks(metadata: dict[str, Any]) -> list[str]:
    """Minutes on a laptop for a small model."""
    questions = (
        ["meap_multidoc", "meap_multidoc_logprob", *MULTIDOC[2:4], *MULTIDOC[6:8]] if metadata["qa_file"] else []
    )
    return [
        "meap_needle", "meap_needle_logprob", "meap_kv", "meap_kv_logprob", "meap_kinship_logprob", *questions,
        *(["meap_piqa"] if metadata["piqa_file"] else []),
    ]  # fmt: skip


def paper_tasks(metadata: dict[str, Any]) -> list[str]:
    """Everything that the paper reports."""
    commonsense = ["meap_piqa" if task == "piqa" and metadata["piqa_file"] else task for task in HUB_TASKS]
    return ["meap_needle", "meap_kv", "meap_kinship", *MULTIDOC, *commonsense, "meap_faithfulness"]


def _plain(context: int) -> dict[str, Any]:
    return {"max_seq_lengths": [context], "samples": 10, "qa_file": None, "piqa_file": None, "summaries_file": None}


def _quick(context: int) -> dict[str, Any]:
    longest = min(context, QUICK_LONGEST)
    small = longest < 2048  # UUIDs would leave room for a handful of pairs only
    return _plain(context) | {
        "max_seq_lengths": [longest // 2, longest] if longest >= 512 else [longest],
        "samples": 8,
        "piqa_rows": QUICK_PIQA,
        "kv_digits": 4 if small else None,
        "needles": [2] if longest < 512 else None,  # of two families: more leave no room for a text around them
    }


def _paper(context: int) -> dict[str, Any]:
    return _plain(context) | {
        "max_seq_lengths": [length for length in PAPER_LENGTHS if length <= context] or [context],
        "depths": list(range(0, 101, 10)),
        "samples": 20,
    }
