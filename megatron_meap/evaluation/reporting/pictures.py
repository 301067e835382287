"""The pictures that people expect: needle heat maps, accuracy by position with bounds, bars, curves over tokens."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from megatron_meap.evaluation.reporting.results import ModelResults, first_with, headline, is_share, tasks_of

DPI = 110
TITLES = {
    "meap_needle": "Needle in a haystack",
    "meap_needle_logprob": "Needle in a haystack, by log-likelihood among 10",
    "meap_kv": "Key-value retrieval",
    "meap_kv_logprob": "Key-value retrieval, by log-likelihood among up to 10",
    "meap_kinship": "Kinship reasoning",
    "meap_kinship_logprob": "Kinship reasoning, by log-likelihood among the chain's names",
}
AXES = {
    "length": "context length (tokens)",
    "depth": "depth of the needle (%)",
    "position": "position of the gold entry (0 is first)",
    "needles": "needles in the chain",
    "pairs": "pairs",
}
METRICS = {
    "acc": "accuracy (%)",
    "acc_norm": "accuracy, length-normalised (%)",
    "best_subspan_em": "best subspan match (%)",
    "faithful": "faithful summaries (%)",
    "greedy": "written by greedy decoding (%)",
    "logprob": "log-probability of the answer (nats)",
    "logprob_per_token": "log-probability of the answer (nats per token)",
}


def draw_all(results: list[ModelResults], folder: Path) -> list[Path]:
    """Draw what there is to draw; returns the pictures, in the order of a report."""
    folder.mkdir(parents=True, exist_ok=True)
    headlines = {task: headline(first_with(task, results), task) for task in tasks_of(results)}
    tasks = [task for task, metric in headlines.items() if metric]
    shares = [task for task in tasks if is_share(headlines[task] or "")]
    drawn = {"overview": _overview(results, shares)} if shares else {}
    for task in tasks:
        having = [result for result in results if task in result.samples]
        names = next(iter(having[0].cells(task)), {})
        if "depth" in names:
            drawn[task] = _heat_map(having, task)
        elif names:
            drawn[task] = _by_last_dimension(having, task)
    if tasks and len({result.model.run for result in results}) < len([r for r in results if r.model.tokens]):
        drawn["over_tokens"] = _over_tokens(results, tasks)
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=DPI)
    return [folder / f"{name}.png" for name in drawn]


def label(name: str) -> str:
    """A model's name, escaped for matplotlib: `$` begins a formula, a leading `_` hides an entry of the legend."""
    return ("\N{THIN SPACE}" if name.startswith("_") else "") + name.replace("$", r"\$")


def _scale(metric: str) -> float:
    return 100.0 if is_share(metric) else 1.0


def _title(figure: Figure, text: str) -> None:
    """A title, broken into lines where it is wider than the picture."""
    figure.suptitle(textwrap.fill(text, width=max(20, int(11 * figure.get_figwidth()))))


