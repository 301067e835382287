"""The one place where MEAP touches data: a wrapper that noises the input tokens of a dataset's samples."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch

from megatron_meap.errors import UsageError
from megatron_meap.meap.masking import Masking

NOISED, COPY = 1, 2
"""Bits of `noise`: the input is not the clean token; the sample is the noised copy of the one before it."""


def noise_of(sample: Mapping[str, torch.Tensor], mask_token_id: int) -> torch.Tensor:
    """What was done to the inputs of a sample or a batch, uint8 in the shape of its tokens: `NOISED` and `COPY`.

    The mask token cannot come from text, so it is its own mark; if that is not enough, samples carry `noise`.
    """
    noise = sample.get("noise")
    return (sample["tokens"] == mask_token_id).to(torch.uint8) if noise is None else noise


class Samples(Protocol):
    """What is wrapped: any map-style dataset whose samples hold `tokens` and `loss_mask`, each [sequence length]."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int | None) -> dict[str, torch.Tensor]:
        """One sample; index None asks Megatron's datasets for a padding sample."""


class MaskedInputDataset(torch.utils.data.Dataset):
    """Noises `tokens` of the wrapped dataset's samples; what else they hold passes through untouched.

    `noise_of` tells what was done to a sample; with random replacement or copies, samples carry it as `noise`, uint8
    [sequence length].

    It wraps the *top-level* dataset of a split (the blend, if there is one). Megatron's sampler walks that dataset's
    index in order, so the index is the consumed-sample count: noise does not depend on the parallel layout, the data
    workers or the point of resumption, and differs in every epoch.

    With a `copy_weight` every sample comes twice, clean at an even index and noised at the odd one after it, whose
    loss mask is multiplied by the weight: if the global batch size is even, both are in the same global batch.

    Args:
        dataset: the top-level dataset of the split, as Megatron's builder returns it.
        masking: which positions, for which index, and what they become.
        split: Megatron's `Split` of the dataset; its data loader chooses batch sizes by it.
        mask_token_id: id of the mask token.
        vocab_size: ids at or above it cannot come from the model's tokenizer.
        protected_ids: tokens that are never noised (EOD, BOS); when empty, padding may be noised too.
        first_index: number of samples consumed before index 0 (Megatron's training phases restart the index).
        copy_weight: weight of the loss of noised copies; None if the samples themselves are noised.
    """

    def __init__(
        self,
        dataset: Samples,
        masking: Masking,
        *,
        split: Any,
        mask_token_id: int,
        vocab_size: int,
        protected_ids: tuple[int, ...] = (),
        first_index: int = 0,
        copy_weight: float | None = None,
    ) -> None:
        self.dataset = dataset
        self.masking = masking
        self.split = split
        self.mask_token_id = mask_token_id
        self.vocab_size = vocab_size
        self.protected_ids = protected_ids
        self.first_index = first_index
        self.copy_weight = copy_weight
        self._tells = copy_weight is not None or masking.replacement.random_share > 0
        self._stays = np.zeros(vocab_size, bool)  # by token id; the lookup also finds invalid ids
        self._stays[[each for each in protected_ids if each < vocab_size]] = True

    def __len__(self) -> int:
        return len(self.dataset) * (1 if self.copy_weight is None else 2)

    def clean(self, index: int) -> dict[str, torch.Tensor]:
        """The sample as the wrapped dataset has it."""
        return self.dataset[index if self.copy_weight is None else index // 2]

    def __getitem__(self, index: int | None) -> dict[str, torch.Tensor]:
        """Return the sample with noised `tokens`; index None (padding of an incomplete batch) passes through."""
        if index is None:
            return self._told(self.dataset[None])
        sample = self.clean(index)
        tokens = sample["tokens"].numpy()  # on 4,096 numbers NumPy has the smaller overhead
        protected = self._protected(tokens, sample["loss_mask"], index)
        if self.copy_weight is not None and index % 2 == 0:
            return self._told(sample)
        positions, ids = self.masking.noise(self.first_index + int(index), tokens, self.mask_token_id, protected)
        noised = tokens.copy()  # the wrapped dataset may cache the tensors it returns
        noised[positions] = ids
        changed = {"tokens": torch.from_numpy(noised)}
        if self._tells:
            noise = (noised != tokens).view(np.uint8)
            changed["noise"] = torch.from_numpy(noise)
        if self.copy_weight is not None:
            noise |= COPY
            changed["loss_mask"] = sample["loss_mask"] * self.copy_weight
        return {**sample, **changed}

    def _told(self, sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A clean sample, with the keys of the others, with which it is batched."""
        return {**sample, "noise": torch.zeros_like(sample["tokens"], dtype=torch.uint8)} if self._tells else sample

    def _protected(self, tokens: np.ndarray, loss_mask: torch.Tensor, index: int = 0) -> np.ndarray | None:
        """Positions that must stay, bool [sequence length], or None if nothing is protected.

        Ids without a row in the model are refused: vocabulary-parallel layers would accept them silently.
        """
        try:
            protected = self._stays[tokens]
        except IndexError:
            raise UsageError(
                f"--data-path: sample {index} holds token id {tokens.max()}, but the tokenizer has {self.vocab_size} "
                "tokens: the dataset was made with another tokenizer; preprocess it again with this one"
            ) from None
        if not self.protected_ids:
            return None
        # GPTDataset rewrites padding to id 0 and removes it from the loss, which together identify it.
        padding = tokens == 0
        if padding.any():
            protected |= padding & (loss_mask.numpy() == 0)
        return protected
