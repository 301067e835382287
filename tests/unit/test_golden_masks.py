"""Masks and samples are the same as in earlier versions, because a resumed run must get the same ones."""

import hashlib
import itertools

import numpy as np
import pytest
import torch
from megatron.core.datasets.utils import Split

from megatron_meap.inspection.samples import sample_digest, stream_digest
from megatron_meap.meap.dataset import MaskedInputDataset
from megatron_meap.meap.masking import Masking, RatioSchedule

POSITIONS = {
    "random": "0efde2b6e3e82388c80b698b956c0c04570e95cd2ee0263a1f1ad038e2c1b787",
    "span": "cfe71995559827ee8faa3436adb494651e790c72e7e3e7aa839ed2ac9ea87f52",
    "official": "10435954581d82da3a59478431bbf0542ac3bb46f72f66bc629b3e82bcd31a0c",
}
SAMPLES = {
    "random": "f51e062ab2a64ea73129b2e75a8cb4600a708a20cbdd2b7a754cde6e29811eee",
    "span": "5e0f03f2094bfbe4752e1393f3b57a03cfe71f53a3454bb7b87f035007cfefcc",
    "official": "c32b905c87d798f5a5a42d1d01f8ba0ff3f257c9c16855a8e4ab321244d03615",
}


@pytest.mark.parametrize("strategy", POSITIONS)
def test_positions(strategy: str) -> None:
    """Digests over lengths, ratios, protection, seeds, splits, schedules and indices, in order."""
    digest = hashlib.sha256()
    for length, ratio, share, (seed, split) in itertools.product(
        (2, 7, 64, 1000, 4096), (0.001, 0.1, 0.15, 0.5, 0.97), (0.0, 0.1, 0.9), ((1234, "train"), (2**64 - 1, "valid"))
    ):
        for span_length, warmup in ((1, 0), (3, 100), (8, 0)):
            masking = Masking(RatioSchedule(ratio, warmup, 10**6), strategy, seed, split, span_length, 8)
            for index in (0, 1, 57, 12345, 10**6 - 1, 10**6):
                protected = None if share == 0 else np.random.RandomState(index % 97).rand(length) < share
                digest.update(masking.positions(index, length, protected).astype(np.int64).tobytes() + b"|")
    assert digest.hexdigest() == POSITIONS[strategy]


@pytest.mark.parametrize("strategy", SAMPLES)
def test_samples(strategy: str) -> None:
    """The stream's digest, as `tools/inspect_batches.py --digest` prints it: tokens, labels, loss mask, positions."""

    class Source:
        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int | None) -> dict[str, torch.Tensor]:
            text = torch.from_numpy(np.random.RandomState(index).randint(0, 500, 513))
            loss_mask = torch.ones(512)
            loss_mask[-(index or 0) % 7 :] = 0
            return {"tokens": text[:-1], "labels": text[1:], "loss_mask": loss_mask, "position_ids": torch.arange(512)}

    masking = Masking(RatioSchedule(0.15, 16, 60), strategy, 99, global_batch_size=4)
    dataset = MaskedInputDataset(
        Source(), masking, split=Split.train, mask_token_id=500, vocab_size=500, protected_ids=(1, 2), first_index=3
    )
    assert stream_digest(sample_digest(dataset[index]) for index in range(64)) == SAMPLES[strategy]
