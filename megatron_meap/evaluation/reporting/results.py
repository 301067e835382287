"""Results of models on tasks: as values by cell, with intervals and differences; saved as lm-eval's JSON and as CSV."""

import contextlib
import copy
import csv
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_meap.evaluation.models import Model
from megatron_meap.evaluation.reporting.statistics import Difference, Estimate, adjusted, difference, estimate
from megatron_meap.evaluation.tasks.scoring import Cell, cell_name

FIRST_METRICS = ("acc_norm", "best_subspan_em", "faithful", "acc", "logprob_per_token", "exact_match")
"""The metric that represents a task: the first of these that it has."""

SHARES = {"acc", "acc_norm", "best_subspan_em", "faithful", "judged", "greedy", "exact_match"}
"""Metrics that are shares."""


@dataclass
class ModelResults:
    """What one model did."""

    model: Model
    results: dict[str, Any] = field(default_factory=dict)
    """In lm-eval's format, without the samples."""
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By task, lm-eval's records of samples."""

    def metrics(self, task: str) -> list[str]:
        """Names of the task's metrics, without those of cells; `name,filter`, as in lm-eval, if there is a filter.

        For a task without metrics of single samples (perplexity), those of its aggregate.
        """
        found: dict[str, None] = {}
        for sample in self.samples[task]:
            suffix = "" if sample.get("filter", "none") == "none" else f",{sample['filter']}"
            names = (name for name in sample["metrics"] if " " not in name and _is_measured(name, sample[name]))
            found |= dict.fromkeys(f"{name}{suffix}" for name in names)
        return list(found) or [name for name, _ in self._aggregates(task)]

    def values(self, task: str, metric: str, cell: Cell | None = None) -> dict[str, float]:
        """Values of the independent samples by their names, in all cells or in one.

        Samples that share a question (`meap_group`), with its answer in different places, count as one: their mean.
        """
        name, _, wanted = metric.partition(",")
        found: dict[str, list[float]] = {}
        for sample in self.samples.get(task, []):
            doc = sample["doc"]
            inside = cell is None or doc.get("cell") == cell
            filtered = sample.get("filter", "none") == (wanted or "none")
            if inside and filtered and _is_measured(name, sample.get(name)):
                found.setdefault(doc.get("meap_group") or sample["doc_hash"], []).append(float(sample[name]))
        return {unit: sum(each) / len(each) for unit, each in found.items()}

    def cells(self, task: str) -> list[Cell]:
        """The task's cells, in the order of the samples."""
        found = (sample["doc"].get("cell") for sample in self.samples.get(task, []))
        return list({tuple(cell.items()): cell for cell in found if cell}.values())

    def estimate(self, task: str, metric: str, cell: Cell | None = None) -> Estimate | None:
        """Mean and interval; None without samples."""
        values = self.values(task, metric, cell)
        if values or cell is not None:
            return estimate(list(values.values())) if values else None
        return dict(self._aggregates(task)).get(metric)

    def _aggregates(self, task: str) -> Iterator[tuple[str, Estimate]]:
        """lm-eval's own figures of a task, plus or minus 1.96 standard errors if it gives any."""
        figures = self.results.get("results", {}).get(task, {})
        for key, value in figures.items():
            name, _, kind = key.partition(",")
            if isinstance(value, int | float) and kind and not name.endswith("_stderr"):
                error = figures.get(f"{name}_stderr,{kind}")
                width = 1.96 * error if isinstance(error, int | float) else 0.0
                label = name if kind == "none" else key
                yield label, Estimate(value, value - width, value + width, len(self.samples[task]))


def _is_measured(metric: str, value: Any) -> bool:
    """Whether a sample has this metric: RULER's, named after lengths, are -1 for all lengths but the sample's."""
    return isinstance(value, int | float) and not (metric.isdigit() and value == -1)


def is_share(metric: str) -> bool:
    """Whether a metric is a share, shown as percent; those of RULER's tasks, named after a length, are."""
    name = metric.partition(",")[0]
    return name in SHARES or name.isdigit()


