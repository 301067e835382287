"""The noise of the inputs: which positions of which sample are noised, and what they become.

Equation (arXiv 2502.07490): with a set M of masked positions, x~[i] = [MASK] for i in M and x[i] otherwise, the loss
is -sum_i log p(x[i+1] | x~[0..i]) over *all* positions i: labels and loss mask stay those of next-token prediction.
Later publications differ in how M is drawn, in what x~[i] becomes, and in whether the clean sample is also trained on
(docs/objectives.md); the rest is the same.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megatron_meap.meap.positions import ALL, STRATEGIES, Positions, Request, num_masks
from megatron_meap.meap.replacement import Ids, Replacement
from megatron_meap.meap.schedule import RatioSchedule
from megatron_meap.meap.streams import Stream

__all__ = ["STRATEGIES", "Masking", "Positions", "RatioSchedule", "Replacement", "num_masks"]

_NONE = np.empty(0, np.int64)
_RATIO, _SHARE = 0, 1  # places in the sample's own stream


@dataclass(frozen=True)
class Masking:
    """Everything that determines the noise of one split of a run."""

    schedule: RatioSchedule
    strategy: str = "random"
    seed: int = 1234
    split: str = "train"
    span_length: int = 3
    """Length of a span in tokens, strategy `span`; its mean, strategy `geometric`."""

    global_batch_size: int = 1
    """Samples per optimizer step; strategy `official` only, whose masks change with the step."""

    noised_share: float = 1.0
    """Share of the samples that are noised at all."""

    replacement: Replacement = field(default_factory=Replacement)
    """What the positions become."""

    weights: npt.NDArray[np.int64] | None = field(default=None, repr=False, compare=False)
    """Weight of every token id, strategy `weighted` only; ids beyond it have weight 0."""

    def __post_init__(self) -> None:
        """Look the strategy up."""
        if self.strategy not in ALL:
            raise ValueError(f"mask strategy {self.strategy!r} is not one of {', '.join(ALL)}")
        if (self.weights is not None) != (self.strategy == "weighted"):
            raise ValueError(f"mask strategy {self.strategy!r} with weights {self.weights is not None}")

    def positions(
        self, index: int, seq_length: int, protected: npt.NDArray[np.bool_] | None = None, tokens: Ids | None = None
    ) -> Positions:
        """Positions to noise in the sample with this global index.

        Args:
            index: index into the top-level dataset of the split, which is the consumed-sample count.
            seq_length: number of input tokens.
            protected: bool [seq_length], True where a token must stay; such positions are never returned.
            tokens: int64 [seq_length], the clean inputs; strategy `weighted` needs them.

        Returns:
            Distinct positions. For the strategies with an exact number, `num_masks` of them; fewer if too few are
            unprotected, or if some of the fixed columns of the strategy `official` are protected.
        """
        stream = Stream(self.seed, self.split, index)
        if self.noised_share < 1 and stream.fraction(_SHARE) >= self.noised_share:
            return _NONE
        # In the official code all samples of an optimizer step share one set of columns, and so one ratio.
        step = index // self.global_batch_size
        scheduled = step * self.global_batch_size if self.strategy == "official" else index
        draw = 1.0 if self.schedule.lowest is None else stream.fraction(_RATIO)
        ratio = self.schedule.at(scheduled, draw)
        if ratio == 0:
            return _NONE
        weights = None
        if self.weights is not None:
            assert tokens is not None, "the strategy weighted needs the tokens"
            weights = np.take(self.weights, tokens, mode="clip")
        return ALL[self.strategy](Request(stream, seq_length, ratio, protected, weights, self.span_length, step))

    def noise(
        self, index: int, tokens: Ids, mask_id: int, protected: npt.NDArray[np.bool_] | None = None
    ) -> tuple[Positions, Ids | int]:
        """Where a sample's inputs are noised, and what they become.

        Args:
            index: as for `positions`.
            tokens: int64 [seq_length], the clean inputs.
            mask_id: the mask token.
            protected: as for `positions`.

        Returns:
            Positions, int64 [n], and their new tokens, int64 [n] or one for all.
        """
        positions = self.positions(index, len(tokens), protected, tokens)
        return positions, self.replacement(Stream(self.seed, self.split, index), tokens, positions, mask_id)
