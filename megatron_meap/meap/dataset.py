"""The one place where MEAP touches data: a wrapper that masks the input tokens of a dataset's samples."""

from typing import Any, Protocol

import numpy as np
import torch

from megatron_meap.errors import UsageError
from megatron_meap.meap.masking import Masking


class Samples(Protocol):
    """What is wrapped: any map-style dataset whose samples hold `tokens` and `loss_mask`, each [sequence length]."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int | None) -> dict[str, torch.Tensor]:
        """One sample; index None asks Megatron's datasets for a padding sample."""


class MaskedInputDataset(torch.utils.data.Dataset):
    """Masks `tokens` of the wrapped dataset's samples; everything else in a sample passes through untouched.

    It wraps the *top-level* dataset of a split (the blend, where there is one). Megatron's sampler walks that
    dataset's index in order, so the index is the consumed-sample count: masks do not depend on the parallel layout,
    the data workers or the point of resumption, and every epoch draws new ones.

    Args:
        dataset: the top-level dataset of the split, as Megatron's builder returns it.
        masking: which positions, for which index.
        split: Megatron's `Split` of the dataset; its data loader chooses batch sizes by it.
        mask_token_id: id written to the masked positions.
        vocab_size: ids at or above it cannot come from the model's tokenizer.
        protected_ids: tokens that are never masked (EOD, BOS); when empty, padding may be masked too.
        first_index: number of samples consumed before index 0 (Megatron's training phases restart the index).
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
    ) -> None:
        self.dataset = dataset
        self.masking = masking
        self.split = split
        self.mask_token_id = mask_token_id
        self.vocab_size = vocab_size
        self.protected_ids = protected_ids
        self.first_index = first_index

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | None) -> dict[str, torch.Tensor]:
        """Return the sample with masked `tokens`; index None (padding of an incomplete batch) passes through."""
        sample = self.dataset[index]
        if index is None:
            return sample
        tokens = sample["tokens"].numpy()  # on 4,096 numbers NumPy has the smaller overhead
        self._check_ids(tokens, index)
        protected = self._protected(tokens, sample["loss_mask"])
        masked = tokens.copy()  # the wrapped dataset may cache the tensors it returns
        masked[self.masking.positions(self.first_index + int(index), len(tokens), protected)] = self.mask_token_id
        return {**sample, "tokens": torch.from_numpy(masked)}

    def _protected(self, tokens: np.ndarray, loss_mask: torch.Tensor) -> np.ndarray | None:
        """Positions that must stay, bool [sequence length], or None where nothing is protected."""
        if not self.protected_ids:
            return None
        # GPTDataset rewrites padding to id 0 and takes it out of the loss: that pair is what tells it apart.
        protected = tokens == 0
        if protected.any():
            protected &= loss_mask.numpy() == 0
        for token in self.protected_ids:
            protected |= tokens == token
        return protected

    def _check_ids(self, tokens: np.ndarray, index: int) -> None:
        """Refuse ids that the model has no row for: vocabulary-parallel layers would take them silently."""
        largest = int(tokens.max())
        if largest >= self.vocab_size:
            raise UsageError(
                f"--data-path: sample {index} holds token id {largest}, but the tokenizer has {self.vocab_size} "
                "tokens: the dataset was made with another tokenizer; preprocess it again with this one"
            )
