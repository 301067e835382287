"""The page of a study: tables and figures of what is finished, and what is missing."""

import math
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_meap.files import whole_file
from megatron_meap.study import figures
from megatron_meap.study.analysis import (
    COPIES,
    FEWEST,
    Comparison,
    Results,
    best_loss,
    compare,
    copying_begins,
    points_of,
    worth,
)
from megatron_meap.study.grid import BASELINE, Grid, Point, Stage
from megatron_meap.study.runs import NUMBERS


@dataclass(frozen=True)
class Written:
    """A grid and what is known of its runs."""

    grid: Grid
    results: Results
    again: Results
    """Of runs that were made a second time."""
    source: Path
    """The file that the results are in."""


def write_page(studies: Sequence[Written], page: Path) -> None:
    """Write the page and, in the folder of its name beside it, its figures."""
    folder = page.with_suffix("")
    parts, panels = [_head(studies, page)], {}
    for study in studies:
        for number, stage in enumerate(study.grid.stages, 1):
            text, rows = _section(study, stage, folder / f"{study.grid.path.stem}-{number}")
            parts.append(text)
            if any(row.point.objective != BASELINE and len(row.seeds) >= FEWEST for row in rows):
                setting = "each objective tuned" if stage.tuned_by else f"all with {_setting(rows[0].point)}"
                panels[f"{stage.name}\n{setting}"] = rows
    if panels:
        overview = folder / "overview.svg"
        figures.draw_differences(panels, overview)
        parts.insert(1, f"![Differences to next-token prediction]({folder.name}/{overview.name})")
    parts += [_worth_table(studies), _missing(studies), _repeat(studies)]
    with whole_file(page, "w") as file:
        file.write("\n\n".join(part for part in parts if part) + "\n")


def _head(studies: Sequence[Written], page: Path) -> str:
    def link(path: Path) -> str:
        return os.path.relpath(path, page.parent)

    files = ", ".join(f"[{study.source.name}]({link(study.source)})" for study in studies if study.results)
    every = [result for study in studies for result in study.results.values()]
    seconds = sum(result["cpu_seconds"] for result in every)
    scale = "; ".join(_scale(study) for study in studies if study.results) or "nothing has been run"
    rules = link(studies[0].grid.path.parent / "README.md")
    known = sum("texts" in result for result in every)
    machines = ", ".join(sorted({result["machine"] for result in every})) or "none yet"
    return f"""# Results: does input noise help?

Drawn by `python examples/study/study.py page` from {files or "no results yet"}, a line a run; not edited by hand.
What is asked, and what counts as an effect, was [written down before]({rules}).
Losses are of clean text of other novels, in nats per token; *best* is the lowest of a run's evaluations, *final* the
last. Differences are to next-token prediction with the same seed: negative is better. Intervals are of 95%, of each
comparison alone; p and the verdict are corrected for the number of comparisons in a table.

**Scale**: {scale}. It says nothing about models and texts a thousand times larger.
**Cost**: {len(every)} runs, {seconds / 60:.0f} minutes of processor time in all ({machines}).
**Texts**: the records of {known} runs hold a digest of theirs; of {len(every) - known} older ones it was
not recorded."""


def _scale(study: Written) -> str:
    tokens, models = sorted({p.tokens for p in study.results}), sorted({p.model for p in study.results})
    size = " to ".join(f"{each:,}" for each in dict.fromkeys((tokens[0], tokens[-1])))
    return f"models {', '.join(models)} of `{study.grid.path.name}`, {size} unique tokens"


def _section(study: Written, stage: Stage, figure: Path) -> tuple[str, list[Comparison]]:
    """A stage's part of the page, and its comparisons of the best loss where it is judged by that."""
    points, results = points_of(study.grid, stage, study.results), study.results
    done = [point for point in points if point in results]
    parts = [f"## {stage.name}\n\n{stage.question[:1].upper()}{stage.question[1:]}? {_progress(stage, points, done)}"]
    if not done:
        return parts[0], []
    if len({point.setting for point in done if point.objective == BASELINE}) > 1:
        return "\n\n".join([*parts, _tuning_table(done, results)]), []
    if all(results[point].get("copying") for point in done):
        copying = figure.with_name(f"{figure.name}-copying.svg")
        figures.draw_copying(done, results, copying)
        parts += [
            _COPYING,
            _copying_table(done, results),
            f"![What copying saves]({copying.parent.name}/{copying.name})",
        ]
        return "\n\n".join(parts), []
    rows = compare(done, results, "best")
    parts.append(_loss_table(rows, compare(done, results, "final")))
    losses = figure.with_name(f"{figure.name}-losses.svg")
    figures.draw_losses(study.grid, done, results, losses)
    parts.append(f"![Clean validation loss over the epochs]({losses.parent.name}/{losses.name})")
    return "\n\n".join(parts), rows


def _progress(stage: Stage, points: Sequence[Point], done: Sequence[Point]) -> str:
    if not points:
        return f"**Not run**: it waits for “{stage.tuned_by}”."
    tuned = f" Settings are those chosen by “{stage.tuned_by}”." if stage.tuned_by else ""
    return (
        f"{len(done)} of {len(points)} runs are done.{tuned}" if done else f"**Not run** ({len(points)} runs).{tuned}"
    )


def _setting(point: Point) -> str:
    return f"weight decay {point.weight_decay:g}, dropout {point.dropout:g}"


def _table(names: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(names)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *rows))


