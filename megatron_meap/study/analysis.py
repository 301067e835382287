"""Conclusions from the results of a study, by the rules of examples/study/README.md."""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from megatron_meap.study.grid import BASELINE, Grid, Point, Stage

EFFECT = 0.01
"""Nats per token below which a difference is not called an effect."""
NO_EFFECT = 0.02
"""Nats per token within which the whole interval must lie to be called no effect."""
LEVEL = 0.05
EFFECT_ON_TOKENS, NO_EFFECT_ON_TOKENS = 0.1, 0.2
"""The same for the logarithm of the tokens until copying: about a tenth and a fifth of them."""
COPIES = 1.0
"""Nats per piece that a model must save where it could copy, to count as copying."""
FEWEST = 3
"""Seeds that are needed for a claim."""
RESAMPLES = 2000

Results = dict[Point, dict[str, Any]]


def best_loss(result: dict[str, Any]) -> float:
    """The lowest clean validation loss of a run, as early stopping would find it."""
    return min(result["validation"].values())


def final_loss(result: dict[str, Any]) -> float:
    """The clean validation loss at the end of a run."""
    return list(result["validation"].values())[-1]


def copying_begins(result: dict[str, Any]) -> float | None:
    """Tokens trained on when copying (`COPIES`) begins, interpolated between evaluations; None if it never does."""
    before = (0, 0.0)
    for step, gain in ((int(step), gain) for step, gain in result["copying"].items()):
        if gain > COPIES:
            steps = before[0] + (step - before[0]) * (COPIES - before[1]) / (gain - before[1])
            return steps * result["trained_tokens"] / result["steps"]
        before = (step, gain)
    return None


def _log_copying(result: dict[str, Any]) -> float:
    return math.log(copying_begins(result) or result["trained_tokens"])


METRICS: dict[str, Callable[[dict[str, Any]], float]] = {
    "best": best_loss,
    "final": final_loss,
    "begins": _log_copying,
    "gain": lambda result: list(result["copying"].values())[-1],
    "planted": lambda result: list(result["planted"].values())[-1],
}
"""What is compared: losses in nats per token; the logarithm of the tokens until copying; what copying saves at the end,
in nats per piece; the loss of a text with passages then."""


def tuned(grid: Grid, stage: Stage, results: Results) -> dict[str, tuple[float, ...]]:
    """The setting of each objective with the lowest best loss, averaged over the stage's seeds.

    An objective with an unfinished run is left out; one that is `tuned_as` another has that one's setting.
    """
    points = stage.points()
    found = {}
    for name in {point.objective for point in points}:
        own = [point for point in points if point.objective == name]
        if all(point in results for point in own):
            losses: dict[tuple[float, ...], list[float]] = {}
            for point in own:
                losses.setdefault(point.setting, []).append(best_loss(results[point]))
            found[name] = min(losses, key=lambda setting: (np.mean(losses[setting]), setting))
    for name, objective in grid.objectives.items():
        if objective.get("tuned_as") in found:
            found[name] = found[objective["tuned_as"]]
    return found


def points_of(grid: Grid, stage: Stage, results: Results) -> list[Point]:
    """The points of a stage, as far as its tuning stage is done."""
    if stage.tuned_by is None:
        return stage.points()
    return stage.points(tuned(grid, next(each for each in grid.stages if each.name == stage.tuned_by), results))


@dataclass(frozen=True)
class Comparison:
    """An objective against the baseline, over the seeds that both have."""

    point: Point
    """The objective's runs, with the first seed."""
    seeds: tuple[int, ...]
    value: float
    """Mean of the metric over the seeds."""
    difference: float
    """Mean paired difference to the baseline; negative is better."""
    low: float
    high: float
    """Its 95% interval (Student's t); infinite with one seed."""
    p_value: float
    """Paired t test, corrected over the objectives compared (Holm 1979)."""
    margins: tuple[float, float] = (EFFECT, NO_EFFECT)
    """Smallest difference that is an effect, and largest interval that is no effect."""

    @property
    def verdict(self) -> str:
        """The conclusion by the study's rules."""
        if len(self.seeds) < FEWEST:
            return "too few seeds"
        effect, none = self.margins
        if self.p_value < LEVEL and abs(self.difference) >= effect:
            return "better" if self.difference < 0 else "worse"
        return "no effect" if max(abs(self.low), abs(self.high)) <= none else "undecided"


