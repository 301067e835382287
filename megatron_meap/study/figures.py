"""The figures of a study: curves of runs, and differences with their intervals."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from megatron_meap.files import whole_file
from megatron_meap.study.analysis import Comparison, Results
from megatron_meap.study.grid import BASELINE, Grid, Point

_IN_A_ROW = 3
"""Panels per row: with more, they are too small to read on a page of usual width."""

_COLORS = {"ntp": "black", "meap": "tab:red", "replace": "tab:blue", "uniform": "tab:green", "mir": "tab:orange"}


def _color(objective: str) -> str:
    """That of the objective, in its variants too (`mir-samples`)."""
    return _COLORS.get(objective.partition("-")[0], "tab:gray")


def draw_losses(grid: Grid, done: Sequence[Point], results: Results, path: Path) -> None:
    """Clean validation loss over epochs, the mean over seeds; a panel for each size."""

    def epochs(point: Point, step: int) -> float:
        return step / grid.steps(point) * point.epochs

    _draw_curves(done, results, path, "validation", epochs, "epochs of the text", "clean validation loss (nats)")


def draw_copying(done: Sequence[Point], results: Results, path: Path) -> None:
    """What copying saves, over the tokens trained on."""

    def tokens(point: Point, step: int) -> float:
        return step / results[point]["steps"] * results[point]["trained_tokens"] / 1e6

    _draw_curves(done, results, path, "copying", tokens, "million tokens trained on", "copying saves (nats per piece)")


def _draw_curves(
    done: Sequence[Point],
    results: Results,
    path: Path,
    quantity: str,
    place: Callable[[Point, int], float],
    across: str,
    up: str,
) -> None:
    """Each run thin, the mean over seeds thick."""
    sizes = sorted({(point.model, point.tokens) for point in done})
    figure, panels = _figure(len(sizes))
    for axes, (model, tokens) in zip(panels, sizes, strict=True):
        own = [point for point in done if (point.model, point.tokens) == (model, tokens)]
        for name in dict.fromkeys(point.objective for point in own):
            runs = [point for point in own if point.objective == name]
            curves = np.array([list(results[point][quantity].values()) for point in runs])
            places = [place(runs[0], int(step)) for step in results[runs[0]][quantity]]
            axes.plot(places, curves.T, linewidth=0.6, alpha=0.5, color=_color(name))
            axes.plot(places, curves.mean(axis=0), linewidth=2, color=_color(name), label=f"{name}, {len(runs)} seeds")
        axes.set(title=f"{tokens:,} tokens of text", xlabel=across, ylabel=up)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    _save(figure, path)


def draw_differences(panels: Mapping[str, Iterable[Comparison]], path: Path) -> None:
    """Paired differences in best loss with their intervals, one line per objective.

    Args:
        panels: comparisons by title.
        path: the SVG file.
    """
    figure, places = _figure(len(panels), sharex=True)
    for axes, (title, rows) in zip(places, panels.items(), strict=True):
        shown = [row for row in rows if row.point.objective != BASELINE and len(row.seeds) > 1][::-1]
        for height, row in enumerate(shown):
            color = _color(row.point.objective)
            axes.plot([row.low, row.high], [height, height], color=color)
            axes.plot(row.difference, height, "o", color=color)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(shown)), [f"{row.point.objective}\n({row.verdict})" for row in shown])
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("loss minus that of ntp (nats); left is better")
        axes.locator_params(axis="x", nbins=5)
        axes.grid(alpha=0.3, axis="x")
    _save(figure, path)


def draw_sizes(rows: Iterable[Comparison], path: Path) -> None:
    """Paired differences in best loss over unique tokens, with their intervals; a panel for each model.

    Args:
        rows: comparisons, of which those with one seed and objectives of one size are left out.
        path: the SVG file.
    """
    shown: dict[str, dict[str, list[Comparison]]] = {}
    for row in sorted(rows, key=lambda row: row.point.tokens):
        if row.point.objective != BASELINE and len(row.seeds) > 1:
            shown.setdefault(row.point.model, {}).setdefault(row.point.objective, []).append(row)
    figure, panels = _figure(len(shown))
    for axes, (model, objectives) in zip(panels, shown.items(), strict=True):
        lines = {name: own for name, own in objectives.items() if own[0].point.tokens != own[-1].point.tokens}
        for place, (name, own) in enumerate(lines.items()):
            beside = 1.03 ** (place - (len(lines) - 1) / 2)  # or one interval would hide another
            gaps = np.array([row.difference for row in own])
            intervals = [gaps - [row.low for row in own], [row.high for row in own] - gaps]
            places = [row.point.tokens * beside for row in own]
            axes.errorbar(places, gaps, intervals, marker="o", capsize=3, color=_color(name), label=name)
        axes.axhline(0, color="black", linewidth=0.8, label=BASELINE)
        axes.set_xscale("log")
        sizes = sorted({row.point.tokens for own in lines.values() for row in own})
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.set(xlabel="unique tokens", ylabel="loss minus that of ntp (nats); lower is better")
        if len(shown) > 1:
            axes.set_title(f"model {model}")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    _save(figure, path)


def _figure(panels: int, sharex: bool = False) -> tuple[Figure, Sequence[Any]]:
    columns, rows = min(panels, _IN_A_ROW), -(-panels // _IN_A_ROW)
    figure = Figure((max(6.4, 4.8 * columns), 4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=sharex)
    used, unused = list(axes.flat)[:panels], list(axes.flat)[panels:]
    for each in unused:
        each.remove()
    for each in used:
        each.tick_params(labelbottom=True)  # a shared axis has numbers only in the last row
    return figure, used


def _save(figure: Figure, path: Path) -> None:
    # With a fixed salt the same results give the same file.
    with whole_file(path, "w") as file, matplotlib.rc_context({"svg.hashsalt": "study"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
