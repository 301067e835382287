"""Bits per byte of a model on validation data: a loss that can be compared between tokenizers."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_meap.meap.losses import bits_per_byte
from megatron_meap.preprocessing.index import read_index
from megatron_meap.tokenization.text_bytes import text_bytes


def validation_samples(args: Namespace, count: int) -> np.ndarray | None:
    """Samples [n, sequence length + 1] of ids, evenly spread over the validation documents of a pretraining.

    They come from the same documents as the samples of the training's own evaluation, but are not the same.

    Args:
        args: of a run, or in its checkpoint. Needs Megatron.
        count: how many at most, shared evenly among the datasets of a blend.

    Returns:
        The ids, or None if the run has no such data.

    Raises:
        UsageError: the data no longer exists.
    """
    from megatron_meap.trainer.blend import blends, ranges

    if args.mock_data or getattr(args, "meap_sft", False):
        return None
    blend, per_split = blends(args)
    part, share = (per_split or [None, None])[1], (0.0, 1.0)
    if blend is not None and args.split is not None and (found := ranges(args)[1]) is not None:
        part, share = blend, found
    if part is None:
        return None
    each = max(1, count // len(part[0]))
    return np.concatenate([_samples(prefix, share, args.seq_length + 1, each) for prefix in part[0]])


def _samples(prefix: str, share: tuple[float, float], length: int, count: int) -> np.ndarray:
    """Samples of one dataset, from the documents between two shares of all."""
    index = read_index(prefix)
    first, last = (round(border * index.documents) for border in share)
    begin, end = (int(index.lengths[:document].sum(dtype=np.int64)) for document in (first, last))
    ids = np.memmap(Path(prefix + ".bin"), dtype=index.dtype, mode="r")[begin:end]
    starts = range(0, max(0, len(ids) - length) + 1, max(length - 1, (len(ids) - length) // count or 1))
    found = [ids[start : start + length] for start in starts[:count] if start + length <= len(ids)]
    return np.array(found, dtype=np.int64).reshape(-1, length)


@torch.no_grad()
def measure(model: Any, tokenizer: Any, samples: np.ndarray, batch: int = 8) -> float | None:
    """Bits per byte of a model of transformers, counted as in training; None if the bytes of its tokens are unknown.

    Args:
        model: on its device.
        tokenizer: its own, of transformers.
        samples: [n, s + 1] ids.
        batch: samples at once.
    """
    if (sizes := text_bytes(tokenizer)) is None or len(samples) == 0:
        return None
    table = torch.from_numpy(sizes).to(model.device)
    total = torch.zeros(2, dtype=torch.float64)
    for first in range(0, len(samples), batch):
        ids = torch.from_numpy(samples[first : first + batch]).to(model.device)
        labels = ids[:, 1:]
        logits = model(ids[:, :-1]).logits.float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        total += bits_per_byte(losses, torch.ones_like(losses), labels, table).cpu()
    bits, text = total.tolist()
    return bits / text if text else None