def tasks_of(results: list[ModelResults]) -> list[str]:
    """All tasks that some model did, each once."""
    return list(dict.fromkeys(task for result in results for task in result.samples))


def first_with(task: str, results: list[ModelResults]) -> ModelResults:
    """The first model that did the task."""
    return next(result for result in results if task in result.samples)


def headline(result: ModelResults, task: str) -> str | None:
    """The metric that represents the task; None if it has none."""
    metrics = result.metrics(task)
    first = (metric for name in FIRST_METRICS for metric in metrics if metric.partition(",")[0] == name)
    return next(first, metrics[0] if metrics else None)


@dataclass(frozen=True)
class Comparison:
    """A model against the baseline on one task."""

    task: str
    metric: str
    model: str
    found: Difference
    adjusted_p: float
    """For all comparisons of the evaluation together."""


def compare(results: list[ModelResults]) -> dict[tuple[str, str], Comparison]:
    """Each model against the first, in every task's headline metric over the samples of both, by (task, model)."""
    rows: list[tuple[str, str, str, Difference]] = []
    if results:
        base = results[0]
        for other in results[1:]:
            for task in other.samples:
                if (metric := headline(other, task)) is None:
                    continue
                mine, theirs = other.values(task, metric), base.values(task, metric)
                shared = [key for key in mine if key in theirs]
                if shared:
                    found = difference([mine[key] for key in shared], [theirs[key] for key in shared])
                    rows.append((task, metric, other.model.name, found))
    p_values = adjusted([found.p_value for *_, found in rows])
    return {
        (task, model): Comparison(task, metric, model, found, p)
        for (task, metric, model, found), p in zip(rows, p_values, strict=True)
    }


def save(results: list[ModelResults], output: Path) -> None:
    """Write lm-eval's JSON of each model, `results.csv` and `differences.csv`."""
    output.mkdir(parents=True, exist_ok=True)
    for folder in ("lm_eval", "pictures"):  # of an earlier call
        shutil.rmtree(output / folder, ignore_errors=True)
    for result in results:
        _save_lm_eval(result, output / "lm_eval")
    with _table(output / "results.csv", "model tokens task cell metric value low high samples") as table:
        for result in results:
            table.writerows(_rows(result))
    with _table(output / "differences.csv", "model baseline task metric difference low high p adjusted_p") as table:
        for one in compare(results).values():
            found, base = one.found, results[0].model.name
            numbers = found.mean, found.low, found.high, found.p_value, one.adjusted_p
            table.writerow([one.model, base, one.task, one.metric, *map(_short, numbers)])


def _rows(result: ModelResults) -> Iterator[list[Any]]:
    for task in result.samples:
        for cell in [None, *result.cells(task)]:
            for metric in result.metrics(task):
                found = result.estimate(task, metric, cell)
                if found is not None:
                    numbers = map(_short, (found.mean, found.low, found.high))
                    model = [result.model.name, result.model.tokens or ""]
                    yield [*model, task, cell_name(cell), metric, *numbers, found.samples]


def _short(number: float) -> str:
    return f"{number:.6g}"


@contextlib.contextmanager
def _table(path: Path, columns: str) -> Iterator[Any]:
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns.split())
        yield table


def _save_lm_eval(result: ModelResults, folder: Path) -> None:
    """Write what `lm_eval --output_path --log_samples` writes, with lm-eval's own writer."""
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=str(folder))
    tracker.general_config_tracker.log_experiment_args(
        model_source="hf",
        model_args=f"pretrained={result.model.name}",
        system_instruction=None,
        chat_template=None,
        fewshot_as_multiturn=False,
    )
    copied = copy.deepcopy(result)  # the writer changes what it writes
    tracker.save_results_aggregated(copied.results, copied.samples)
    for task, samples in copied.samples.items():
        tracker.save_results_samples(task_name=task, samples=samples)
