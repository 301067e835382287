"""How much noise: the ratio as a function of the consumed samples, and of one random number of the sample."""

import math
from dataclasses import dataclass

SHAPES = ("linear", "sigmoid")
"""How the ratio rises while it warms up."""

_STEEP = 12.0  # range of the sigmoid's argument, over which it rises from 0.0025 to 0.9975


@dataclass(frozen=True)
class RatioSchedule:
    """The mask ratio as a function of the consumed samples.

    Constant by default; optionally a warm-up over the first samples and none at all over the last, and optionally
    drawn for every sample from an interval.
    """

    ratio: float
    """Share of the input positions to mask, in [0, 1)."""

    warmup_samples: int = 0
    """The ratio grows from 0 to `ratio` over this many samples."""

    clean_from: int | None = None
    """From this sample on nothing is masked (None: masking continues to the end)."""

    shape: str = "linear"
    """One of `SHAPES`."""

    lowest: float | None = None
    """Every sample has a ratio of its own, uniform from here to `ratio` (None: all have `ratio`)."""

    def __post_init__(self) -> None:
        """Refuse a ratio outside [0, 1), and an interval that ends before it begins."""
        if not 0.0 <= self.ratio < 1.0:
            raise ValueError(f"mask ratio {self.ratio} is outside [0, 1)")
        if self.lowest is not None and not 0.0 <= self.lowest <= self.ratio:
            raise ValueError(f"lowest mask ratio {self.lowest} is outside [0, {self.ratio}]")
        if self.shape not in SHAPES:
            raise ValueError(f"shape {self.shape!r} is not one of {', '.join(SHAPES)}")

    def at(self, index: int, draw: float = 1.0) -> float:
        """Ratio for the sample with this index (= number of samples consumed before it).

        Args:
            index: of the sample.
            draw: place in the interval, in [0, 1]; without effect unless `lowest` is set.
        """
        if self.clean_from is not None and index >= self.clean_from:
            return 0.0
        ratio = self.ratio if self.lowest is None else self.lowest + draw * (self.ratio - self.lowest)
        if index >= self.warmup_samples:
            return ratio
        if self.shape == "linear":
            return ratio * (index + 1) / self.warmup_samples
        return ratio * _sigmoid((index + 1) / self.warmup_samples)


def _sigmoid(progress: float) -> float:
    """An s-shaped rise from 0 at 0 to 1 at 1, steepest in the middle."""
    low, value = (1 / (1 + math.exp(-_STEEP * (each - 0.5))) for each in (0.0, progress))
    return min(1.0, (value - low) / (1 - 2 * low))
