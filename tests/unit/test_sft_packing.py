"""Packed samples: every row once per epoch, little waste, everything determined by seed, epoch and index."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.utils import Split
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

from megatron_meap.meap.masking import Masking, RatioSchedule
from megatron_meap.sft.dataset import RowSettings, SFTDataset
from megatron_meap.sft.packing import plan_epoch
from tests.unit.test_sft_rows import MASK, store_of, turn_of

LENGTH = 256


def make(pack: bool = True, samples: int | None = None, count: int = 120, **more) -> SFTDataset:
    draw = np.random.default_rng(0)
    lengths = zip(draw.integers(2, 60, count), draw.integers(0, 150, count), strict=True)
    turns = [turn_of(draw.integers(10, 900, p).tolist(), draw.integers(10, 900, a).tolist()) for p, a in lengths]
    options = RowSettings(LENGTH, Masking(RatioSchedule(0.1), seed=3), MASK, pack=pack, **more)
    return SFTDataset(store_of(turns), np.arange(count), options, Split.train, samples)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(0, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_row_once_and_no_sample_too_full(lengths: list[int], epoch: int, pack: bool) -> None:
    sizes = np.array(lengths)
    plan = plan_epoch(sizes, 50, 1, epoch, pack)
    assert sorted(plan.rows.tolist()) == list(range(len(sizes)))
    assert all(1 <= sizes[plan[sample]].sum() <= 50 for sample in range(len(plan)))
    assert len(plan) == len(plan_epoch(sizes, 50, 2, epoch + 1, pack))  # any epoch has as many samples
    open_bins = [50 - sizes[plan[sample]].sum() for sample in range(len(plan))]
    if pack:  # no two samples would fit into one
        assert len(open_bins) < 2 or sum(sorted(open_bins)[-2:]) < 50 + max(lengths)


def test_padding_stays_below_five_percent() -> None:
    """Rows as instruction data has them: log-normal, most of them short against the sequence length."""
    draw = np.random.default_rng(1)
    for mean, length in ((5.3, 2048), (5.3, 4096), (6.5, 4096)):
        sizes = np.minimum(np.exp(draw.normal(mean, 0.9, 5000)).astype(np.int64) + 8, length)
        plan = plan_epoch(sizes, length, 1, 0)
        assert 1 - sizes.sum() / (len(plan) * length) < 0.05


def test_epochs_differ_in_order_company_and_masks() -> None:
    dataset = make()
    first, second = dataset._plan(0), dataset._plan(1)
    assert len(first) == len(second) == dataset.epoch_samples
    assert first.rows.tolist() != second.rows.tolist()
    company = [{frozenset(plan[sample].tolist()) for sample in range(len(plan))} for plan in (first, second)]
    assert company[0] != company[1]
    copies = np.flatnonzero(dataset.rows.kinds == 1)
    different = [not np.array_equal(dataset.row(row, 0).tokens, dataset.row(row, 1).tokens) for row in copies.tolist()]
    assert all(different)


@pytest.mark.parametrize("concat", [False, True])
def test_samples_hold_their_rows_and_borders(concat: bool) -> None:
    dataset = make(concat=concat)
    for index in (0, 3, dataset.epoch_samples + 1):
        epoch, place = divmod(index, dataset.epoch_samples)
        sample = dataset[index]
        rows = [dataset.row(int(row), epoch) for row in dataset._plan(epoch)[place]]
        borders = torch.unique_consecutive(sample["cu_seqlens"]).tolist()
        assert sample["cu_seqlens"].shape == (LENGTH + 1,)
        assert sample["cu_seqlens"].dtype == sample["max_seqlen"].dtype == torch.int32
        assert borders[0] == 0
        assert borders[-1] == LENGTH
        assert int(sample["max_seqlen"]) == max(np.diff(borders))
        for row, start, end in zip(rows, borders, borders[1:], strict=False):
            assert sample["tokens"][start:end].tolist() == row.tokens[:-1].tolist()
            assert sample["position_ids"][start:end].tolist() == list(range(end - start))
            learned = sample["loss_mask"][start:end].bool()
            assert sample["labels"][start:end][learned].tolist() == row.labels[row.labels >= 0].tolist()
        padding = slice(borders[len(rows)], LENGTH)
        assert not sample["loss_mask"][padding].any()
        assert not sample["tokens"][padding].any()


def batches(dataset: SFTDataset, ranks: int, rank: int, workers: int, consumed: int = 0) -> list[torch.Tensor]:
    sampler = MegatronPretrainingSampler(
        total_samples=len(dataset), consumed_samples=consumed, micro_batch_size=1, data_parallel_rank=rank,
        data_parallel_size=ranks,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=sampler, num_workers=workers)
    return [torch.cat([batch["tokens"], batch["labels"], batch["loss_mask"].long()]) for batch in loader]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (4, 2)])
def test_the_same_stream_for_every_layout_worker_and_resume(ranks: int, workers: int) -> None:
    whole = batches(make(samples=160), 1, 0, 0)  # several epochs
    assert len(whole) == 160 > 1.4 * make().epoch_samples
    streams = [batches(make(samples=160), ranks, rank, workers) for rank in range(ranks)]
    together = [sample for step in zip(*streams, strict=True) for sample in step]
    assert all(map(torch.equal, together, whole))
    assert all(map(torch.equal, batches(make(samples=160), 1, 0, workers, consumed=104), whole[104:]))


def test_spawned_data_workers_get_the_same_samples() -> None:
    dataset = make()
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[3]["tokens"], dataset[3]["tokens"])


def test_padding_samples_teach_nothing() -> None:
    dataset = make()
    assert not dataset[None]["loss_mask"].any()
    assert dataset[0]["loss_mask"].any()


def test_seeds_decide_order_and_masks_apart() -> None:
    one, other = make(), make(seed=99)
    assert one._plan(0).rows.tolist() != other._plan(0).rows.tolist()
    row = int(np.flatnonzero(one.rows.kinds == 1)[0])
    assert np.array_equal(one.row(row, 0).tokens, other.row(row, 0).tokens)
