"""Random numbers of a sample: pure functions of (seed, split, sample index, purpose), never of a running generator.

So the noise of a run does not depend on the parallel layout, the number of data workers, the prefetch depth or the
point at which the run was resumed. NumPy is the only dependency, and only its integers: nothing depends on a function
whose last bit may differ between processors.
"""

import threading
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
"""Uniform 64-bit numbers."""

SPLITS = MappingProxyType({"train": 0, "valid": 1, "test": 2})
"""Split names and their code in the random key: each split has its own noise."""

POSITIONS, SAMPLE, REPLACEMENTS, LENGTHS = range(4)
"""Purposes of a sample's numbers: the noised positions, how many of them, their replacements, the lengths of spans."""


class _Generators(threading.local):
    """One generator for each seed and split, set to a sample instead of created for it, which would cost four times."""

    def __init__(self) -> None:
        self.made: dict[tuple[int, int], tuple[np.random.Philox, Any]] = {}

    def at(self, seed: int, split: int, index: int, purpose: int) -> np.random.Philox:
        if (seed, split) not in self.made:
            made = np.random.Philox(key=np.array([seed, split], np.uint64))
            self.made[seed, split] = made, made.state
        philox, state = self.made[seed, split]
        state["state"]["counter"][2:] = index, purpose
        philox.state = state
        return philox


_generators = _Generators()


class Stream(NamedTuple):
    """The random numbers of one sample."""

    seed: int
    split: str
    sample: int

    def words(self, count: int, purpose: int = POSITIONS) -> Words:
        """The first `count` numbers for a purpose, uint64 [count].

        NumPy guarantees that Philox's raw stream never changes, unlike the output of `Generator` methods. The index is
        the third word of the 256-bit counter and the purpose the fourth, so that no two streams can overlap.
        """
        return _generators.at(self.seed, SPLITS[self.split], self.sample, purpose).random_raw(count)

    def halves(self, count: int, purpose: int = POSITIONS) -> npt.NDArray[np.uint32]:
        """Uniform 32-bit numbers, uint32 [count], two from each word."""
        return self.words(-(-count // 2), purpose).view("<u4")[:count]

    def fraction(self, number: int, purpose: int = SAMPLE) -> float:
        """The number at this place of a purpose's stream, in [0, 1)."""
        return int(self.words(number + 1, purpose)[number] >> np.uint64(11)) / 2**53
