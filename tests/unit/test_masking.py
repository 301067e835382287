"""Masks: exact counts, uniform, independent, reproducible, and the official ones bit for bit."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_meap.meap.masking import STRATEGIES, Masking, RatioSchedule, num_masks

LENGTH = 512


def masking(strategy: str = "random", ratio: float = 0.15, **settings) -> Masking:
    return Masking(RatioSchedule(ratio), strategy, **settings)


def official_columns(step: int, seq_length: int, ratio: float) -> list[int]:
    """Independent re-statement of what the official code does in its training loop."""
    random.seed(50 + step % 51)
    return random.sample(range(seq_length - 1), max(1, int(seq_length * ratio)))


@given(
    strategy=st.sampled_from(sorted(STRATEGIES)),
    ratio=st.floats(0.0, 0.99),
    seq_length=st.integers(2, 700),
    index=st.integers(0, 2**40),
    seed=st.integers(0, 2**64 - 1),
    span_length=st.integers(1, 40),
)
def test_exactly_the_count_of_distinct_positions(strategy, ratio, seq_length, index, seed, span_length) -> None:
    drawn = masking(strategy, ratio, seed=seed, span_length=span_length).positions(index, seq_length)
    assert len(set(drawn.tolist())) == len(drawn) == num_masks(ratio, seq_length)
    assert len(drawn) == (max(1, int(ratio * seq_length)) if ratio > 0 else 0)
    assert all(0 <= position < seq_length for position in drawn)


@given(
    strategy=st.sampled_from(sorted(STRATEGIES)),
    ratio=st.floats(0.01, 0.9),
    protected=st.lists(st.booleans(), min_size=2, max_size=300),
    index=st.integers(0, 10**9),
)
def test_protected_positions_stay(strategy, ratio, protected, index) -> None:
    flags = np.array(protected)
    drawn = masking(strategy, ratio).positions(index, len(flags), flags)
    assert not flags[drawn].any()
    assert len(set(drawn.tolist())) == len(drawn)
    if strategy != "official":  # whose fixed columns just lose the protected ones
        assert len(drawn) == min(num_masks(ratio, len(flags)), int((~flags).sum()))


@pytest.mark.parametrize(("ratio", "seq_length"), [(0.15, 4096), (0.05, 4096), (0.2, 1024), (0.0001, 64)])
def test_official_is_the_official_code_bit_for_bit(ratio: float, seq_length: int) -> None:
    batch = 4
    ours = masking("official", ratio, global_batch_size=batch)
    for step in (0, 1, 50, 51, 52, 1000):
        expected = official_columns(step, seq_length, ratio)
        for index in range(step * batch, (step + 1) * batch):
            assert ours.positions(index, seq_length).tolist() == expected


def test_official_never_masks_the_last_position_and_repeats_after_51_steps() -> None:
    ours = masking("official", global_batch_size=1)
    columns = [tuple(ours.positions(step, LENGTH).tolist()) for step in range(102)]
    assert len(set(columns)) == 51
    assert columns[:51] == columns[51:]
    assert all(LENGTH - 1 not in each for each in columns)


@pytest.mark.parametrize("strategy", ["random", "span"])
def test_uniform_over_positions(strategy: str) -> None:
    """Chi-square test over the positions of 4,000 samples; span edges are covered by fewer placements."""
    samples, length = 4000, 64
    counts = np.zeros(length)
    for index in range(samples):
        np.add.at(counts, masking(strategy, 0.25).positions(index, length), 1)
    inner = counts if strategy == "random" else counts[8:-8]
    expected = inner.mean()
    chi_square = ((inner - expected) ** 2 / expected).sum()
    degrees = len(inner) - 1
    # Drawn without replacement the statistic is below chi-square's own; 5 sigma above its mean is far out.
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5 * (1 if strategy == "random" else 3)
    if strategy == "random":
        assert expected == samples * 16 / length


def test_pairs_of_positions_are_independent() -> None:
    """Every pair of positions is drawn equally often: a subset drawn uniformly, not merely uniform margins."""
    samples, length, count = 6000, 12, 4
    pairs = dict.fromkeys(itertools.combinations(range(length), 2), 0)
    for index in range(samples):
        for pair in itertools.combinations(sorted(masking("random", 0.34).positions(index, length).tolist()), 2):
            pairs[pair] += 1
    expected = samples * count * (count - 1) / (length * (length - 1))
    assert max(abs(seen - expected) for seen in pairs.values()) < 5 * expected**0.5


def test_samples_splits_and_seeds_differ() -> None:
    drawn = {
        tuple(sorted(masking(seed=seed, split=split).positions(index, LENGTH).tolist()))
        for seed in (1, 2)
        for split in ("train", "valid", "test")
        for index in (0, 1, 10**9)
    }
    assert len(drawn) == 2 * 3 * 3


def test_a_pure_function_of_its_arguments() -> None:
    """The masks are the same in any order, with other samples drawn in between, and in another object."""
    first = {index: masking().positions(index, LENGTH).tolist() for index in range(20)}
    shared = masking()
    random.seed(0)
    np.random.seed(0)
    for index in reversed(range(20)):
        assert shared.positions(index, LENGTH).tolist() == first[index]


def test_the_masks_of_a_seed_never_change() -> None:
    """Frozen values: a change here would change the masks of every run that is resumed with a new version."""
    assert masking(seed=1234).positions(7, 64).tolist() == FROZEN["random"]
    assert masking("span", seed=1234).positions(7, 64).tolist() == FROZEN["span"]


def test_spans_have_their_length() -> None:
    drawn = np.sort(masking("span", 0.3, span_length=4).positions(3, 200))
    assert len(drawn) == 60
    runs = np.split(drawn, np.flatnonzero(np.diff(drawn) > 1) + 1)
    assert all(len(run) % 4 == 0 for run in runs)  # spans may touch


def test_schedule() -> None:
    schedule = RatioSchedule(0.2, warmup_samples=10, clean_from=90)
    assert [schedule.at(index) for index in (0, 4, 9, 10, 89, 90, 10**9)] == [
        pytest.approx(value) for value in (0.02, 0.1, 0.2, 0.2, 0.2, 0, 0)
    ]
    assert len(Masking(schedule).positions(90, LENGTH)) == 0
    assert len(Masking(schedule).positions(4, 100)) == 10


def test_official_samples_of_a_step_share_the_scheduled_ratio() -> None:
    ours = Masking(RatioSchedule(0.2, warmup_samples=100), "official", global_batch_size=8)
    for step in range(5):
        assert len({tuple(ours.positions(index, LENGTH)) for index in range(8 * step, 8 * step + 8)}) == 1


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        RatioSchedule(ratio)


def test_unknown_strategy_is_refused() -> None:
    with pytest.raises(ValueError, match="not one of"):
        masking("bert")


FROZEN = {
    "random": [24, 1, 61, 34, 33, 38, 30, 6, 15],
    "span": [8, 9, 10, 19, 20, 21, 37, 38, 39],
}
