"""The wrapper: what it masks and what it leaves unchanged, the same for every layout, worker and resume."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets import gpt_dataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.utils import Split
from megatron.core.tokenizers import MegatronTokenizer
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from megatron.training.datasets.fim_dataset import GPTFIMDatasetConfig

from megatron_meap.errors import UsageError
from megatron_meap.meap.dataset import NOISED, MaskedInputDataset, noise_of
from megatron_meap.meap.masking import Masking, RatioSchedule, num_masks
from megatron_meap.meap.objectives import OBJECTIVES
from megatron_meap.meap.settings import MaskSettings
from megatron_meap.trainer.documents import GPTDataset, MockGPTDataset, StatelessFIMDataset
from tests.conftest import Corpus

LENGTH = 128
MASK = 600
SAMPLES = 96


@pytest.fixture(scope="module")
def build(corpus: Corpus, huggingface_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """Builds a part of Megatron's dataset of a kind: gpt, blend, documents (inter-document masking), fim, mock."""
    tokenizer, fim_tokenizer = (
        MegatronTokenizer.from_pretrained(tokenizer_path=str(path), metadata_path={"library": library})
        for path, library in ((corpus.tokenizer, "sentencepiece"), (huggingface_folder, "huggingface"))
    )

    def make(kind: str = "gpt", samples: int = SAMPLES, part: int = 0, **settings):
        blend = ([corpus.prefix, corpus.prefix], [0.7, 0.3]) if kind == "blend" else ([corpus.prefix], None)
        fields = {
            "random_seed": 1234,
            "sequence_length": LENGTH,
            "blend": None if kind == "mock" else blend,
            "split": "90,10,0",
            "path_to_cache": str(tmp_path_factory.mktemp("cache")),
            "tokenizer": fim_tokenizer if kind == "fim" else tokenizer,
            "reset_position_ids": False,
            "reset_attention_mask": False,
            "eod_mask_loss": False,
            "create_attention_mask": False,
            "inter_document_masking": kind == "documents",
            "mid_level_dataset_surplus": 0.005,
        } | settings
        if kind == "fim":
            names = {name: f"<{name}>" for name in ("prefix", "middle", "suffix", "pad")} | {"eod": "<eos>"}
            config = GPTFIMDatasetConfig(
                **fields, fim_rate=0.5, fim_spm_rate=0.5, fim_extra_tokens=names, fim_split_sample=None,
                fim_fragment_rate=None, fim_no_prefix=None,
            )  # fmt: skip
        else:
            config = GPTDatasetConfig(**fields)
        dataset = {"mock": MockGPTDataset, "fim": StatelessFIMDataset}.get(kind, GPTDataset)
        return BlendedMegatronDatasetBuilder(dataset, [samples, 8, 0], lambda: True, config).build()[part]

    return make


def test_indices_of_data_that_was_replaced_are_not_used(build, corpus: Corpus, tmp_path: Path) -> None:
    """Other data under the same name and with the same cache gives the samples that it gives with a new one."""
    blend = ([str(tmp_path / "data")], None)
    built = []
    for source, cache in ((corpus.prefix, "one"), (corpus.second_prefix, "one"), (corpus.second_prefix, "two")):
        for suffix in (".bin", ".idx"):
            shutil.copy(source + suffix, str(tmp_path / "data") + suffix)
        dataset = build(blend=blend, path_to_cache=str(tmp_path / cache))
        built.append(torch.stack([dataset[i]["tokens"] for i in range(SAMPLES)]))
    first, replaced, anew = built
    assert torch.equal(replaced, anew)
    assert not torch.equal(replaced, first)


def test_the_same_data_uses_its_indices_again(build, tmp_path: Path) -> None:
    seen = []
    for _ in range(2):
        build(path_to_cache=str(tmp_path))
        seen.append({path: path.stat().st_mtime_ns for path in tmp_path.iterdir()})
    assert seen[0] == seen[1]


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("length", [50, 3000])
@pytest.mark.parametrize("kind", ["gpt", "documents"])
def test_samples_are_megatrons_own(build, kind: str, length: int, mapped: bool) -> None:
    """Bit for bit, of documents longer and shorter than a sample, to the last one, which may be padded."""
    settings = {"sequence_length": length, "mmap_bin_files": mapped, "drop_last_partial_validation_sequence": False}
    for part in (0, 1):
        ours, theirs = (build(kind, part=part, **settings) for _ in range(2))
        theirs.__class__ = gpt_dataset.GPTDataset
        assert (ours._tokens is not None) == mapped
        assert len(ours) == len(theirs)
        for index in [*range(len(ours)), None]:
            one, other = ours[index], theirs[index]
            assert one.keys() == other.keys()
            for key, value in one.items():
                assert value.dtype == other[key].dtype
                assert torch.equal(value, other[key]), (index, key)
        padded = [index for index in range(len(ours)) if ours[index]["loss_mask"].min() == 0]
        assert len(padded) == part


