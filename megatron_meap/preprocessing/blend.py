"""Checks `--split` and the weights of a blend: Megatron ignores what it cannot read, or fails without a message."""

import math
import re
from collections.abc import Sequence

from megatron_meap.errors import UsageError

_NUMBER = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*", re.ASCII)


def shares(split: str) -> list[float]:
    """Shares of training, validation and test according to `--split`; they sum to 1.

    Raises:
        UsageError: there are more than three numbers, a negative one, or only zeros.
    """
    parts = split.split(",")
    numbers = [float(part) for part in parts if _NUMBER.fullmatch(part)]
    if len(parts) > 3 or len(numbers) < len(parts) or not sum(numbers):
        raise UsageError(f"--split {split}: expected up to three shares, such as 98,2,0, of which not all are 0")
    return [number / sum(numbers) for number in numbers] + [0.0] * (3 - len(numbers))


def is_number(word: str) -> bool:
    """Whether Megatron takes a word of a blend, at the place of a weight, for one."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def check_weights(prefixes: Sequence[str], weights: Sequence[float]) -> None:
    """Refuse weights that are not shares: with 0, a dataset would be named but not read.

    Raises:
        UsageError: one that is not positive and finite.
    """
    for prefix, weight in zip(prefixes, weights, strict=True):
        if not 0 < weight < math.inf:
            raise UsageError(
                f"the weight {weight:g} of {prefix} in the blend: give a positive number, or leave the dataset out"
            )
