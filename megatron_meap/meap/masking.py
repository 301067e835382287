"""Which input positions are masked, for which sample: pure functions of (seed, split, sample index).

Nothing here keeps state or draws from a running generator, so the masks of a run are the same whatever the parallel
layout, the number of data workers, the prefetch depth or the point at which the run was resumed. NumPy is the only
dependency.

Equation (arXiv 2502.07490): with a set M of masked positions, x~[i] = [MASK] for i in M and x[i] otherwise, the loss
is -sum_i log p(x[i+1] | x~[0..i]) over *all* positions i: labels and loss mask stay those of next-token prediction.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]
"""Positions to mask, int64 [n], distinct, in no particular order."""

SPLITS = MappingProxyType({"train": 0, "valid": 1, "test": 2})
"""Split names and their code in the random key: each split draws masks of its own."""

_OFFICIAL_SEEDS = 51  # the official code cycles through 51 seeds, 50..100, so only 51 column sets ever exist


@dataclass(frozen=True)
class RatioSchedule:
    """The mask ratio as a function of the consumed samples.

    Constant by default; optionally a linear warm-up over the first samples and none at all over the last.
    """

    ratio: float
    """Share of the input positions to mask, in [0, 1)."""

    warmup_samples: int = 0
    """The ratio grows linearly from 0 to `ratio` over this many samples."""

    clean_from: int | None = None
    """From this sample on nothing is masked (None: masking goes on to the end)."""

    def __post_init__(self) -> None:
        """Refuse a ratio outside [0, 1)."""
        if not 0.0 <= self.ratio < 1.0:
            raise ValueError(f"mask ratio {self.ratio} is outside [0, 1)")

    def at(self, index: int) -> float:
        """Ratio for the sample with this index (= number of samples consumed before it)."""
        if self.clean_from is not None and index >= self.clean_from:
            return 0.0
        if index < self.warmup_samples:
            return self.ratio * (index + 1) / self.warmup_samples
        return self.ratio


@dataclass(frozen=True)
class Masking:
    """Everything that decides the masks of one split of a run."""

    schedule: RatioSchedule
    strategy: str = "random"
    seed: int = 1234
    split: str = "train"
    span_length: int = 3
    """Length of a span in tokens; strategy `span` only."""

    global_batch_size: int = 1
    """Samples per optimiser step; strategy `official` only, whose masks change with the step."""

    select: Callable[..., Positions] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Look the strategy up."""
        if self.strategy not in STRATEGIES:
            raise ValueError(f"mask strategy {self.strategy!r} is not one of {', '.join(STRATEGIES)}")
        object.__setattr__(self, "select", STRATEGIES[self.strategy])

    def positions(self, index: int, seq_length: int, protected: npt.NDArray[np.bool_] | None = None) -> Positions:
        """Positions to mask in the sample with this global index.

        Args:
            index: index into the top-level dataset of the split, which is the consumed-sample count.
            seq_length: number of input tokens.
            protected: bool [seq_length], True where a token must stay; such positions are never returned.

        Returns:
            Exactly `num_masks` distinct positions; fewer where too few are unprotected, or where the strategy
            `official` loses protected ones from its fixed columns.
        """
        # All samples of an optimiser step share one column set in the official code, hence one ratio.
        scheduled = index - index % self.global_batch_size if self.strategy == "official" else index
        count = num_masks(self.schedule.at(scheduled), seq_length)
        if count == 0:
            return np.empty(0, np.int64)
        return self.select(self, index, seq_length, count, protected)


def num_masks(ratio: float, seq_length: int) -> int:
    """Number of positions to mask: int(seq_length * ratio), at least 1 unless the ratio is 0."""
    return max(1, int(seq_length * ratio)) if ratio > 0 else 0


