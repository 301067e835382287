"""A small, fixed retrieval probe for any language model: which token followed this one, far above?

A sample is a haystack of random tokens with a few hidden pairs (key, value), one token each and each only once; at the
end some of the keys are repeated, and the model has to name their values. It consists only of token ids, so that it
suits any tokenizer, and tests nothing but retrieval: no text, no knowledge. (The multi-query associative recall of
arXiv 2312.04927, in a haystack; what induction heads do, arXiv 2209.11895.)
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

PROBE = "retrieval probe"
"""Its name in the log, TensorBoard and W&B."""
SAMPLES = 16
PAIRS = 16
"""Pairs in a sample, spread evenly over it."""
ASKED = 4
"""Questions in a sample: one about each quarter of its pairs. Over the probe, every place is asked equally often."""
SHORTEST = 2 * (PAIRS + ASKED)
"""Tokens of the shortest possible sample, without any hay."""
FEWEST_TOKENS = 4 * PAIRS
"""Ordinary tokens that a vocabulary must have."""
CHANCE = sum(1 / (PAIRS - given) for given in range(ASKED)) / ASKED
"""Accuracy of a model that guesses among the values that have not been named yet."""
QUARTERS = 4
_SEED = 250207490


@dataclass(frozen=True)
class Probe:
    """The samples and their questions."""

    tokens: npt.NDArray[np.int64]
    """[samples, s]."""

    question: npt.NDArray[np.int64]
    """[samples, s]: the number of the question that the *next* token answers, -1 for none."""

    candidates: npt.NDArray[np.int64]
    """[samples, ASKED, PAIRS]: the right value first, then the others; -1 for those whose key was asked before."""

    quarter: npt.NDArray[np.int64]
    """[samples, ASKED]: the quarter of the haystack that contains the answer, 0 is the first."""


def build(seq_length: int, ordinary: npt.NDArray[np.int64], samples: int = SAMPLES) -> Probe:
    """The probe for a sequence length and a vocabulary: always the same, so that runs can be compared.

    Args:
        seq_length: tokens of a sample, at least `SHORTEST`.
        ordinary: ids of the ordinary tokens (no special ones), at least `FEWEST_TOKENS`.
        samples: number of samples.
    """
    drawn = [_sample(np.random.Generator(np.random.PCG64([_SEED, i])), i, seq_length, ordinary) for i in range(samples)]
    return Probe(*(np.stack(part) for part in zip(*drawn, strict=True)))


def _sample(
    random: np.random.Generator, index: int, seq_length: int, ordinary: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], ...]:
    """Tokens, question, candidates and quarters of one sample."""
    shuffled = random.permutation(ordinary)
    keys, values, hay = shuffled[:PAIRS], shuffled[PAIRS : 2 * PAIRS], shuffled[2 * PAIRS :]
    haystack = seq_length - 2 * ASKED
    tokens = random.choice(hay, seq_length)
    room = haystack // PAIRS
    places = np.arange(PAIRS) * room + random.integers(0, room - 1, PAIRS)
    tokens[places], tokens[places + 1] = keys, values

    quarter = random.permutation(QUARTERS)
    asked = quarter * (PAIRS // QUARTERS) + index % (PAIRS // QUARTERS)
    tokens[haystack::2], tokens[haystack + 1 :: 2] = keys[asked], values[asked]
    question = np.full(seq_length, -1)
    question[haystack::2] = np.arange(ASKED)
    candidates = np.empty((ASKED, PAIRS), np.int64)
    for number, pair in enumerate(asked):
        others = np.where(np.isin(np.arange(PAIRS), asked[:number]), -1, values)
        candidates[number] = [values[pair], *np.delete(others, pair)]
    return tokens, question, candidates, quarter


def score(logits: Tensor, candidates: Tensor, vocab_size: int, first: int, reduce: Callable) -> tuple[Tensor, Tensor]:
    """How well the right values are predicted, from this rank's part of the vocabulary.

    Args:
        logits: [questions, rows], this rank's rows of the vocabulary, padding included.
        candidates: ids [questions, PAIRS] as in `Probe.candidates`.
        vocab_size: tokens of the whole vocabulary; rows from there on are padding, and no prediction.
        first: the token of this rank's first row.
        reduce: `reduce(tensor, "max" or "sum")` combines a tensor over the ranks that share the vocabulary.

    Returns:
        [questions] each: log-probability of the right value among all tokens, in nats, and whether it is the likeliest
        of the candidates (1, 0, or its share where several are equally likely).
    """
    logits = logits.double()
    logits[:, max(0, vocab_size - first) :] = -torch.inf
    top = reduce(logits.amax(dim=1), "max")
    total = reduce((logits - top[:, None]).exp().sum(dim=1), "sum")
    row = candidates - first
    mine = (row >= 0) & (row < logits.shape[1]) & (candidates >= 0)
    picked = logits.gather(1, row.clamp(0, logits.shape[1] - 1)).where(mine, 0.0)
    picked = reduce(picked, "sum").where(candidates >= 0, -torch.inf)
    best = picked.amax(dim=1, keepdim=True)
    hit = (picked[:, 0] == best[:, 0]).double() / (picked == best).sum(dim=1)
    return picked[:, 0] - top - total.log(), hit
