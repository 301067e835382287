"""The measures of one or two models summarised: means with intervals, by layer, by head; as JSON, CSV and text."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_meap.errors import refusing
from megatron_meap.evaluation.attention.inputs import SEGMENTS
from megatron_meap.evaluation.attention.measures import Measures, Values

PAPER = {"attention decay": 0.5334, "variance increase": 0.0780, "answer mass": {"NTP": 0.094, "MEAP": 0.345}}
"""What arXiv 2502.07490 reports, of its own models and text."""

_RESAMPLES = 2000


def by_name(measures: Measures) -> dict[str, Values]:
    """All measures, [n, layers, heads] each, by their names in the outputs."""
    named = {
        "masked attention": measures.masked_attention,
        "unmasked variance": measures.variance,
        "masked attention, clean text": measures.clean_attention,
        "unmasked variance, clean text": measures.clean_variance,
    }
    return named | {f"{name} mass": measures.segments[:, i] for i, name in enumerate(SEGMENTS)}


def summary(values: Values) -> dict[str, Any]:
    """Mean of a measure [n, layers, heads], its 95% interval (1.96 standard errors over samples), its parts."""
    samples = values.mean(axis=(1, 2))
    mean, interval = float(samples.mean()), [None, None]  # one sample has no interval
    if len(samples) > 1:
        error = 1.96 * float(samples.std(ddof=1)) / len(samples) ** 0.5
        interval = [mean - error, mean + error]
    return {
        "mean": mean,
        "interval": interval,
        "by layer": values.mean(axis=(0, 2)).tolist(),
        "by layer and head": values.mean(axis=0).tolist(),
    }


def comparison(first: Measures, second: Measures) -> dict[str, Any]:
    """The paper's two ratios between a baseline and another model, each with a 95% interval.

    - Attention decay: (a_first - a_second) / a_first, with a the attention on masked positions.
    - Variance increase: (v_second - v_first) / v_first, with v the variance over unmasked positions.

    Once with both models reading the masked text, and once with the first reading clean text, as in its training.
    The intervals are those of a bootstrap over samples, the same for both models.
    """
    a, v = first.masked_attention, first.variance
    pairs = {
        "attention decay": (a, second.masked_attention, -1),
        "variance increase": (v, second.variance, 1),
        "attention decay, baseline reads clean text": (first.clean_attention, second.masked_attention, -1),
        "variance increase, baseline reads clean text": (first.clean_variance, second.variance, 1),
        "answer mass": (first.segments[:, 1], second.segments[:, 1], 1),
    }
    return {name: _change(x.mean(axis=(1, 2)), y.mean(axis=(1, 2)), sign) for name, (x, y, sign) in pairs.items()}


def _change(before: Values, after: Values, sign: int) -> dict[str, Any]:
    """Relative change between paired samples [n], or its negative, with a bootstrap interval."""
    rows = np.random.default_rng(0).integers(0, len(before), (_RESAMPLES, len(before)))
    ratios = sign * (after[rows].mean(axis=1) / before[rows].mean(axis=1) - 1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return {"value": float(sign * (after.mean() / before.mean() - 1)), "interval": [float(low), float(high)]}


def lines(report: dict[str, Any]) -> list[str]:
    """The report in a few lines for the terminal."""
    text = []
    for name, measures in report["models"].items():
        masses = ", ".join(f"{segment} {100 * measures[f'{segment} mass']['mean']:.1f}%" for segment in SEGMENTS)
        text += [
            f"{name}: attention on masked positions {100 * measures['masked attention']['mean']:.2f}%, variance over "
            f"the others {measures['unmasked variance']['mean']:.3e}",
            f"{name}: attention of the last position on {masses}",
        ]
    for name, change in report.get("comparison", {}).items():
        low, high = (100 * end for end in change["interval"])
        text.append(f"{name}: {100 * change['value']:+.2f}% (95% interval {low:+.2f} to {high:+.2f})")
    return text


def write(report: dict[str, Any], output: Path) -> None:
    """Write `attention.json`, with everything, and `attention.csv`, a row per model, measure, layer and head."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["model", "measure", "layer", "head", "value"])
    for model, measures in report["models"].items():
        for name, figures in measures.items():
            writer.writerow([model, name, "all", "all", figures["mean"]])
            for layer, heads in enumerate(figures["by layer and head"]):
                writer.writerow([model, name, layer, "all", figures["by layer"][layer]])
                writer.writerows([model, name, layer, head, value] for head, value in enumerate(heads))
    with refusing(f"--output {output}: cannot be written", OSError):
        output.mkdir(parents=True, exist_ok=True)
        (output / "attention.json").write_text(json.dumps(report, indent=1))
        (output / "attention.csv").write_text(table.getvalue())
