"""The page of a study: tables and figures of what is finished, and what is missing."""

import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_meap.files import whole_file
from megatron_meap.study.analysis import (
    METRICS,
    Comparison,
    Results,
    best_loss,
    compare,
    points_of,
    worth,
)
from megatron_meap.study.grid import BASELINE, Grid, Point, Stage

COLORS = {"ntp": "black", "meap": "tab:red", "replace": "tab:blue", "uniform": "tab:green", "mir": "tab:orange"}


def write_page(grid: Grid, results: Results, source: Path, page: Path) -> None:
    """Write the page and, in `results/` beside it, its figures.

    Args:
        grid: the study.
        results: what is finished.
        source: the file that the results are in.
        page: the Markdown file.
    """
    figures = page.with_suffix("")
    stages = [(stage, points_of(grid, stage, results)) for stage in grid.stages]
    parts = [_head(grid, results, lambda path: os.path.relpath(path, page.parent), source)]
    for number, (stage, points) in enumerate(stages, 1):
        done = [point for point in points if point in results]
        parts.append(
            f"## {stage.name}\n\n{stage.question[:1].upper()}{stage.question[1:]}? {_progress(stage, points, done)}"
        )
        if not done:
            continue
        if len({point.setting for point in done if point.objective == BASELINE}) > 1:
            parts.append(_tuning_table(done, results))
            continue
        rows = {metric: compare(done, results, metric) for metric in METRICS}
        parts.append(_comparison_table(rows))
        curves, gaps = figures / f"{number}-curves.svg", figures / f"{number}-differences.svg"
        draw_curves(grid, done, results, curves)
        parts.append(f"![Validation loss over the epochs]({figures.name}/{curves.name})")
        if any(len(row.seeds) > 1 and row.point.objective != BASELINE for row in rows["best"]):
            draw_differences(rows["best"], gaps)
            parts.append(f"![Paired differences to next-token prediction]({figures.name}/{gaps.name})")
    parts += [_worth_table(stages, results), _missing(stages, results), _repeat(results)]
    with whole_file(page, "w") as file:
        file.write("\n\n".join(part for part in parts if part) + "\n")


def _head(grid: Grid, results: Results, link: Callable[[Path], str], source: Path) -> str:
    seconds = sum(result["cpu_seconds"] for result in results.values())
    machines = ", ".join(sorted({result["machine"] for result in results.values()})) or "none yet"
    return f"""# Results: does input noise help?

Drawn by `python examples/study/study.py page` from [{source.name}]({link(source)}), a line a run; not edited by hand.
What is asked, and what counts as an effect, was [written down before]({link(grid.path.parent / "README.md")}).
Losses are of clean text of other novels, in nats per token; *best* is the lowest of a run's evaluations, *final* the
last. Differences are to next-token prediction with the same seed: negative is better. Intervals are of 95%.

**Scale**: {_scale(grid, results)}. It says nothing about models and texts a thousand times larger.
**Cost**: {len(results)} runs, {seconds / 60:.0f} minutes of processor time in all ({machines})."""


def _scale(grid: Grid, results: Results) -> str:
    if not results:
        return "nothing has been run"
    tokens, models = sorted({point.tokens for point in results}), sorted({point.model for point in results})
    return f"models {', '.join(models)} of `{grid.path.name}`, {tokens[0]:,} to {tokens[-1]:,} unique tokens"


def _progress(stage: Stage, points: Sequence[Point], done: Sequence[Point]) -> str:
    if not points:
        return f"**Not run**: it waits for “{stage.tuned_by}”."
    tuned = f" Settings are those chosen by “{stage.tuned_by}”." if stage.tuned_by else ""
    return (
        f"{len(done)} of {len(points)} runs are done.{tuned}" if done else f"**Not run** ({len(points)} runs).{tuned}"
    )


def _setting(point: Point) -> str:
    return f"weight decay {point.weight_decay:g}, dropout {point.dropout:g}"


