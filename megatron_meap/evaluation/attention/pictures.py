"""Pictures of a report on attention: bars by segment, curves by layer, maps of layer and head."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megatron_meap.evaluation.attention.inputs import SEGMENTS
from megatron_meap.evaluation.reporting.pictures import label as shown

COLORS = ("tab:gray", "tab:red")
"""Of the first model, the baseline, and of the second."""

FILES = ("segments.png", "layers.png", "heads.png")


def draw(report: dict[str, Any], output: Path) -> None:
    """Draw the pictures `FILES` of a report into a directory."""
    for name, picture in zip(FILES, (_segments, _layers, _heads), strict=True):
        picture(report).savefig(output / name, dpi=120)


def _segments(report: dict[str, Any]) -> Figure:
    """Share of the attention by segment, a bar for each model, and what uniform attention would give."""
    figure = Figure((8, 4.8), layout="constrained")
    axes = figure.subplots()
    models = report["models"]
    width = 0.8 / len(models)
    for number, ((name, measures), color) in enumerate(zip(models.items(), COLORS, strict=False)):
        figures = [measures[f"{segment} mass"] for segment in SEGMENTS]
        heights = np.array([100 * each["mean"] for each in figures])
        ends = np.array([each["interval"] for each in figures], float).T * 100
        places = np.arange(len(SEGMENTS)) + (number - (len(models) - 1) / 2) * width
        errors = np.nan_to_num([heights - ends[0], ends[1] - heights])
        errors[:, [SEGMENTS.index("before"), SEGMENTS.index("after")]] = 0  # their spread is that of the chosen depths
        bars = axes.bar(places, heights, width * 0.95, color=color, label=shown(name), yerr=errors, capsize=3)
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=9)
    uniform = [100 * report["uniform"][f"{segment} mass"] for segment in SEGMENTS]
    for place, height in enumerate(uniform):
        label = "uniform attention" if place == 0 else ""
        axes.hlines(height, place - 0.45, place + 0.45, color="black", linestyle="--", linewidth=1, label=label)
    axes.set_xticks(range(len(SEGMENTS)), SEGMENTS)
    axes.set(ylabel="attention of the last position (%)", title="Attention by segment of a retrieval prompt", ylim=0)
    axes.margins(y=0.12)
    axes.legend()
    return figure


def _layers(report: dict[str, Any]) -> Figure:
    """The three measures by layer, a curve for each model."""
    panels = (
        ("masked attention", "attention on masked positions (%)", 100.0),
        ("unmasked variance", "variance over unmasked positions", 1.0),
        ("answer mass", "attention on the answer (%)", 100.0),
    )
    figure = Figure((13, 4.2), layout="constrained")
    row = figure.subplots(1, len(panels))
    for axes, (measure, label, scale) in zip(row, panels, strict=True):
        for (name, measures), color in zip(report["models"].items(), COLORS, strict=False):
            values = scale * np.array(measures[measure]["by layer"])
            axes.plot(np.arange(1, len(values) + 1), values, "o-", color=color, label=shown(name), markersize=4)
        if measure in report["uniform"]:
            axes.axhline(
                scale * report["uniform"][measure], color="black", linestyle="--", linewidth=1, label="uniform"
            )
        axes.set(xlabel="layer", ylabel=label, ylim=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    row[0].legend()
    figure.suptitle("Attention by layer")
    return figure


def _heads(report: dict[str, Any]) -> Figure:
    """Layer by head: attention on the answer above, on masked positions below; a column for each model."""
    rows = (("answer mass", "attention on the answer (%)"), ("masked attention", "attention on masked positions (%)"))
    models = report["models"]
    figure = Figure((5.5 * len(models) + 1, 8), layout="constrained")
    grid = figure.subplots(len(rows), len(models), squeeze=False)
    for line, (measure, label) in zip(grid, rows, strict=True):
        maps = [100 * np.array(measures[measure]["by layer and head"]) for measures in models.values()]
        top = max(values.max() for values in maps)
        for axes, name, values in zip(line, models, maps, strict=True):
            image = axes.imshow(values, cmap="viridis", vmin=0, vmax=top, aspect="auto", origin="lower")
            layers, heads = values.shape
            if layers * heads <= 256:
                for (layer, head), value in np.ndenumerate(values):
                    dark = value < 0.6 * top
                    axes.text(
                        head, layer, f"{value:.1f}", ha="center", va="center", fontsize=7, color="w" if dark else "k"
                    )
            for axis, count in ((axes.xaxis, heads), (axes.yaxis, layers)):
                step = max(1, count // 16)
                axis.set_ticks(range(0, count, step), [str(i + 1) for i in range(0, count, step)])
            axes.set(xlabel="head", ylabel="layer", title=shown(name))
        figure.colorbar(image, ax=list(line), label=label)
    return figure