def test_padding_that_stands_in_a_text_is_megatrons_too(build) -> None:
    ours, theirs = build(), build()
    theirs.__class__ = gpt_dataset.GPTDataset
    ours[0], theirs[0]  # from here on both have a loss mask of ones to copy
    frequent = int(ours[0]["tokens"].mode().values)
    ours._pad_token_id = theirs._pad_token_id = frequent
    for index in range(SAMPLES):
        one, other = ours[index], theirs[index]
        assert all(torch.equal(one[key], other[key]) for key in other)
    assert any(ours[index]["loss_mask"].min() == 0 for index in range(SAMPLES))


def masked(dataset, ratio: float = 0.15, **settings) -> MaskedInputDataset:
    options = {"split": Split.train, "mask_token_id": MASK, "vocab_size": 600} | settings
    return MaskedInputDataset(dataset, Masking(RatioSchedule(ratio)), **options)


@pytest.mark.parametrize("kind", ["gpt", "blend", "documents", "fim", "mock"])
def test_masks_the_tokens_and_nothing_else(build, kind: str) -> None:
    inner = build(kind)
    wrapped = masked(inner)
    assert len(wrapped) == len(inner)
    for index in (0, 1, SAMPLES - 1):
        before = dict(inner[index])
        after = wrapped[index]
        changed = after["tokens"] == MASK
        assert int(changed.sum()) == num_masks(0.15, LENGTH)
        for key, value in before.items():
            if key == "tokens":
                assert torch.equal(after[key][~changed], value[~changed])
            else:
                assert torch.equal(torch.as_tensor(after[key]), torch.as_tensor(value)), key
        # labels stay the clean, shifted tokens: they continue the unmasked inputs
        assert torch.equal(after["labels"][:-1][~changed[1:]], after["tokens"][1:][~changed[1:]])


@pytest.fixture(scope="module")
def kinds(build) -> dict[str, Any]:
    return {kind: build(kind) for kind in ("gpt", "blend", "documents", "fim", "mock")}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", ["gpt", "blend", "documents", "fim", "mock"])
