"""What a noised position becomes: the mask token, a random other token, or (as in BERT) what it was."""

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megatron_meap.meap.streams import REPLACEMENTS, Stream

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Replacement:
    """The shares of what the chosen positions become; the rest becomes the mask token."""

    random_share: float = 0.0
    """A token drawn uniformly from `candidates`, never the original one."""

    kept_share: float = 0.0
    """The original token: chosen, but not noised."""

    candidates: Ids = field(default_factory=lambda: np.empty(0, np.int64), repr=False, compare=False)
    """Ids that may be drawn, int64 [n], ascending: ordinary tokens of the tokenizer."""

    rank: Ids = field(init=False, repr=False, compare=False)
    """Place of an id among the candidates, n if it is not one of them; the last entry is for all larger ids."""

    def __post_init__(self) -> None:
        """Refuse invalid shares, and a vocabulary with nothing to draw."""
        if not (self.random_share >= 0 and self.kept_share >= 0 and self.random_share + self.kept_share <= 1):
            raise ValueError(f"shares {self.random_share} and {self.kept_share} are not parts of 1")
        if self.random_share > 0 and len(self.candidates) < 2:
            raise ValueError("random replacement needs at least 2 ordinary tokens")
        rank = np.full(int(self.candidates[-1]) + 2 if len(self.candidates) else 1, len(self.candidates))
        rank[self.candidates] = np.arange(len(self.candidates))
        object.__setattr__(self, "rank", rank)

    def __call__(self, stream: Stream, tokens: Ids, positions: Ids, mask_id: int) -> Ids | int:
        """What the chosen positions become.

        Args:
            stream: of the sample.
            tokens: int64 [sequence length], the clean inputs.
            positions: int64 [n], the chosen ones.
            mask_id: the mask token.

        Returns:
            int64 [n], or only the mask token's id if all of them become it.
        """
        if self.random_share == 0 and self.kept_share == 0:
            return mask_id
        tokens = tokens[positions]
        words = stream.words(len(tokens), REPLACEMENTS)
        if self.random_share == 1:
            return self._drawn(words, tokens)
        # The upper bits determine which of the three; the whole word modulo their number, which token.
        result = np.where(words < _border(1 - self.kept_share), mask_id, tokens)
        drawn = np.flatnonzero(words < _border(self.random_share))
        result[drawn] = self._drawn(words[drawn], tokens[drawn])
        return result

    def _drawn(self, words: npt.NDArray[np.uint64], tokens: Ids) -> Ids:
        """Uniform candidates other than the tokens: one fewer to draw from, and those after the token move up."""
        count = len(self.candidates)
        own = self.rank.take(tokens, mode="clip")
        drawn = (words % (count - (own < count)).astype(np.uint64)).astype(np.int64)
        return self.candidates[drawn + (drawn >= own)]


def _border(share: float) -> int:
    """The smallest 64-bit word whose upper 53 bits, as a number in [0, 1), are not below the share."""
    return math.ceil(share * 2**53) << 11
