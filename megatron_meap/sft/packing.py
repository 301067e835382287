"""Packing rows into samples of the sequence length: one plan per epoch, a pure function of seed and epoch.

Best fit, longest first: the number of samples depends only on the lengths of the rows, so every epoch has the same
number of samples, and the epoch of a sample index is known without the epochs before it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_ORDER = 3  # in the random key, beside masking.SPLITS (0 to 2): orders are independent of masks


@dataclass(frozen=True)
class Plan:
    """Which rows each sample of an epoch holds."""

    rows: npt.NDArray[np.int64]
    """int64 [rows]: all rows of the epoch, sample by sample."""
    borders: npt.NDArray[np.int64]
    """int64 [samples + 1]: sample i holds `rows[borders[i] : borders[i + 1]]`."""

    def __len__(self) -> int:
        return len(self.borders) - 1

    def __getitem__(self, sample: int) -> npt.NDArray[np.int64]:
        """Rows of one sample."""
        return self.rows[self.borders[sample] : self.borders[sample + 1]]


def plan_epoch(lengths: npt.NDArray[np.int64], capacity: int, seed: int, epoch: int, pack: bool = True) -> Plan:
    """Distribute the rows over samples, in a different order for every epoch.

    Args:
        lengths: int64 [rows], tokens of each row, none above `capacity`.
        capacity: tokens of a sample.
        seed: of the order.
        epoch: its number.
        pack: False gives every row a sample of its own.
    """
    order = shuffled(len(lengths), seed, 2 * epoch)  # rows of equal length come in random order
    if not pack:
        return Plan(order, np.arange(len(order) + 1))
    bins = _best_fit(order[np.argsort(-lengths[order], kind="stable")], lengths, capacity)
    bins = [bins[number] for number in shuffled(len(bins), seed, 2 * epoch + 1)]
    borders = np.cumsum([0, *map(len, bins)])
    return Plan(np.array([row for each in bins for row in each], np.int64), borders)


def _best_fit(order: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Put each row into the fullest sample that still has space for it, or into a new one."""
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # numbers of the samples, by their free tokens
    free = 0  # bit n is set where some sample has n free tokens: the smallest n that suffices is one shift away
    for row in order.tolist():
        length = int(lengths[row])
        fitting = free >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                free ^= 1 << room
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(row)
        with_room[room - length].append(chosen)
        free |= 1 << (room - length)
    return bins


def shuffled(count: int, seed: int, draw: int) -> npt.NDArray[np.int64]:
    """A permutation of `count` numbers from Philox's raw stream, which NumPy never changes."""
    bits = np.random.Philox(key=np.array([seed, _ORDER], np.uint64), counter=[0, 0, draw, 0])
    return np.argsort(bits.random_raw(count), kind="stable")