def _tuning_table(done: Sequence[Point], results: Results) -> str:
    """Best loss by objective and setting, the mean over seeds."""
    settings = sorted({point.setting for point in done})
    lines = [
        "| objective | " + " | ".join(f"wd {decay:g}, dropout {dropout:g}" for decay, dropout in settings) + " |",
        "|---" * (len(settings) + 1) + "|",
    ]
    for name in dict.fromkeys(point.objective for point in done):
        cells = {}
        for setting in settings:
            losses = [best_loss(results[p]) for p in done if p.objective == name and p.setting == setting]
            cells[setting] = float(np.mean(losses)) if losses else np.inf
        lowest = min(cells.values())
        shown = (
            "-" if np.isinf(loss) else f"**{loss:.3f}**" if loss == lowest else f"{loss:.3f}" for loss in cells.values()
        )
        lines.append(f"| `{name}` | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _comparison_table(rows: dict[str, list[Comparison]]) -> str:
    names = "objective", "unique tokens", "setting", "seeds", "best loss", "difference", "p", "verdict", "final loss"
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for best, final in zip(rows["best"], rows["final"], strict=True):
        point, base = best.point, best.point.objective == BASELINE
        cells = [
            f"`{point.objective}`", f"{point.tokens:,}", _setting(point), ", ".join(map(str, best.seeds)),
            f"{best.loss:.3f}",
            *(("-", "-", "baseline") if base else (_gap(best), f"{best.p_value:.3f}", f"**{best.verdict}**")),
            f"{final.loss:.3f}" + ("" if base else f", {_gap(final)}"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _gap(row: Comparison) -> str:
    interval = f" [{row.low:+.3f}, {row.high:+.3f}]" if len(row.seeds) > 1 else ""
    return f"{row.difference:+.3f}{interval}"


def _worth_table(stages: Iterable[tuple[Stage, list[Point]]], results: Results) -> str:
    title = "## Worth in unique tokens\n\n"
    found = worth([point for stage, points in stages if stage.tuned_by for point in points], results)
    if not found:
        return title + "**Missing**: it takes three sizes that all objectives share."
    lines = [
        "`loss = a - b ln(tokens)`, a common `b`.",
        "",
        "| objective | worth so many times the tokens |",
        "|---|---|",
    ]
    lines += [f"| `{name}` | {each.times:.2f} [{each.low:.2f}, {each.high:.2f}] |" for name, each in found.items()]
    return title + "\n".join(lines)


def _missing(stages: Iterable[tuple[Stage, list[Point]]], results: Results) -> str:
    lines = []
    for stage, points in stages:
        missing = [point for point in points if point not in results]
        if missing or not points:
            lines.append(f"- {stage.name}: {f'{len(missing)} of {len(points)} runs' if points else 'all runs'}")
    return "## What is missing\n\n" + ("\n".join(lines) if lines else "Nothing of the grid.")


def _repeat(results: Results) -> str:
    if not results:
        return ""
    result = results[min(results)]
    environment = " ".join(f"{name}={shlex.quote(value)}" for name, value in result["environment"].items())
    return f"""## Repeat it

Every line of the results holds the command of its run. `python examples/study/study.py run --texts FOLDER` makes the
texts and runs all of them; after that a single run is its recorded command again, as the first one:

```bash
{environment} {result["command"]}
```"""


def draw_curves(grid: Grid, done: Sequence[Point], results: Results, path: Path) -> None:
    """Clean validation loss over epochs, the mean over seeds; a panel for each size."""
    sizes = sorted({(point.model, point.tokens) for point in done})
    figure, panels = _figure(len(sizes))
    for axes, (model, tokens) in zip(panels, sizes, strict=True):
        own = [point for point in done if (point.model, point.tokens) == (model, tokens)]
        for name in dict.fromkeys(point.objective for point in own):
            runs = [results[point] for point in own if point.objective == name]
            epochs = [int(step) / runs[0]["steps"] * own[0].epochs for step in runs[0]["validation"]]
            curves = np.array([list(run["validation"].values()) for run in runs])
            axes.plot(
                epochs,
                curves.mean(axis=0),
                "o-",
                markersize=3,
                color=COLORS.get(name),
                label=f"{name}, {len(runs)} seeds",
            )
        axes.set(title=f"{tokens:,} unique tokens", xlabel="epochs of the text", ylabel="clean validation loss (nats)")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    _save(figure, path)


def draw_differences(rows: Sequence[Comparison], path: Path) -> None:
    """Paired differences with their intervals, an objective a line; a panel for each size."""
    sizes = sorted({(row.point.model, row.point.tokens) for row in rows})
    figure, panels = _figure(len(sizes))
    for axes, (model, tokens) in zip(panels, sizes, strict=True):
        shown = [row for row in rows if (row.point.model, row.point.tokens) == (model, tokens) and len(row.seeds) > 1]
        shown = [row for row in shown if row.point.objective != BASELINE][::-1]
        for height, row in enumerate(shown):
            color = COLORS.get(row.point.objective)
            axes.plot([row.low, row.high], [height, height], color=color)
            axes.plot(row.difference, height, "o", color=color)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(shown)), [f"{row.point.objective} ({row.verdict})" for row in shown])
        axes.set(title=f"{tokens:,} unique tokens", xlabel="best loss minus that of ntp (nats); left is better")
        axes.grid(alpha=0.3, axis="x")
    _save(figure, path)


def _figure(panels: int) -> tuple[Any, Sequence[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "study"  # the same results give the same file
    figure, axes = pyplot.subplots(1, panels, figsize=(max(6.4, 4.8 * panels), 4), squeeze=False, layout="constrained")
    return figure, axes[0]


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    with whole_file(path, "w") as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
    pyplot.close(figure)