def test_every_objective_with_every_kind_of_data(kinds: dict[str, Any], kind: str, objective: str, tmp_path) -> None:
    """Inputs change only where and to what they may, and everything else stays clean; batches have both."""
    special, inner = (1, 2), kinds[kind]
    given = {"mask_ratio": 0.15, "mask_seed": 7} | OBJECTIVES[objective].settings
    if given.get("mask_strategy") == "weighted":
        np.save(tmp_path / "weights.npy", np.linspace(0, 1, 600))
        given |= {"mask_weights": str(tmp_path / "weights.npy"), "mask_warmup_samples": 4}
    settings = MaskSettings(**given)
    settings.check()
    masking = settings.masking("train", SAMPLES, 4, 600, (*special, MASK))
    if masking is None:
        assert objective == "ntp"
        return
    copies = settings.copy_weight is not None
    options = {"split": Split.train, "mask_token_id": MASK, "vocab_size": 600, "protected_ids": special}
    wrapped = MaskedInputDataset(inner, masking, copy_weight=settings.copy_weight, **options)
    assert len(wrapped) == len(inner) * (2 if copies else 1)
    indices = (0, 1, 6, 7, len(wrapped) - 2, len(wrapped) - 1)
    backwards = {index: wrapped[index] for index in reversed(indices)}
    noised = 0
    for index in indices:
        sample, clean = wrapped[index], inner[index // 2 if copies else index]
        copy = copies and index % 2 == 1
        changed = sample["tokens"] != clean["tokens"]
        became = sample["tokens"][changed]
        assert not torch.isin(clean["tokens"][changed], torch.tensor(special)).any()
        assert not torch.isin(became, torch.tensor(special)).any()
        assert (settings.random_share > 0) or bool((became == MASK).all())
        assert torch.equal((noise_of(sample, MASK) & NOISED).bool(), changed)
        assert not (copies and not copy and changed.any())
        for key, value in clean.items():
            weight = settings.copy_weight if copy and key == "loss_mask" else 1
            if key != "tokens":
                assert torch.equal(torch.as_tensor(sample[key]), torch.as_tensor(value) * weight), key
        for key, value in sample.items():
            assert torch.equal(torch.as_tensor(backwards[index][key]), torch.as_tensor(value)), key
        noised += int(changed.sum())
    assert noised > 0
    batch = torch.utils.data.default_collate(list(backwards.values()))
    assert batch["tokens"].shape == (len(indices), LENGTH)


def test_never_leaks_into_what_the_inner_dataset_caches(build) -> None:
    """Two epochs over a dataset that caches its tensors: what it returns stays as it was."""

    class Caching:
        def __init__(self, dataset) -> None:
            self.samples = [dataset[index] for index in range(8)]

        def __len__(self) -> int:
            return len(self.samples)

        def __getitem__(self, index):
            return self.samples[index]

    inner = build()
    cached = Caching(inner)
    clean = [{key: value.clone() for key, value in inner[index].items()} for index in range(8)]
    wrapped = masked(cached)
    for _epoch in range(2):
        for index in range(8):
            assert (wrapped[index]["tokens"] == MASK).any()
            for key, value in clean[index].items():
                assert torch.equal(cached.samples[index][key], value)
                assert torch.equal(inner[index][key], value)


@pytest.mark.parametrize(
    "flags",
    [(), ("create_attention_mask",), ("eod_mask_loss",), ("reset_position_ids",), ("reset_attention_mask",)],
    ids=" ".join,
)
@pytest.mark.parametrize("kind", ["gpt", "blend", "documents", "fim", "mock"])
def test_samples_do_not_depend_on_those_read_before(build, kind: str, flags: tuple[str, ...]) -> None:
    """Read in two orders by two processes' datasets, with padding in some samples: the same; and nothing changes."""

    def fresh() -> MaskedInputDataset:
        dataset = build(kind, samples=24, **dict.fromkeys(flags, True))
        for part in getattr(dataset, "datasets", [dataset]):
            part._pad_token_id = padding
        return masked(dataset)

    padding = int(build(kind, samples=24)[0]["tokens"][5])
    forward, backward = fresh(), fresh()
    read = [forward[index] for index in range(24)]
    as_read = [{key: torch.as_tensor(value).clone() for key, value in sample.items()} for sample in read]
    assert any((sample["loss_mask"] == 0).any() for sample in read)
    for index in reversed(range(24)):
        sample = backward[index]
        for key, value in as_read[index].items():
            assert torch.equal(torch.as_tensor(sample[key]), value), key
            assert torch.equal(torch.as_tensor(read[index][key]), value), key


def test_epochs_differ(build) -> None:
    """The same sample comes again in a later epoch, under another index, with other masks."""
    inner = build()

    class Repeating:
        """Two epochs of the same four samples, in the same order."""

        def __len__(self) -> int:
            return 8

        def __getitem__(self, index):
            return inner[index % 4]

    wrapped = masked(Repeating())
    for index in range(4):
        first, second = wrapped[index], wrapped[index + 4]
        assert torch.equal(first["labels"], second["labels"])
        assert not torch.equal(first["tokens"], second["tokens"])


def batches(wrapped, ranks: int, rank: int, workers: int, consumed: int = 0) -> list[torch.Tensor]:
    """The token batches that one data-parallel rank trains on: Megatron's own sampler, PyTorch's own loader."""
    sampler = MegatronPretrainingSampler(
        total_samples=SAMPLES, consumed_samples=consumed, micro_batch_size=2, data_parallel_rank=rank,
        data_parallel_size=ranks,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(wrapped, batch_sampler=sampler, num_workers=workers)
    return [batch["tokens"] for batch in loader]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_stream_for_every_layout_and_worker_count(build, ranks: int, workers: int) -> None:
    wrapped = masked(build())
    expected = torch.stack([wrapped[index]["tokens"] for index in range(SAMPLES)])
    streams = [batches(wrapped, ranks, rank, workers) for rank in range(ranks)]
    stream = torch.cat([batch for step in zip(*streams, strict=True) for batch in step])
    assert torch.equal(stream, expected)


def test_the_same_stream_after_a_resume(build) -> None:
    wrapped = masked(build())
    whole = torch.cat(batches(wrapped, 1, 0, 0))
    for consumed in (2, 40):
        assert torch.equal(torch.cat(batches(wrapped, 1, 0, 0, consumed)), whole[consumed:])


def test_later_training_phases_continue_the_index(build) -> None:
    """Megatron restarts the index at a phase transition; the masks go on as if it had not."""
    inner = build()
    whole, second = masked(inner), masked(inner, first_index=10)
    for index in range(5):
        positions = torch.nonzero(second[index]["tokens"] == MASK).flatten().tolist()
        assert positions == sorted(whole.masking.positions(10 + index, LENGTH).tolist())


def test_special_tokens_are_protected(build) -> None:
    inner = build()
    eod = 2
    for index in range(20):
        tokens = inner[index]["tokens"]
        assert torch.equal(masked(inner, 0.9, protected_ids=(1, eod))[index]["tokens"] == eod, tokens == eod)
    unprotected = [masked(inner, 0.9)[index]["tokens"] == eod for index in range(20)]
    assert sum(int(each.sum()) for each in unprotected) < sum(
        int((inner[index]["tokens"] == eod).sum()) for index in range(20)
    )


def test_padding_is_protected() -> None:
    """Megatron turns padding into id 0 with a loss mask of 0; a real id 0 has a loss."""
    tokens, loss_mask = torch.tensor([5, 0, 7, 0, 0]), torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])
    wrapped = masked(SimpleNamespace(__len__=lambda: 1), 0.8, protected_ids=(3,))
    assert wrapped._protected(tokens.numpy(), loss_mask).tolist() == [False, False, False, True, True]


def test_padding_samples_pass_through(build) -> None:
    """Index None fills an incomplete batch: its loss is 0, and it belongs to no sample."""
    sample = masked(build())[None]
    assert not (sample["tokens"] == MASK).any()
    assert not sample["loss_mask"].any()


def test_ids_of_another_tokenizer_are_refused(build) -> None:
    with pytest.raises(UsageError, match="another tokenizer"):
        masked(build(), vocab_size=300)[0]
