"""Intervals and significance, by resampling; SciPy does it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import stats

RESAMPLES = 9999
CONFIDENCE = 0.95
SEED = 1234
_TOGETHER = 100
"""Resamples that SciPy holds in memory at once: ten thousand samples then take 8 MB instead of gigabytes."""


@dataclass(frozen=True)
class Estimate:
    """A mean over samples."""

    mean: float
    low: float
    """Lower end of the bootstrap percentile interval of `CONFIDENCE`."""
    high: float
    samples: int
    """Independent ones."""


def estimate(values: Sequence[float]) -> Estimate:
    """Mean with its bootstrap interval (Efron 1979, percentile method); of one sample the interval has no width.

    If all samples agree, so do all resamples, and the interval has no width either: with few samples that says little.

    Args:
        values: of independent samples; where several share a question, their mean.
    """
    return _estimate(tuple(values))


@cache  # tables, pictures and the page ask for the same ones
def _estimate(values: tuple[float, ...]) -> Estimate:
    array = np.asarray(values, dtype=float)
    mean = float(array.mean())
    if len(array) < 2 or np.ptp(array) == 0:
        return Estimate(mean, mean, mean, len(array))
    interval = stats.bootstrap(
        (array,), np.mean, n_resamples=RESAMPLES, batch=_TOGETHER, confidence_level=CONFIDENCE, method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval  # fmt: skip
    return Estimate(mean, float(interval.low), float(interval.high), len(array))


@dataclass(frozen=True)
class Difference:
    """How a model differs from the baseline on the same samples."""

    mean: float
    low: float
    high: float
    p_value: float
    """Two-sided paired permutation test: the probability of such a difference if the models' names were random."""


def difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """The paired difference of two models over the same independent samples, in the same order."""
    return _difference(tuple(np.asarray(values, dtype=float) - np.asarray(baseline, dtype=float)))


@cache
def _difference(differences: tuple[float, ...]) -> Difference:
    gaps = np.asarray(differences)
    interval = estimate(differences)
    if len(gaps) < 2 or not gaps.any():
        return Difference(interval.mean, interval.low, interval.high, 1.0)
    test = stats.permutation_test(
        (gaps,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, batch=_TOGETHER,
        rng=np.random.default_rng(SEED),
    )  # fmt: skip
    return Difference(interval.mean, interval.low, interval.high, float(test.pvalue))


def adjusted(p_values: Sequence[float]) -> list[float]:
    """The same p-values for many comparisons at once: false discovery rate (Benjamini and Hochberg 1995)."""
    return stats.false_discovery_control(p_values).tolist() if p_values else []
