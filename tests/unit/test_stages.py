"""Staged data: every sample in its stage and share, none twice, each determined by its index alone."""

import itertools
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.tokenizers import MegatronTokenizer

from megatron_meap.errors import UsageError
from megatron_meap.trainer import stages
from megatron_meap.trainer.documents import GPTDataset
from megatron_meap.trainer.record import Verdict, differences
from megatron_meap.trainer.stages import Stage
from tests.conftest import Corpus
from tests.launch import MODEL, TRAINING
from tests.sft import prepare

LENGTH, DOCUMENTS, DOCUMENT = 8, 60, 100
EPOCH = (DOCUMENTS * DOCUMENT - 1) // LENGTH
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets in which a token tells where it stands: number * 10,000 + position."""
    folder = tmp_path_factory.mktemp("stages")
    for number, name in enumerate(NAMES):
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.int32)
        for document in range(DOCUMENTS):
            first = 10_000 * number + document * DOCUMENT
            builder.add_document(torch.arange(first, first + DOCUMENT), [DOCUMENT])
        builder.finalize(str(folder / f"{name}.idx"))
    return folder


@pytest.fixture(scope="module")
def config(folder: Path, corpus: Corpus) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=7, sequence_length=LENGTH, blend_per_split=[([str(folder / "a")], None), None, None],
        path_to_cache=str(folder / "cache"), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False, mid_level_dataset_surplus=0.005,
        tokenizer=MegatronTokenizer.from_pretrained(
            tokenizer_path=corpus.tokenizer, metadata_path={"library": "sentencepiece"}
        ),
    )  # fmt: skip


@st.composite
def plans(draw) -> tuple[list[dict[str, float]], list[int]]:
    """Blends, and where they end."""
    count = draw(st.integers(1, 4))
    ends = sorted(draw(st.sets(st.integers(1, EPOCH - 20), min_size=count, max_size=count)))
    weights = st.floats(0.05, 1)
    blends = [draw(st.dictionaries(st.sampled_from(NAMES), weights, min_size=1)) for _ in range(count)]
    return blends, ends


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=plans(), open_end=st.booleans(), seed=st.integers(0, 100))
def test_stages(folder: Path, config: GPTDatasetConfig, plan, open_end: bool, seed: int) -> None:
    blends, ends = plan
    listed = [
        Stage(end, {str(folder / name): weight / sum(blend.values()) for name, weight in blend.items()})
        for blend, end in zip(blends, ends, strict=True)
    ]
    total = ends[-1]
    if open_end:
        listed[-1] = Stage(None, listed[-1].blend)
    built = stages.build(GPTDataset, listed, total, config, lambda: True)
    assert len(built) == total
    samples = {index: built[index]["tokens"].tolist() for index in np.random.RandomState(seed).permutation(total)}
    assert {index: built[index]["tokens"].tolist() for index in range(total)} == samples
    first = np.array([samples[index][0] for index in range(total)])
    assert len(set(first)) == total  # none twice
    for (begin, end), stage in zip(itertools.pairwise([0, *ends]), listed, strict=True):
        counts = np.bincount(first[begin:end] // 10_000, minlength=len(NAMES))
        shares = [stage.blend.get(str(folder / name), 0) for name in NAMES]
        assert np.abs(counts - np.array(shares) * (end - begin)).max() <= 1
        assert (counts > 0).tolist() <= [share > 0 for share in shares]
    for number, name in enumerate(NAMES):  # each is read in one order throughout
        mine = [samples[index] for index in range(total) if first[index] // 10_000 == number]
        alone = stages.build(GPTDataset, [Stage(None, {str(folder / name): 1.0})], EPOCH - 20, config, lambda: True)
        assert mine == [alone[index]["tokens"].tolist() for index in range(len(mine))]


def test_other_stages_are_another_run(corpus: Corpus, tmp_path: Path) -> None:
    """Than that of a checkpoint; where the same data lies does not matter."""
    tokenizer = corpus.data_flags[: corpus.data_flags.index("--data-path")]
    for suffix in (".bin", ".idx"):
        shutil.copy(corpus.prefix + suffix, tmp_path / f"moved{suffix}")

    def run(until: str, prefix: str) -> Namespace:
        listed = f"- {{until: {until}, blend: {{{prefix}: 1}}}}\n- blend: {{{corpus.second_prefix}: 2, {prefix}: 1}}\n"
        (tmp_path / "stages.yaml").write_text(listed)
        cache = ["--data-cache-path", str(tmp_path / "cache"), "--meap-data-stages", str(tmp_path / "stages.yaml")]
        return prepare(*MODEL, *TRAINING, *tokenizer, *cache)

    saved = run("80 samples", corpus.prefix)
    assert list(differences(saved, run("5.12k tokens", str(tmp_path / "moved")))) == []
    ((verdict, said),) = differences(saved, run("88 samples", corpus.prefix))
    assert verdict is Verdict.REFUSED
    assert said.startswith(
        "the stages of the training data until sample 80 of the data: 1 of dataset 1, until sample the"
    )


def read(text: str, path: Path, copies: float | None = None) -> list[Stage]:
    path.write_text(text)
    return stages.read(Namespace(meap_data_stages=str(path), seq_length=1000, meap_copy_weight=copies))


def test_a_file_is_read(tmp_path: Path) -> None:
    text = "- until: 2.3M tokens\n  blend: {a: 3, b: 1}\n- until: 5k samples\n  blend: {b: 0.1}\n- blend: {c: 1}\n"
    expected = [Stage(2300, {"a": 0.75, "b": 0.25}), Stage(5000, {"b": 1.0}), Stage(None, {"c": 1.0})]
    assert read(text, tmp_path / "stages.yaml") == expected
    assert [each.end for each in read(text, tmp_path / "stages.yaml", copies=0.4)] == [1150, 2500, None]
    assert stages.sizes(expected, 6000) == [2300, 2700, 1000]
    assert stages.sizes(expected, 2400) == [2300, 100, 0]
    with pytest.raises(UsageError, match="the stages end at sample 5000 of the data, and 6000 are to be read"):
        stages.sizes(expected[:2], 6000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "cannot be read as YAML"),
        ("a: 1", "expected a list of stages"),
        ("[]", "expected a list of stages"),
        ("- a", "stage 1: expected `blend`"),
        ("- blend: {a: 1}\n  until_tokens: 5", "stage 1: expected `blend`"),
        ("- blend: {a: 1, b: 1, a: 2}", r"cannot be read as YAML \(a key occurs twice in"),
        ("- blend: [a, b]", "stage 1: `blend`: expected weights by prefix"),
        ("- blend: {a: much}", "stage 1: `blend`: expected weights by prefix"),
        ("- blend: {a: true}", "stage 1: `blend`: expected weights by prefix"),
        ("- blend: {a: -1}", "stage 1: the weight -1 of a"),
        ("- blend: {a: .nan}", "stage 1: the weight nan of a"),
        ("- blend: {a: 1}\n  until: 20", "stage 1: `until: 20`: expected an amount such as"),
        ("- blend: {a: 1}\n  until: 20 GB", "stage 1: `until: 20 GB`: expected an amount such as"),
        ("- blend: {a: 1}\n  until: 20 tokens", "stage 1: `until: 20 tokens`: less than one sample of 1000 tokens"),
        ("- blend: {a: 1}\n- blend: {b: 1}", "stage 2: ends no later than the one before"),
        ("- blend: {a: 1}\n  until: 5 samples\n- blend: {b: 1}\n  until: 5 samples", "stage 2: ends no later"),
    ],
)
def test_what_is_no_list_of_stages_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"--meap-data-stages .*stages.yaml: {message}"):
        read(text, tmp_path / "stages.yaml")
