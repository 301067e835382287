"""Megatron's datasets of documents, freed of what makes a sample depend on those that were read before it.

A sample must be a function of its index alone: the layout, the data workers and the point of resumption decide which
samples a process reads, and in which order. The classes are named as Megatron's, whose names are part of what names
its data caches.
"""

from typing import Any

import numpy as np
import torch
from megatron.core.datasets import gpt_dataset
from megatron.training.datasets.fim_dataset import GPTFIMDataset


class _CleanCache(gpt_dataset.GPTDataset):
    """Keeps a loss mask of ones for all samples.

    Megatron's own returns the very tensor that it keeps on the first read, after it has taken that sample's padding out
    of it: the same positions of every later sample would be out of the loss as well.
    """

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        first = not self.masks_and_position_ids_are_cached
        sample = super().__getitem__(idx)
        if first and self.masks_and_position_ids_are_cached:
            self.cached_loss_mask = torch.ones_like(sample["loss_mask"])
        return sample


class GPTDataset(_CleanCache):
    """Samples of packed documents."""


class MockGPTDataset(_CleanCache, gpt_dataset.MockGPTDataset):
    """Samples of made-up documents (`--mock-data`)."""


class StatelessFIMDataset(_CleanCache, GPTFIMDataset):
    """Fill-in-the-middle samples.

    Megatron's own draws from one running generator a process.
    """

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[Any, Any, list]:
        self.np_rng = np.random.RandomState([self.config.random_seed % 2**32, idx])
        return super()._query_document_sample_shuffle_indices(idx)
