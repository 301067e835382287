"""A whole validation set is read once, whatever the number of data-parallel ranks."""

import pytest
import torch

from megatron_meap.trainer.documents import WholeRounds


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_each_sample_counts_once(ranks: int) -> None:
    samples = [{"tokens": torch.full((4,), number), "loss_mask": torch.ones(4)} for number in range(5)]
    whole = WholeRounds(samples, ranks)
    assert len(whole) % ranks == 0
    assert 0 <= len(whole) - len(samples) < ranks
    read = [whole[index] for index in range(len(whole))]
    assert [int(each["tokens"][0]) for each in read if each["loss_mask"].any()] == [0, 1, 2, 3, 4]
    assert all(each["loss_mask"].all() for each in samples)  # what fills up is a copy
