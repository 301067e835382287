"""What distinguishes the data of two pretraining runs: digests, the blend, and how often each part is read."""

import hashlib
import math
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_meap.preprocessing.index import read_index
from megatron_meap.trainer import stages
from megatron_meap.trainer.blend import blends, ranges
from megatron_meap.trainer.data_plan import of_the_data, planned_samples

_BLOCK, _BLOCKS = 1 << 16, 16
_REMOTE = ("s3://", "msc://")


def data_record(args: Namespace) -> dict[str, Any]:
    """The entries of the record about data; empty for mock data and for conversations, which have their own.

    The place of the files does not matter, only their content, their order and their weights.
    """
    if args.mock_data or args.meap_sft:
        return {}
    blend, per_split = blends(args)
    training = blend or (per_split or [None])[0]
    validation = (per_split or [None, None])[1]
    found: dict[str, Any] = {}
    if training is not None:
        prefixes, weights = training
        found["the training data (digests)"] = [dataset_digest(prefix) for prefix in prefixes]
        found["the blend's weights"] = None if weights is None or len(prefixes) == 1 else _normalised(weights)
        found["the stages of the training data"] = _stages(args)
        found["epochs of the training data, by the length of training"] = _all_epochs(args, prefixes, weights)
    if validation is not None:
        found["the validation data (digests)"] = [dataset_digest(prefix) for prefix in validation[0]]
    return found


def dataset_digest(prefix: str) -> str:
    """A digest of a `.bin`/`.idx` pair: of the whole index, and of blocks of the ids at even distances.

    It costs as little for terabytes as for megabytes, and does not rely on a manifest, which may belong to other data.
    """
    if prefix.startswith(_REMOTE):
        return prefix
    digest = hashlib.sha256()
    with open(prefix + ".idx", "rb") as index:
        digest.update(hashlib.file_digest(index, "sha256").digest())
    size = Path(prefix + ".bin").stat().st_size
    starts = range(0, size, _BLOCK) if size <= _BLOCK * _BLOCKS else np.linspace(0, size - _BLOCK, _BLOCKS, dtype=int)
    with open(prefix + ".bin", "rb") as ids:
        for start in starts:
            digest.update(os.pread(ids.fileno(), _BLOCK, int(start)))
    return digest.hexdigest()[:16]


def _normalised(weights: list[float]) -> list[float]:
    """Weights normalised to sum to 1, as in Megatron."""
    return [round(weight / sum(weights), 12) for weight in weights]


def _stages(args: Namespace) -> list[str] | None:
    """The stages in words, with numbers for the datasets; None without stages."""
    if args.meap_data_stages is None:
        return None
    listed = stages.read(args)
    numbers = {prefix: number for number, prefix in enumerate(stages.prefixes(listed), start=1)}
    return [
        f"until sample {stage.end or 'the last'} of the data: "
        + " and ".join(f"{weight:.12g} of dataset {numbers[prefix]}" for prefix, weight in stage.blend.items())
        for stage in listed
    ]


def _all_epochs(args: Namespace, prefixes: list[str], weights: list[float] | None) -> list[str] | None:
    """How often each dataset is read: Megatron shuffles over all epochs, so other epochs give other samples.

    None if that is unknown, or does not depend on the length of training.
    """
    exhausted = weights is None and len(prefixes) > 1 and args.meap_data_stages is None
    remote = any(prefix.startswith(_REMOTE) for prefix in prefixes)
    if exhausted or remote or args.phase_transition_iterations:
        return None
    total = of_the_data(args, planned_samples(args))
    if args.meap_data_stages is not None:
        samples = list(stages.samples(stages.read(args), total).values())
    elif len(prefixes) == 1:
        samples = [total]
    else:
        surplus = 1 + args.mid_level_dataset_surplus
        samples = [math.ceil(math.ceil(total * share / sum(weights or [1])) * surplus) for share in weights or [1]]
    end = (0.0, 1.0) if args.split is None else ranges(args)[0] or (0.0, 0.0)
    tokens = [_tokens(prefix, end) for prefix in prefixes]
    return [_epochs(each, wanted, args.seq_length) for each, wanted in zip(tokens, samples, strict=True)]


def _tokens(prefix: str, share: tuple[float, float]) -> int:
    """Tokens of an epoch of a dataset's training documents."""
    index = read_index(prefix)
    first, last = (round(border * index.documents) for border in share)
    return int(index.lengths[first:last].sum(dtype=np.int64))


def _epochs(tokens: int, samples: int, sequence_length: int) -> str:
    """Epochs that Megatron's `GPTDataset` shuffles together, and whether the last is shuffled separately, as text."""
    if tokens == 0:
        return "0"
    epochs = max(1, math.ceil((samples * sequence_length + 1) / tokens))
    if epochs == 1:
        return "1"
    of_the_last = samples - ((epochs - 1) * tokens - 1) // sequence_length
    apart = of_the_last < int(0.80 * ((tokens - 1) // sequence_length))
    return f"{epochs - 1}+1" if apart else str(epochs)
