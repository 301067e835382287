"""The pictures that people expect: needle heat maps, accuracy by position with bounds, bars, curves over tokens."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_meap.evaluation.reporting.results import ModelResults, headline, is_share

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
    """Draw what there is to draw.

    Returns:
        The pictures, in the order of a report.
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    tasks = list(dict.fromkeys(task for result in results for task in result.samples))
    tasks = [task for task in tasks if headline(_first(results, task), task)]
    shares = [task for task in tasks if is_share(headline(_first(results, task), task) or "")]
    drawn = [_overview(results, shares, folder / "overview.png")] if shares else []
    for task in tasks:
        having = [result for result in results if task in result.samples]
        names = next(iter(having[0].cells(task)), {})
        if "depth" in names:
            drawn.append(_heat_map(having, task, folder / f"{task}.png"))
        elif names:
            drawn.append(_by_last_dimension(having, task, folder / f"{task}.png"))
    if tasks and len({result.model.run for result in results}) < len([r for r in results if r.model.tokens]):
        drawn.append(_over_tokens(results, tasks, folder / "over_tokens.png"))
    return drawn


def label(name: str) -> str:
    """A model's name as matplotlib shows it unchanged: `$` begins a formula, `_` in front hides a legend's entry."""
    return ("\N{THIN SPACE}" if name.startswith("_") else "") + name.replace("$", r"\$")


def _scale(metric: str) -> float:
    return 100.0 if is_share(metric) else 1.0


def _title(figure: Any, text: str) -> None:
    """A title that is broken into lines where it is wider than the picture."""
    figure.suptitle(textwrap.fill(text, width=max(20, int(11 * figure.get_figwidth()))))


def _heat_map(results: list[ModelResults], task: str, path: Path) -> Path:
    """One panel a model: context length by depth, 0 at the top, red to green on a fixed scale of 0 to 100."""
    import numpy as np
    from matplotlib import pyplot

    cells = results[0].cells(task)
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    width = max(3.2, 0.7 * len(lengths) + 1.6)
    figure, axes = pyplot.subplots(
        1, len(results), figsize=(width * len(results) + 1, 0.42 * len(depths) + 2), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
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
    return _write(figure, path)


def _by_last_dimension(results: list[ModelResults], task: str, path: Path) -> Path:
    """One line a model over position or number of needles, with bootstrap intervals; a panel for each other value."""
    from matplotlib import pyplot

    metric = headline(results[0], task)
    assert metric is not None
    cells = results[0].cells(task)
    *others, last = cells[0]
    panels = list(dict.fromkeys(tuple(cell[name] for name in others) for cell in cells))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.6 * len(panels) + 1, 4.6), squeeze=False, sharey=True, layout="constrained"
    )
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
    return _write(figure, path)


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
    """Closed book or oracle of the same form, as a level line."""
    if not task.startswith("meap_multidoc"):
        return
    found = result.estimate(f"meap_multidoc_{bound}{'_logprob' if task.endswith('_logprob') else ''}", metric)
    if found is not None:
        name = f"{label(result.model.name)}, {'closed book' if bound == 'closedbook' else bound}"
        axis.axhline(_scale(metric) * found.mean, color=color, linestyle=style, linewidth=1, label=name)


def _overview(results: list[ModelResults], tasks: list[str], path: Path) -> Path:
    """Bars: every task that is a share, model beside model, with intervals."""
    import numpy as np
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 0.28 * len(tasks) * (len(results) + 1) + 1.8), layout="constrained")
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
    return _write(figure, path)


def _first(results: list[ModelResults], task: str) -> ModelResults:
    return next(result for result in results if task in result.samples)


def _over_tokens(results: list[ModelResults], tasks: list[str], path: Path) -> Path:
    """A panel for each task: its metric over training tokens, one line a run."""
    panels = []
    for task in tasks:
        metric = headline(_first(results, task), task) or ""
        lines: dict[str, list[tuple[float, Any]]] = {}
        for result in results:
            if result.model.tokens:
                points = lines.setdefault(result.model.run, [])
                points += [(result.model.tokens, result.estimate(task, metric))] if task in result.samples else []
        panels.append((task, metric, lines))
    return over_tokens(panels, path)


def over_tokens(panels: list[tuple[str, str, dict[str, list[tuple[float, Any]]]]], path: Path) -> Path:
    """Draw panels: title, metric, and for each run by name its points, tokens and `Estimate` (or None)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.2 * columns, 3.2 * rows), squeeze=False, layout="constrained"
    )
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
    return _write(figure, path)


def _write(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
