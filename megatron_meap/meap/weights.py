"""Weights of token ids from a file: which tokens are noised more often than others (strategy `weighted`)."""

import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_meap.errors import UsageError, refusing

_STEPS = 2**24


@lru_cache(maxsize=4)
def read_weights(path: Path, vocab_size: int) -> npt.NDArray[np.int64]:
    """Weights of the token ids, int64 [vocab size], the largest being 2**24: sums of integers are exact everywhere.

    Args:
        path: a `.npy` file, float [vocab size], or text with one weight per line; negative ones are refused.
        vocab_size: tokens of the tokenizer.

    Raises:
        UsageError: the file cannot be read, or holds no weights for this tokenizer.
    """
    flag = f"--meap-mask-weights {path}"
    with refusing(f"{flag}: cannot be read as weights, .npy or one number per line", OSError, ValueError, EOFError):
        weights = np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.loadtxt(path, ndmin=1)
    if weights.shape != (vocab_size,):
        raise UsageError(f"{flag}: holds {weights.shape} weights; the tokenizer has {vocab_size} tokens")
    weights = weights.astype(np.float64)
    if not np.isfinite(weights).all() or weights.min() < 0 or weights.max() == 0:
        raise UsageError(f"{flag}: weights must be finite and not negative, and one of them above 0")
    return np.rint(weights * (_STEPS / weights.max())).astype(np.int64)


def digest_of(path: Path) -> str:
    """sha256 of the file, by which a resumed run recognises it.

    Raises:
        UsageError: it cannot be read.
    """
    with refusing(f"--meap-mask-weights {path}: cannot be read", OSError):
        return hashlib.sha256(path.read_bytes()).hexdigest()
