"""The corpus from this machine: always the same, within its limit, with nothing on both sides of the split."""

import json

import pytest

from megatron_meap.errors import UsageError
from megatron_meap.preprocessing.corpus import build_corpus


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(summary, training documents, validation documents) of a corpus that takes in modules too."""
    folder = tmp_path_factory.mktemp("corpus")
    summary = build_corpus(folder / "train.jsonl", folder / "valid.jsonl", max_bytes=1_500_000, valid_share=0.1)
    return summary, *([json.loads(line) for line in open(folder / f"{side}.jsonl")] for side in ("train", "valid"))


def test_the_summary_counts_what_is_written(built):
    summary, train, valid = built
    assert (summary.train_documents, summary.valid_documents) == (len(train), len(valid))
    sizes = [sum(len(document["text"].encode()) for document in side) for side in (train, valid)]
    assert [summary.train_bytes, summary.valid_bytes] == sizes
    assert 1_200_000 < sum(sizes) <= 1_500_000
    assert 0.03 < summary.valid_documents / (len(train) + len(valid)) < 0.25


def test_topics_and_docstrings_are_in_it(built):
    _, train, valid = built
    sources = {document["source"] for document in train + valid}
    assert "topic:yield" in sources or "topic:while" in sources
    assert any(not source.startswith("topic:") for source in sources)
    assert not any(".test." in source or source.startswith("test") for source in sources)


def test_files_that_are_there_are_kept(tmp_path):
    (tmp_path / "mine.jsonl").write_text("mine")
    for train, valid in (("mine.jsonl", "new"), ("new", "mine.jsonl")):
        with pytest.raises(UsageError, match=r"mine.jsonl: already exists; .* --overwrite"):
            build_corpus(tmp_path / train, tmp_path / valid, max_bytes=100_000)
    assert (tmp_path / "mine.jsonl").read_text() == "mine"


def test_no_text_twice_and_no_source_on_both_sides(built):
    _, train, valid = built
    texts = [document["text"] for document in train + valid]
    assert len(set(texts)) == len(texts)
    assert not {document["source"] for document in train} & {document["source"] for document in valid}


def test_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        build_corpus(
            tmp_path / name / "train.jsonl", tmp_path / name / "valid.jsonl", max_bytes=300_000, valid_share=0.1
        )
    for side in ("train.jsonl", "valid.jsonl"):
        assert (tmp_path / "a" / side).read_bytes() == (tmp_path / "b" / side).read_bytes()


def test_limits_that_leave_nothing(tmp_path):
    with pytest.raises(UsageError, match=r"--max-mb .*: leaves nothing to train on"):
        build_corpus(tmp_path / "train", tmp_path / "valid", max_bytes=100)
    with pytest.raises(UsageError, match=r"valid_share 1\.5: give a number between 0 and 1"):
        build_corpus(tmp_path / "train", tmp_path / "valid", valid_share=1.5)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="choose another output path"):
        build_corpus(tmp_path / "file" / "train", tmp_path / "valid")
