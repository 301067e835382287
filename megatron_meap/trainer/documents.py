"""Megatron's datasets of documents, without anything that makes a sample depend on those that were read before it.

A sample must depend only on its index: the layout, the data workers and the point of resumption determine which
samples a process reads, and in which order. The classes have Megatron's names, which are part of the names of its data
caches.
"""

import copy
import zlib
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from megatron.core.datasets import gpt_dataset
from megatron.core.datasets.utils import Split
from megatron.core.utils import accepts_parameter
from megatron.training.datasets.fim_dataset import GPTFIMDataset

from megatron_meap.tokenization.mask_token import special_id
from megatron_meap.tokenization.reference import plain_encode


class _CleanCache(gpt_dataset.GPTDataset):
    """Keeps a loss mask of ones for all samples, and identifies its cached indices by the lengths of the documents.

    On the first read, Megatron's own returns the very tensor that it caches, with that sample's padding removed: the
    same positions of every later sample would be missing from the loss as well. And it identifies the cached indices of
    samples by the dataset's path: if other data is now in its place, that would be cut by the lengths of documents that
    no longer exist.
    """

    def __init__(self, indexed_dataset: Any, dataset_path: str | None, *args: Any, **kwargs: Any) -> None:
        if dataset_path is not None:  # Megatron uses it only as a name
            lengths = np.ascontiguousarray(indexed_dataset.sequence_lengths)
            dataset_path = f"{dataset_path} ({len(lengths)} sequences, lengths {zlib.crc32(lengths):08x})"
        super().__init__(indexed_dataset, dataset_path, *args, **kwargs)

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        first = not self.masks_and_position_ids_are_cached
        sample = super().__getitem__(idx)
        if first and self.masks_and_position_ids_are_cached:
            self.cached_loss_mask = torch.ones_like(sample["loss_mask"])
        return sample


class GPTDataset(_CleanCache):
    """Samples of packed documents, assembled from slices of one array: faster than through Megatron's index."""

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """Megatron's sample; where nothing is padded, without its search for padding, which takes half of the time."""
        config = self.config
        varying = (
            config.inter_document_masking or config.create_attention_mask or not config.add_extra_token_to_sequence
        )
        if idx is None or varying or not self.masks_and_position_ids_are_cached:
            return super().__getitem__(idx)
        text, _, _ = self._query_document_sample_shuffle_indices(idx)
        if (text == self._pad_token_id).any():
            return super().__getitem__(idx)
        tokens = torch.from_numpy(text)
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": self.cached_loss_mask.clone(),
            "position_ids": self.cached_position_ids,
        }

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[np.ndarray, np.ndarray, list]:
        tokens = self._tokens
        if tokens is None or self.shuffle_index is None:  # not mapped, or not yet
            return super()._query_document_sample_shuffle_indices(idx)
        sample_index, shuffle_index, document_index = self._plain_indices
        (first, skipped), (last, stop) = sample_index[shuffle_index[idx] :][:2].tolist()
        documents = document_index[first : last + 1]
        index = self.dataset.index
        starts = (index.sequence_pointers[documents] // tokens.itemsize).tolist()
        ends = [
            start + length for start, length in zip(starts, index.sequence_lengths[documents].tolist(), strict=True)
        ]
        ends[-1] = starts[-1] + stop + self.config.add_extra_token_to_sequence
        starts[0] += skipped
        parts = [tokens[start:end] for start, end in zip(starts, ends, strict=True)]
        lengths = [len(part) for part in parts]
        if missing := self.config.sequence_length + self.config.add_extra_token_to_sequence - sum(lengths):
            parts.append(np.full(missing, self._pad_token_id))
        return np.concatenate(parts, dtype=np.int64), documents.astype(np.int64), lengths

    @cached_property
    def _plain_indices(self) -> tuple[np.ndarray, ...]:
        """The indices of samples without what NumPy does for each slice of a file that is mapped."""
        return tuple(map(np.asarray, (self.sample_index, self.shuffle_index, self.document_index)))

    @cached_property
    def _tokens(self) -> np.ndarray | None:
        """All tokens of the indexed dataset, if its file is mapped into memory."""
        buffer = getattr(self.dataset.bin_reader, "_bin_buffer", None)
        return None if buffer is None else np.frombuffer(buffer, self.dataset.index.dtype)


class MockGPTDataset(_CleanCache, gpt_dataset.MockGPTDataset):
    """Samples of made-up documents (`--mock-data`)."""


class _PlainText:
    """A Megatron tokenizer that parses no special tokens in text."""

    def __init__(self, tokenizer: Any) -> None:
        self._decode = tokenizer._tokenizer.ids_to_text
        self._without_special = (
            {"remove_special_tokens": True} if accepts_parameter(self._decode, "remove_special_tokens") else {}
        )
        self.text_to_ids = plain_encode(tokenizer)

    def ids_to_text(self, ids: np.ndarray, remove_special_tokens: bool = True) -> str:
        return self._decode(ids.tolist(), **self._without_special)


class StatelessFIMDataset(_CleanCache, GPTFIMDataset):
    """Fill-in-the-middle samples.

    Megatron's own draws from one running generator per process, and parses special tokens in the text that it encodes
    again: a document that mentions `[MASK]` would have the mask's id in its inputs and labels. And it loses the BOS
    of a document, which is not text: here that stays in front of the sentinels.
    """

    def __init__(self, *args: Any) -> None:
        *others, config = args
        config = copy.copy(config)
        if isinstance(config.fim_split_sample, str):  # which tiktoken would take for a list of characters
            config.fim_split_sample = [config.fim_split_sample]
        super().__init__(*others, config)
        self._text = SimpleNamespace(_tokenizer=_PlainText(self.config.tokenizer))

    def _permute(self, sample: Any, fim_rate: float, fim_spm_rate: float, tokenizer: Any, **settings: Any) -> Any:
        start = int(len(sample) > 0 and sample[0] == special_id(tokenizer, "bos"))
        permuted = super()._permute(sample[start:], fim_rate, fim_spm_rate, self._text, **settings)
        return np.concatenate([sample[:start], permuted])

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[Any, Any, list]:
        self.np_rng = np.random.RandomState([self.config.random_seed % 2**32, idx])
        return super()._query_document_sample_shuffle_indices(idx)


class WholeRounds(torch.utils.data.Dataset):
    """A validation set, filled up so that all data-parallel ranks read the same number of samples.

    Megatron lets ranks that run out of samples read their first ones again, which would count twice. Here the extra
    samples have no loss.

    Args:
        dataset: validation samples with a `loss_mask`, each read once.
        ranks: data-parallel size.
    """

    split = Split.valid  # by which Megatron's data loader chooses its sampler

    def __init__(self, dataset: Any, ranks: int) -> None:
        self.dataset = dataset
        self.ranks = ranks

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.ranks) * self.ranks

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index`, or one without loss beyond the end of the validation set."""
        if index < len(self.dataset):
            return self.dataset[index]
        sample = self.dataset[len(self.dataset) - 1]
        return {**sample, "loss_mask": torch.zeros_like(sample["loss_mask"])}
