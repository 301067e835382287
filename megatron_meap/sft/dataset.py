"""Packed fine-tuning samples: a map-style dataset with Megatron's keys; a sample depends only on its index."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_meap.meap.dataset import NOISED
from megatron_meap.meap.masking import Masking
from megatron_meap.sft import rows
from megatron_meap.sft.packing import Plan, plan_epoch
from megatron_meap.sft.rows import Row
from megatron_meap.sft.store import TurnStore

NORMAL, COPY, BOTH = 0, 1, 2
"""Kinds of rows: the clean one, its masked copy, and the two in one (`concat`)."""


@dataclass(frozen=True)
class RowSettings:
    """Which rows a turn gives."""

    seq_length: int
    """Inputs of a sample; a row has one token more, its last label."""
    masking: Masking | None
    """Which answer tokens are masked; None for next-token prediction."""
    mask_token_id: int
    concat: bool = False
    combined: bool = False
    """Labels on the whole answer of a masked copy (the paper's combined loss)."""
    threshold: int = 50
    """Only answers with more tokens than this get a masked copy."""
    budget: str = "single"
    """Without masking: `equal` repeats the rows that MEAP would copy, `double` repeats all."""
    seed: int = 1234
    """Of the order of the rows."""
    pack: bool = True

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        return self.seq_length + 1


@dataclass(frozen=True)
class Rows:
    """All rows of an epoch, before they are packed."""

    turns: npt.NDArray[np.int64]
    """int64 [rows]: the turn of each row."""
    kinds: npt.NDArray[np.int64]
    """int64 [rows]: `NORMAL`, `COPY` or `BOTH`."""
    lengths: npt.NDArray[np.int64]
    """int64 [rows]: inputs, one less than tokens."""
    truncated: int
    """Turns that had to be cut."""
    dropped: int
    """Turns left out: the prompt fills the longest row, so there would be nothing to learn."""
    cut_copies: int
    """Masked copies that had to be cut, or did not fit at all."""

    def __len__(self) -> int:
        return len(self.turns)


def list_rows(store: TurnStore, turns: npt.NDArray[np.int64], settings: RowSettings) -> Rows:
    """The rows that these turns give; their lengths do not depend on which positions are masked."""
    whole = store.lengths()[turns]
    prompts, answers = store.table[turns, 1], store.table[turns, 2]
    ends = whole - prompts - answers
    normal = np.minimum(whole, settings.max_length)
    usable = (prompts < settings.max_length) & (normal > 1)
    long = usable & (answers > settings.threshold)

    def copied(room: npt.NDArray[np.int64] | int) -> tuple[Any, Any]:
        """Whether a masked copy fits into this many tokens, and its length."""
        last = np.minimum(prompts + answers, np.asarray(room) - 1)
        return long & (last > prompts), np.minimum(last + ends, room)

    selected, copy = [(NORMAL, usable, normal)], whole
    if settings.masking is None:
        repeated = {"single": np.zeros_like(usable), "equal": long, "double": usable}[settings.budget]
        selected.append((NORMAL, repeated, normal))
    elif settings.concat:
        fits, copy = copied(settings.max_length - normal)
        selected = [(NORMAL, usable & ~fits, normal), (BOTH, fits, normal + copy)]
    else:
        fits, copy = copied(settings.max_length)
        selected.append((COPY, fits, copy))
    return Rows(
        np.concatenate([turns[chosen] for _, chosen, _ in selected]),
        np.concatenate([np.full(int(chosen.sum()), kind) for kind, chosen, _ in selected]),
        np.concatenate([lengths[chosen] for _, chosen, lengths in selected]) - 1,
        int(np.count_nonzero(usable & (whole > settings.max_length))),
        int(np.count_nonzero(~usable)),
        int(np.count_nonzero(long & (copy < whole))),
    )


class SFTDataset(torch.utils.data.Dataset):
    """Rows packed into samples; the index continues through the epochs, each with its own masks and order.

    Args:
        store: the turns.
        turns: int64 [n], those of this split.
        settings: which rows they give.
        split: Megatron's `Split`, by which its data loader chooses batch sizes.
        samples: length of the dataset; None for one epoch.
    """

    def __init__(
        self,
        store: TurnStore,
        turns: npt.NDArray[np.int64],
        settings: RowSettings,
        split: Any = None,
        samples: int | None = None,
    ) -> None:
        self.store = store
        self.settings = settings
        self.split = split
        self.rows = list_rows(store, turns, settings)
        self._samples = samples
        self._plan = lru_cache(maxsize=2)(self._plan_epoch)

    def __len__(self) -> int:
        return self.epoch_samples if self._samples is None else self._samples

    def __getstate__(self) -> dict[str, Any]:
        """Drop the plans, for data workers that are spawned rather than forked."""
        return {name: value for name, value in self.__dict__.items() if name != "_plan"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _plan=lru_cache(maxsize=2)(self._plan_epoch))

    @cached_property
    def epoch_samples(self) -> int:
        """Samples of one epoch, the same for all epochs."""
        return len(self._plan(0))

    @property
    def padding_share(self) -> float:
        """Share of an epoch's positions that hold padding."""
        return 1 - float(self.rows.lengths.sum()) / (self.epoch_samples * self.settings.seq_length)

    def _plan_epoch(self, epoch: int) -> Plan:
        settings = self.settings
        return plan_epoch(self.rows.lengths, settings.seq_length, settings.seed, epoch, settings.pack)

    def __getitem__(self, index: int | None) -> dict[str, torch.Tensor]:
        """One sample; index None gives one without loss, to fill an incomplete batch."""
        sample = packed(self.sample_rows(index or 0), self.settings.seq_length)
        if index is None:
            sample["loss_mask"].zero_()
        return sample

    def sample_rows(self, index: int, masked: bool = True) -> list[Row]:
        """The rows of one sample; with `masked` false their inputs are clean."""
        epoch, position = divmod(index, self.epoch_samples)
        return [self.row(int(number), epoch, masked) for number in self._plan(epoch)[position]]

    def row(self, number: int, epoch: int, masked: bool = True) -> Row:
        """One row in this epoch: its masks depend only on seed, epoch and row."""
        settings, kind = self.settings, self.rows.kinds[number]
        turn = self.store.turn(int(self.rows.turns[number]))
        normal = rows.normal_row(turn, settings.max_length)
        if kind == NORMAL:
            return normal
        room = settings.max_length - (len(normal.tokens) if kind == BOTH else 0)
        start, end = rows.maskable(turn, room)
        assert settings.masking is not None
        answer = turn.ids[start:end].astype(np.int64)
        positions, ids = settings.masking.noise(epoch * len(self.rows) + number, answer, settings.mask_token_id)
        if not masked:
            positions, ids = positions[:0], settings.mask_token_id
        copy = rows.masked_copy(turn, room, start + positions, ids, settings.combined)
        return rows.concatenated(normal, copy) if kind == BOTH else copy


def packed(parts: list[Row], seq_length: int) -> dict[str, torch.Tensor]:
    """Rows one after the other as a sample of Megatron's, padded at the end.

    Returns:
        `tokens`, `labels`, `position_ids` int64 [s], `loss_mask` float32 [s]; `noise` uint8 [s], `NOISED` where the
        *label* is noised as an input (in masked copies, those are learned); `cu_seqlens` int32 [s + 1], the borders
        of the rows and of the padding, filled up with s; `max_seqlen`, the longest distance between two borders.
    """
    tokens, labels, positions = (np.zeros(seq_length, np.int64) for _ in range(3))
    loss_mask = np.zeros(seq_length, np.float32)
    noise = np.zeros(seq_length, np.uint8)
    borders = np.full(seq_length + 1, seq_length, np.int32)
    end = 0
    for number, part in enumerate(parts):
        start, borders[number] = end, end
        inputs, targets, learned = rows.shifted(part)
        end += len(inputs)
        tokens[start:end], labels[start:end], loss_mask[start:end] = inputs, targets, learned
        positions[start:end] = np.arange(end - start)
        noise[start:end] = NOISED * rows.noised(part)[1:]
    borders[len(parts)] = end
    positions[end:] = np.arange(seq_length - end)
    return {
        "tokens": torch.from_numpy(tokens),
        "labels": torch.from_numpy(labels),
        "loss_mask": torch.from_numpy(loss_mask),
        "position_ids": torch.from_numpy(positions),
        "noise": torch.from_numpy(noise),
        "cu_seqlens": torch.from_numpy(borders),
        "max_seqlen": torch.tensor(np.diff(borders).max(), dtype=torch.int32),
    }