def raw_random(seed: int, split: str, index: int, count: int) -> npt.NDArray[np.uint64]:
    """Uniform 64-bit numbers, uint64 [count], for one sample: a counter-based generator keyed by its arguments.

    Philox's raw stream is fixed for good by NumPy, unlike what `Generator` methods make of it. The index sits in the
    third word of the 256-bit counter, so that the streams of two samples cannot overlap.
    """
    bits = np.random.Philox(key=np.array([seed, SPLITS[split]], np.uint64), counter=[0, 0, index, 0])
    return bits.random_raw(count)


def _distinct(
    masking: Masking, index: int, below: int, count: int, rejected: npt.NDArray[np.bool_] | None = None
) -> Positions:
    """First `count` distinct numbers of the sample's stream below `below` that are not rejected: a uniform subset.

    How many words are drawn at once does not matter: a longer draw begins with the shorter one.
    """
    expected = -below * math.log1p(-count / (below + 1))  # draws until `count` of `below` have been seen
    words = int(1.1 * expected) + 32
    while True:
        drawn = (raw_random(masking.seed, masking.split, index, words) % np.uint64(below)).astype(np.int64)
        if rejected is not None:
            drawn = drawn[~rejected[drawn]]
        order = np.arange(len(drawn))
        first = np.empty(below, np.int64)
        first[drawn[::-1]] = order[::-1]  # of equal numbers the one drawn first is written last
        distinct = drawn[first[drawn] == order]
        if len(distinct) >= count:
            return distinct[:count]
        words *= 2


def random_positions(
    masking: Masking, index: int, seq_length: int, count: int, protected: npt.NDArray[np.bool_] | None
) -> Positions:
    """Strategy `random`: a uniform subset of the unprotected positions, independent for every sample."""
    if protected is not None and seq_length - np.count_nonzero(protected) <= count:
        return np.flatnonzero(~protected)
    return _distinct(masking, index, seq_length, count, protected)


def span_positions(
    masking: Masking, index: int, seq_length: int, count: int, protected: npt.NDArray[np.bool_] | None
) -> Positions:
    """Strategy `span`: spans of `span_length` tokens, the last one shorter where `count` is no multiple of it.

    Uniform over all placements of non-overlapping spans: choosing the places of m spans among the unmasked positions
    is choosing m of (unmasked + m) slots, and the order of the choice says which span is the shorter one. Protected
    positions are passed over, as if they were not in the sequence.
    """
    available = np.arange(seq_length) if protected is None else np.flatnonzero(~protected)
    if len(available) <= count:
        return available
    spans = -(-count // masking.span_length)
    slots = _distinct(masking, index, len(available) - count + spans, spans)
    lengths = np.full(spans, masking.span_length)
    lengths[-1] -= spans * masking.span_length - count
    order = np.argsort(slots)
    unmasked_before = slots[order] - np.arange(spans)
    return available[np.arange(count) + np.repeat(unmasked_before, lengths[order])]


def official_positions(
    masking: Masking, index: int, seq_length: int, count: int, protected: npt.NDArray[np.bool_] | None
) -> Positions:
    """Strategy `official`: the official code's column set of the optimiser step, bit for bit.

    One set for all samples of a step, 51 sets in all, the last position never masked (MEAP-Pretrain of the official
    repository: `random.seed(50 + step % 51)`, then `random.sample(range(seq_length - 1), n)`).
    """
    columns = _official_columns((index // masking.global_batch_size) % _OFFICIAL_SEEDS, seq_length, count)
    return columns if protected is None else columns[~protected[columns]]


@lru_cache(maxsize=2 * _OFFICIAL_SEEDS)
def _official_columns(cycle: int, seq_length: int, count: int) -> Positions:
    columns = np.array(random.Random(50 + cycle).sample(range(seq_length - 1), count), np.int64)
    columns.setflags(write=False)  # shared by every caller
    return columns


STRATEGIES: dict[str, Callable[..., Positions]] = {
    "random": random_positions,
    "official": official_positions,
    "span": span_positions,
}