def _tuning_table(done: Sequence[Point], results: Results) -> str:
    """Best loss by objective and setting, the mean over seeds."""
    settings = sorted({point.setting for point in done})
    rows = []
    for name in dict.fromkeys(point.objective for point in done):
        cells = {}
        for setting in settings:
            losses = [best_loss(results[p]) for p in done if p.objective == name and p.setting == setting]
            cells[setting] = float(np.mean(losses)) if losses else np.inf
        lowest = min(cells.values())
        shown = (
            "-" if np.isinf(loss) else f"**{loss:.3f}**" if loss == lowest else f"{loss:.3f}" for loss in cells.values()
        )
        rows.append([f"`{name}`", *shown])
    return _table(["objective", *(f"wd {decay:g}, dropout {dropout:g}" for decay, dropout in settings)], rows)


def _loss_table(best_rows: Sequence[Comparison], final_rows: Sequence[Comparison]) -> str:
    rows = []
    for best, final in zip(best_rows, final_rows, strict=True):
        point, base = best.point, best.point.objective == BASELINE
        rows.append([
            f"`{point.objective}`", f"{point.tokens:,}", _setting(point), ", ".join(map(str, best.seeds)),
            f"{best.value:.3f}", *_judged(best),
            f"{final.value:.3f}" + ("" if base else f", {_gap(final)}"),
        ])  # fmt: skip
    names = "objective", "unique tokens", "setting", "seeds", "best loss", "difference", "p", "verdict", "final loss"
    return _table(names, rows)


_COPYING = f"""What copying saves, per piece of a passage that came before: the nats by which the text costs more with
the order of its pieces drawn anew. Copying begins where it saves more than {COPIES:g} nat; the tokens until then are a
geometric mean. What stands of the end is shown, and not judged."""


def _copying_table(done: Sequence[Point], results: Results) -> str:
    """Tokens until copying (their geometric mean), what it saves at the end, and what the text costs then."""
    rows, measures = [], [compare(done, results, metric) for metric in ("begins", "gain", "planted")]
    for begins, *ends in zip(*measures, strict=True):
        name = begins.point.objective
        own = [point for point in done if point.objective == name and point.seed in begins.seeds]
        copy = sum(copying_begins(results[point]) is not None for point in own)
        rows.append([
            f"`{name}`", ", ".join(map(str, begins.seeds)), f"{copy} of {len(own)}", f"{math.exp(begins.value):,.0f}",
            *_judged(begins),
            *(f"{end.value:.2f}" + ("" if name == BASELINE else f", {_gap(end)}") for end in ends),
        ])  # fmt: skip
    names = (
        "objective", "seeds", "copy", "tokens until copying", "difference of its logarithm", "p", "verdict",
        "copying saves at the end", "loss of text with passages at the end",
    )  # fmt: skip
    return _table(names, rows)


def _judged(row: Comparison) -> tuple[str, str, str]:
    if row.point.objective == BASELINE:
        return "-", "-", "baseline"
    return _gap(row), f"{row.p_value:.3f}", f"**{row.verdict}**"


def _gap(row: Comparison) -> str:
    interval = f" [{row.low:+.3f}, {row.high:+.3f}]" if len(row.seeds) > 1 else ""
    return f"{row.difference:+.3f}{interval}"


def _worth_table(studies: Sequence[Written]) -> str:
    title = "## Worth in unique tokens\n\n"
    for study in studies:
        stages = [stage for stage in study.grid.stages if stage.tuned_by]
        found = worth([p for stage in stages for p in points_of(study.grid, stage, study.results)], study.results)
        if found:
            rows = [
                [f"`{name}`", f"{each.times:.2f} [{each.low:.2f}, {each.high:.2f}]"] for name, each in found.items()
            ]
            table = _table(["objective", "worth so many times the tokens"], rows)
            return f"{title}`loss = a - b ln(tokens)`, a common `b`.\n\n{table}"
    return title + "**Missing**: it takes three sizes with three seeds each."


def _missing(studies: Sequence[Written]) -> str:
    lines = []
    for study in studies:
        for stage in study.grid.stages:
            points = points_of(study.grid, stage, study.results)
            missing = [point for point in points if point not in study.results]
            if missing or not points:
                lines.append(f"- {stage.name}: {f'{len(missing)} of {len(points)} runs' if points else 'all runs'}")
    return "## What is missing\n\n" + ("\n".join(lines) if lines else "Nothing of the grids.")


def _repeat(studies: Sequence[Written]) -> str:
    done = next((study.results for study in studies if study.results), None)
    if done is None:
        return ""
    result = done[min(done)]
    environment = " ".join(f"{name}={shlex.quote(value)}" for name, value in result["environment"].items())
    again = [_same(point, study) for study in studies for point in sorted(study.again) if point in study.results]
    return f"""## Repeat it

Every line of the results holds the command of its run. `python examples/study/study.py run --texts FOLDER` makes the
texts and runs all of them; `study.py again` makes one a second time from its recorded command, as the first one's:

```bash
{environment} {result["command"]}
```

{chr(10).join(again) or "No run was made a second time yet."}"""


def _same(point: Point, study: Written) -> str:
    first, second = study.results[point], study.again[point]
    different = [name for name in NUMBERS if first.get(name, {}) != second.get(name, {})]
    texts = " and then ".join(each.get("texts", "not recorded")[:12] for each in (first, second))
    found = (
        f"**differs** in {', '.join(different)} (digest of the texts: {texts}); see the changes in the study's README"
        if different
        else "gave the same numbers, digit for digit"
    )
    where = "on the same kind of machine" if first["machine"] == second["machine"] else f"on {second['machine']}"
    return f"- `{point.name}`, made a second time from its recorded command, {where}: {found}."
