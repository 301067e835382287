"""Rows: what one answer is trained on. Pure functions of a turn, the masked positions and the longest row.

As in the official code (scitix/MEAP, MEAP-SFT), an answer gives a normal row, with labels on the answer and its end,
and, if it is long enough, a masked copy: some of its tokens become the mask token, and only these have labels.
Labels are at the positions of their tokens; `shifted` moves them to where Megatron expects them.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_meap.sft.turns import Turn

IGNORE = -100
"""Label of a position that is not learned."""

Tokens = npt.NDArray[np.int64]
Noised = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Row:
    """Tokens and their labels, unshifted: int64 [n] each, a label being the token itself or `IGNORE`."""

    tokens: Tokens
    labels: Tokens
    noised: Noised | None = None
    """bool [n], where the token is not the clean one; None for nowhere."""


def normal_row(turn: Turn, max_length: int) -> Row:
    """Prompt, answer and end, with labels on answer and end.

    A row that is too long is cut: its last token is then EOS, as in the official code, but the label there remains that
    of the text, so that the model does not learn to stop at the cut.
    """
    tokens = turn.ids.astype(np.int64)
    labels = tokens.copy()
    labels[: turn.prompt] = IGNORE
    if len(tokens) > max_length:
        tokens = np.append(tokens[: max_length - 1], tokens[-1])
        labels = labels[:max_length]
    return Row(tokens, labels)


def maskable(turn: Turn, max_length: int) -> tuple[int, int]:
    """Start and end of the answer within a masked copy, whose last token ends it; an empty range if none fits."""
    return turn.prompt, max(turn.prompt, min(turn.prompt + turn.answer, max_length - 1))


def masked_copy(turn: Turn, max_length: int, positions: Tokens, mask_id: int | Tokens, combined: bool = False) -> Row:
    """The row with noise at some positions of the answer.

    Args:
        turn: the clean turn.
        max_length: of a row, in tokens.
        positions: int64 [n], positions in the row, within `maskable`.
        mask_id: what they become: the mask token, or a token each, int64 [n].
        combined: labels on the whole answer and its end, masked or not (the paper's combined loss), rather than at
            the masked positions only.
    """
    start, end = maskable(turn, max_length)
    clean = np.concatenate([turn.ids[:end], turn.ids[turn.prompt + turn.answer :][: max_length - end]]).astype(np.int64)
    labels = np.full_like(clean, IGNORE)
    if combined:
        labelled = len(clean) if end == turn.prompt + turn.answer else end  # a cut answer does not end here
        labels[start:labelled] = clean[start:labelled]
    labels[positions] = clean[positions]
    tokens = clean.copy()
    tokens[positions] = mask_id
    return Row(tokens, labels, tokens != clean)


def concatenated(first: Row, second: Row) -> Row:
    """Both in one row, in which the second can attend to the first."""
    return Row(
        np.concatenate([first.tokens, second.tokens]),
        np.concatenate([first.labels, second.labels]),
        np.concatenate([noised(first), noised(second)]),
    )


def noised(row: Row) -> Noised:
    """Where the row is noised, bool [n]."""
    return np.zeros(len(row.tokens), bool) if row.noised is None else row.noised


def shifted(row: Row) -> tuple[Tokens, Tokens, npt.NDArray[np.float32]]:
    """Inputs, labels and loss mask, [n - 1] each: at every position the label is the next token, as Megatron has it.

    Ignored labels become 0 with a loss mask of 0: the embedding and the loss need a valid id.
    """
    labels = row.labels[1:]
    learned = labels != IGNORE
    return row.tokens[:-1], np.where(learned, labels, 0), learned.astype(np.float32)