def compare(points: Iterable[Point], results: Results, metric: str = "best") -> list[Comparison]:
    """Each objective of a stage against the baseline at the same size; the baseline's own entry has no difference.

    Two runs that are known to have read different texts are not compared.

    Args:
        points: of the stage; those without a result are left out.
        results: of all runs.
        metric: of `METRICS`.
    """
    measure = METRICS[metric]
    rows: dict[tuple, dict[int, Point]] = {}
    for point in points:
        if point in results:
            rows.setdefault((point.model, point.tokens, point.epochs, point.objective), {})[point.seed] = point
    found = []
    for key, runs in rows.items():
        base = rows.get((*key[:3], BASELINE), {})
        seeds = tuple(seed for seed in runs if seed in base and _same_texts(results[runs[seed]], results[base[seed]]))
        if seeds:
            own = np.array([measure(results[runs[seed]]) for seed in seeds])
            gaps = own - [measure(results[base[seed]]) for seed in seeds]
            found.append(_comparison(runs[seeds[0]], seeds, own, gaps))
    margins = (EFFECT_ON_TOKENS, NO_EFFECT_ON_TOKENS) if metric == "begins" else (EFFECT, NO_EFFECT)
    return [replace(each, margins=margins) for each in _corrected(found)]


def _same_texts(*results: dict[str, Any]) -> bool:
    """Whether runs read the same texts, as far as that was recorded."""
    return len({result["texts"] for result in results if "texts" in result}) < 2


def _comparison(point: Point, seeds: tuple[int, ...], own: np.ndarray, gaps: np.ndarray) -> Comparison:
    mean = float(gaps.mean())
    if point.objective == BASELINE:
        return Comparison(point, seeds, float(own.mean()), 0.0, 0.0, 0.0, 1.0)
    if len(seeds) < 2:
        return Comparison(point, seeds, float(own.mean()), mean, -math.inf, math.inf, 1.0)
    if np.ptp(gaps) == 0:  # the t test divides by their spread
        return Comparison(point, seeds, float(own.mean()), mean, mean, mean, float(mean == 0))
    test = stats.ttest_1samp(gaps, 0.0)
    low, high = test.confidence_interval(0.95)
    return Comparison(point, seeds, float(own.mean()), mean, float(low), float(high), float(test.pvalue))


def _corrected(found: list[Comparison]) -> list[Comparison]:
    """Holm's correction over all comparisons but the baseline's with itself."""
    order = sorted((each for each in found if each.point.objective != BASELINE), key=lambda each: each.p_value)
    scaled = [min(1.0, (len(order) - rank) * each.p_value) for rank, each in enumerate(order)]
    corrected = dict(zip((each.point for each in order), itertools.accumulate(scaled, max), strict=True))
    return [replace(each, p_value=corrected.get(each.point, 1.0)) for each in found]


@dataclass(frozen=True)
class Worth:
    """The factor in unique tokens that an objective is worth."""

    times: float
    low: float
    high: float
    """95% interval over resampled seeds."""
    sizes: tuple[int, ...]
    """Unique tokens of the runs that it is fitted to."""


def worth(points: Iterable[Point], results: Results) -> dict[str, Worth]:
    """Fit `loss = a_objective - b ln(tokens)` to the best losses of each objective and the baseline, with a common `b`.

    It uses the sizes at which both have `FEWEST` seeds. An objective with fewer than three such sizes is left out.
    """
    losses: dict[str, dict[int, dict[int, float]]] = {}
    for point in points:
        if point in results:
            losses.setdefault(point.objective, {}).setdefault(point.tokens, {})[point.seed] = best_loss(results[point])
    base, found = losses.pop(BASELINE, {}), {}
    for name, own in losses.items():
        shared = {tokens: own[tokens].keys() & base.get(tokens, {}).keys() for tokens in sorted(own)}
        shared = {tokens: seeds for tokens, seeds in shared.items() if len(seeds) >= FEWEST}
        seeds = sorted(set.intersection(*map(set, shared.values()))) if len(shared) >= 3 else []
        if len(seeds) < FEWEST:
            continue
        pairs = np.array([[[base[tokens][seed], own[tokens][seed]] for seed in seeds] for tokens in shared])
        random, tokens = np.random.default_rng(1234), np.array(list(shared))
        drawn = [_factor(pairs[:, random.integers(len(seeds), size=len(seeds))], tokens) for _ in range(RESAMPLES)]
        low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
        found[name] = Worth(_factor(pairs, tokens), low, high, tuple(shared))
    return found


def _factor(pairs: np.ndarray, tokens: np.ndarray) -> float:
    """Least squares over losses [size, seed, baseline or objective]: every size has all, so `b` is that of means."""
    slope = stats.linregress(np.log(tokens), pairs.mean(axis=(1, 2))).slope
    return float(np.exp(np.diff(pairs.mean(axis=(0, 1)))[0] / slope))