def _heat_map(results: list[ModelResults], task: str) -> Figure:
    """One panel per model: context length by depth, 0 at the top, red to green on a fixed scale of 0 to 100."""
    cells = results[0].cells(task)
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    width = max(3.2, 0.7 * len(lengths) + 1.6)
    figure = Figure((width * len(results) + 1, 0.42 * len(depths) + 2), layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False, sharey=True)
    for axis, result in zip(axes[0], results, strict=True):
        grid = np.full((len(depths), len(lengths)), np.nan)
        for cell in result.cells(task):
            found = result.estimate(task, "acc", cell)
            assert found is not None
            grid[depths.index(cell["depth"]), lengths.index(cell["length"])] = 100 * found.mean
        image = axis.imshow(grid, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(grid):
            color = "white" if value < 15 or value > 85 else "black"  # the ends of the scale are dark
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
        axis.set(title=f"{label(result.model.name)}: {np.nanmean(grid):.1f}", xlabel="context length (tokens)")
        axis.set_xticks(range(len(lengths)), [f"{length:g}" for length in lengths])
        axis.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes[0][0].set_ylabel("depth of the needle (%)")
    figure.colorbar(image, ax=list(axes[0]), label="accuracy (%)")
    _title(figure, TITLES.get(task, task))
    return figure


def _by_last_dimension(results: list[ModelResults], task: str) -> Figure:
    """One line per model over position or number of needles, with bootstrap intervals; a panel per other value."""
    metric = headline(results[0], task)
    assert metric is not None
    cells = results[0].cells(task)
    *others, last = cells[0]
    panels = list(dict.fromkeys(tuple(cell[name] for name in others) for cell in cells))
    figure = Figure((4.6 * len(panels) + 1, 4.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for axis, panel in zip(axes[0], panels, strict=True):
        inside = [cell for cell in cells if tuple(cell[name] for name in others) == panel]
        for color, result in enumerate(results):
            points = [(cell[last], result.estimate(task, metric, cell)) for cell in inside]
            _line(axis, label(result.model.name), f"C{color}", metric, points)
            for bound, style in (("closedbook", ":"), ("oracle", "--")):
                _bound(axis, result, task, metric, bound, f"C{color}", style)
        axis.set(xlabel=AXES.get(last, last), title=", ".join(f"{n} {v:g}" for n, v in zip(others, panel, strict=True)))
        axis.set_xticks([cell[last] for cell in inside])
        axis.grid(alpha=0.3)
        if is_share(metric):
            axis.set_ylim(-3, 103)
    axes[0][0].set_ylabel(METRICS.get(metric, metric))
    handles, names = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, loc="outside lower center", ncols=min(3, len(names)))
    _title(figure, TITLES.get(task, _multidoc_title(task)))
    return figure


def _multidoc_title(task: str) -> str:
    if not task.startswith("meap_multidoc"):
        return task
    form = "log-probability of the gold answer" if task.endswith("_logprob") else "answers"
    count = task.removeprefix("meap_multidoc").removesuffix("_logprob")
    return f"Question answering over {count or 'several'} documents: {form}"


def _line(axis: Any, name: str, color: str, metric: str, points: Sequence[tuple[float, Any]]) -> None:
    """A line with its intervals."""
    scale = _scale(metric)
    shown = [(x, found) for x, found in points if found is not None]
    heights = [scale * found.mean for _, found in shown]
    below = [scale * (found.mean - found.low) for _, found in shown]
    above = [scale * (found.high - found.mean) for _, found in shown]
    axis.errorbar([x for x, _ in shown], heights, [below, above], color=color, label=name, marker="o", capsize=3)


def _bound(axis: Any, result: ModelResults, task: str, metric: str, bound: str, color: str, style: str) -> None:
    """Closed book or oracle in the same form, as a horizontal line."""
    if not task.startswith("meap_multidoc"):
        return
    found = result.estimate(f"meap_multidoc_{bound}{'_logprob' if task.endswith('_logprob') else ''}", metric)
    if found is not None:
        name = f"{label(result.model.name)}, {'closed book' if bound == 'closedbook' else bound}"
        axis.axhline(_scale(metric) * found.mean, color=color, linestyle=style, linewidth=1, label=name)


def _overview(results: list[ModelResults], tasks: list[str]) -> Figure:
    """Bars of every task that is measured as a share, the models side by side, with intervals."""
    figure = Figure((8, 0.28 * len(tasks) * (len(results) + 1) + 1.8), layout="constrained")
    axis = figure.subplots()
    thickness = 0.8 / len(results)
    for i, result in enumerate(results):
        found = [
            result.estimate(task, headline(result, task) or "") if task in result.samples else None for task in tasks
        ]
        means = np.array([100 * one.mean if one else np.nan for one in found])
        errors = [
            [100 * (one.mean - one.low) if one else 0 for one in found],
            [100 * (one.high - one.mean) if one else 0 for one in found],
        ]
        places = np.arange(len(tasks)) + (i - (len(results) - 1) / 2) * thickness
        axis.barh(places, means, 0.9 * thickness, xerr=errors, label=label(result.model.name), color=f"C{i}", capsize=2)
    axis.set_yticks(range(len(tasks)), tasks)
    axis.invert_yaxis()
    axis.set(xlim=(0, 105), xlabel="percent, with 95% bootstrap intervals", title="All tasks")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center", ncols=min(3, len(results)))
    return figure


def _over_tokens(results: list[ModelResults], tasks: list[str]) -> Figure:
    """A panel for each task: its metric over training tokens, one line per run."""
    panels = []
    for task in tasks:
        metric = headline(first_with(task, results), task) or ""
        lines: dict[str, list[tuple[float, Any]]] = {}
        for result in results:
            if result.model.tokens:
                points = lines.setdefault(result.model.run, [])
                points += [(result.model.tokens, result.estimate(task, metric))] if task in result.samples else []
        panels.append((task, metric, lines))
    return over_tokens(panels)


def over_tokens(panels: list[tuple[str, str, dict[str, list[tuple[float, Any]]]]]) -> Figure:
    """Draw panels: title, metric, and for each run by name its points (tokens, and an `Estimate` or None)."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure((4.2 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, metric, lines) in zip(axes.flat, panels, strict=False):
        for color, (run, points) in enumerate(lines.items()):
            _line(axis, label(run), f"C{color}", metric, sorted(points, key=lambda point: point[0]))
        axis.set(title=title, xlabel="training tokens", ylabel=METRICS.get(metric, metric))
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.grid(alpha=0.3)
        if is_share(metric):
            axis.set_ylim(-3, 103)
    axes[0][0].legend(fontsize=8)
    return figure
