"""Which input positions are noised: the strategies, pure functions of a request for one sample."""

import math
import random
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_meap.meap.streams import LENGTHS, Stream

Positions = npt.NDArray[np.int64]
"""Positions to noise, int64 [n], distinct, in no particular order."""

_OFFICIAL_SEEDS = 51  # the official code cycles through 51 seeds, 50..100, so only 51 column sets ever exist


class Request(NamedTuple):
    """The request of one sample to a strategy."""

    stream: Stream
    seq_length: int
    ratio: float
    """Share of the positions to noise, above 0."""
    protected: npt.NDArray[np.bool_] | None
    """bool [seq_length], True where a token must stay; None if none must."""
    weights: npt.NDArray[np.int64] | None
    """Non-negative weight of every position, int64 [seq_length], strategy `weighted` only."""
    span_length: int
    step: int
    """Optimiser step, strategy `official` only."""

    @property
    def number(self) -> int:
        """Number of positions, for the strategies that noise an exact number."""
        return num_masks(self.ratio, self.seq_length)


def num_masks(ratio: float, seq_length: int) -> int:
    """Number of positions to mask: int(seq_length * ratio), at least 1 unless the ratio is 0."""
    return max(1, int(seq_length * ratio)) if ratio > 0 else 0


@lru_cache(maxsize=8)
def _orders(count: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """0, 1, ... and the same backwards: shared, never written to."""
    order = np.arange(count, dtype=np.int32)
    return order, order[::-1].copy()


def _distinct(stream: Stream, below: int, count: int, rejected: npt.NDArray[np.bool_] | None = None) -> Positions:
    """The first `count` distinct numbers below `below` in the sample's stream that are not rejected: a uniform subset.

    The number of words drawn at once does not matter: a longer draw begins with the shorter one.
    """
    # The expected number of draws until `count` of `below` have been seen, and a margin that is nearly always enough.
    words = int(-1.05 * below * math.log1p(-count / (below + 1))) + 32
    power = below & (below - 1) == 0
    while True:
        drawn = stream.words(words)
        drawn = (np.bitwise_and if power else np.remainder)(drawn, np.uint64(below - power), out=drawn).view(np.int64)
        order, backwards = _orders(words)
        first = np.empty(below, np.int32)
        first[drawn[::-1]] = backwards  # of equal numbers the one drawn first is written last
        distinct = first[drawn] == order
        if rejected is not None:
            distinct = distinct > rejected[drawn]  # and not rejected
        chosen = drawn[distinct]
        if len(chosen) >= count:
            return chosen[:count]
        words *= 2


def random_positions(ask: Request) -> Positions:
    """Strategy `random`: an exact number, a uniform subset of the unprotected positions."""
    protected, count = ask.protected, ask.number
    if protected is not None and ask.seq_length - np.count_nonzero(protected) <= count:
        return np.flatnonzero(~protected)
    return _distinct(ask.stream, ask.seq_length, count, protected)


def span_positions(ask: Request) -> Positions:
    """Strategy `span`: spans of `span_length` tokens; the last one is shorter if the count is not a multiple of it."""
    spans = -(-ask.number // ask.span_length)
    lengths = np.full(spans, ask.span_length)
    lengths[-1] -= spans * ask.span_length - ask.number
    return _place(ask, lengths)


def geometric_positions(ask: Request) -> Positions:
    """Strategy `geometric`: the same number in spans whose lengths are geometric, of mean `span_length`.

    Lengths are drawn until they reach the number; the last one is cut.
    """
    table, mean, number = _survival(ask.span_length), ask.span_length, ask.number
    words = int((number + 6 * math.sqrt(number * mean)) / mean) + 16  # nearly always enough
    while True:
        lengths = table.searchsorted(ask.stream.words(words, LENGTHS)) + 1
        ends = lengths.cumsum()
        spans = int(ends.searchsorted(number)) + 1
        if spans <= words:
            break
        words *= 2
    lengths[spans - 1] -= ends[spans - 1] - number
    return _place(ask, lengths[:spans])


@lru_cache(maxsize=8)
def _survival(mean: int) -> npt.NDArray[np.uint64]:
    """2**64 times the probability that a span has at most 1, 2, ... tokens, to turn words into lengths."""
    table, alive = [], 1.0
    while alive > 2.0**-60:
        alive *= 1 - 1 / mean
        table.append(min(2**64 - 1, int((1 - alive) * 2**64)))
    return np.array(table, np.uint64)


def _place(ask: Request, lengths: npt.NDArray[np.int64]) -> Positions:
    """Spans of these lengths, uniform over all placements in which they do not overlap.

    Choosing the places of m spans among the unmasked positions is choosing m of (unmasked + m) slots, and the order of
    the choice determines which span has which length. Protected positions are skipped, as if the sequence lacked them.
    """
    count, spans = ask.number, len(lengths)
    available = np.arange(ask.seq_length) if ask.protected is None else (~ask.protected).nonzero()[0]
    if len(available) <= count:
        return available
    slots = _distinct(ask.stream, len(available) - count + spans, spans)
    order = slots.argsort()
    unmasked_before = slots[order] - np.arange(spans)
    return available[np.arange(count) + np.repeat(unmasked_before, lengths[order])]


def bernoulli_positions(ask: Request) -> Positions:
    """Strategy `bernoulli`: every unprotected position independently, with the ratio as its probability."""
    chosen = ask.stream.halves(ask.seq_length) < np.uint32(ask.ratio * 2**32)
    if ask.protected is not None:
        chosen &= ~ask.protected
    return np.flatnonzero(chosen)


def weighted_positions(ask: Request) -> Positions:
    """Strategy `weighted`: every unprotected position independently, with a probability proportional to its weight.

    The probability is ratio * weight / (mean weight of the sample's unprotected positions), at most 1: the expected
    share of the sample is the ratio, unless a probability reaches 1.
    """
    assert ask.weights is not None
    weights = ask.weights if ask.protected is None else np.where(ask.protected, 0, ask.weights)
    total = int(weights.sum())
    if total == 0:
        return np.empty(0, np.int64)
    free = ask.seq_length if ask.protected is None else ask.seq_length - np.count_nonzero(ask.protected)
    return np.flatnonzero(ask.stream.halves(ask.seq_length) < weights * (ask.ratio * free / total * 2**32))


def official_positions(ask: Request) -> Positions:
    """Strategy `official`: the official code's column set of the optimizer step, bit for bit.

    One set for all samples of a step, 51 sets in all, the last position never masked (MEAP-Pretrain of the official
    repository: `random.seed(50 + step % 51)`, then `random.sample(range(seq_length - 1), n)`).
    """
    columns = _official_columns(ask.step % _OFFICIAL_SEEDS, ask.seq_length, ask.number)
    return columns if ask.protected is None else columns[~ask.protected[columns]]


@lru_cache(maxsize=2 * _OFFICIAL_SEEDS)
def _official_columns(cycle: int, seq_length: int, count: int) -> Positions:
    columns = np.array(random.Random(50 + cycle).sample(range(seq_length - 1), count), np.int64)
    columns.setflags(write=False)  # shared by every caller
    return columns


STRATEGIES: dict[str, Callable[[Request], Positions]] = {
    "random": random_positions,
    "official": official_positions,
    "span": span_positions,
    "geometric": geometric_positions,
}
"""The strategies that noise an exact number of positions."""

INDEPENDENT: dict[str, Callable[[Request], Positions]] = {
    "bernoulli": bernoulli_positions,
    "weighted": weighted_positions,
}
"""The strategies that decide every position independently: the number varies from sample to sample."""

ALL = STRATEGIES | INDEPENDENT
