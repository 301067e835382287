"""The files themselves: the same bytes as Megatron's builder writes; merged, inspected, and refused when damaged."""

import json
import os
import resource
import shutil
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_meap.errors import UsageError
from megatron_meap.preprocessing import index as index_room
from megatron_meap.preprocessing.index import index_bytes, read_index, token_dtype
from megatron_meap.preprocessing.merge import find_datasets, merge_datasets
from megatron_meap.preprocessing.statistics import inspect, read_documents
from megatron_meap.preprocessing.writer import DatasetWriter
from tests.unit.preprocessing import (
    TEXTS,
    leftovers,
    make_tokenizer,
    outputs,
    read_back,
    run_job,
    sentencepiece_args,
    write_jsonl,
    write_manifest,
)

documents = st.lists(st.lists(st.integers(0, 65499), min_size=1, max_size=20), min_size=1, max_size=20)
sequences = st.lists(st.lists(st.integers(0, 9), min_size=1), min_size=1)
parts = st.lists(
    st.lists(sequences, min_size=1),
    min_size=1,
    max_size=3,
    unique_by=lambda part: tuple(id for document in part for sequence in document for id in sequence),
)
in_one_folder = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def datasets(model, tmp_path):
    """Two datasets with manifests."""
    args = sentencepiece_args(model)
    run_job([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "a", args)
    run_job([write_jsonl(tmp_path / "b.jsonl", ["another", *TEXTS[:3]])], tmp_path / "b", args)
    return [str(tmp_path / "a_text_document"), str(tmp_path / "b_text_document")]


def build_with_megatron(prefix, documents, dtype):
    """`documents`: each a list of sequences, each a list of ids."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document([id for sequence in document for id in sequence], [len(s) for s in document])
    builder.finalize(f"{prefix}.idx")


def build(prefix, documents, dtype):
    writer = DatasetWriter(str(prefix), dtype)
    for ids in documents:
        writer.add(np.array(ids, dtype).tobytes(), np.array([len(ids)], np.int32).tobytes())
    writer.finish()
    writer.publish(None)


@in_one_folder
@given(documents=documents, dtype=st.sampled_from([np.uint16, np.int32]), chunk=st.integers(1, 9))
def test_the_same_bytes_as_megatrons_builder(documents, dtype, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(index_room, "CHUNK", chunk)
    monkeypatch.setattr("megatron_meap.preprocessing.writer.CHUNK", chunk)
    build(tmp_path / "ours", documents, dtype)
    build_with_megatron(tmp_path / "theirs", [[ids] for ids in documents], dtype)
    assert outputs(tmp_path / "ours") == outputs(tmp_path / "theirs")


def test_dtype_is_megatrons_choice():
    from megatron.core.datasets.indexed_dataset import DType

    for size in (2, 32000, 65499, 65500, 65536, 151936):
        assert token_dtype(size) is DType.optimal_dtype(size)


@in_one_folder
@given(parts=parts)
def test_merging_gives_the_same_bytes_as_megatron(parts, tmp_path_factory):
    """Documents of several sequences too, as Megatron-LM's tool makes them with --split-sentences."""
    folder = tmp_path_factory.mktemp("merge")
    prefixes = [str(folder / f"part{number}") for number in range(len(parts))]
    for prefix, part in zip(prefixes, parts, strict=True):
        build_with_megatron(prefix, part, np.uint16)
    assert merge_datasets(prefixes, str(folder / "ours")) is None  # no manifests, so none for the result
    build_with_megatron(folder / "theirs", [document for part in parts for document in part], np.uint16)
    assert outputs(folder / "ours") == outputs(folder / "theirs")


def test_merged_manifest(datasets, tmp_path):
    manifest = merge_datasets(
        find_datasets([str(tmp_path)], str(tmp_path / "out" / "all")), str(tmp_path / "out" / "all")
    )
    ids = [read_back(prefix) for prefix in datasets]
    assert read_back(tmp_path / "out" / "all") == ids[0] + ids[1]
    statistics, written = inspect(str(tmp_path / "out" / "all"))
    assert written == {"format": 1, **manifest}
    assert (manifest["documents"], statistics.documents) == (len(TEXTS) + 4, len(TEXTS) + 4)
    assert leftovers(tmp_path / "out") == ["all.bin", "all.idx", "all.manifest.json"]


def test_what_cannot_be_merged(datasets, tmp_path, model):
    with pytest.raises(UsageError, match="named twice"):
        find_datasets([datasets[0], datasets[0]], "all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no dataset"):
        find_datasets([str(tmp_path / "empty")], "all")
    with pytest.raises(UsageError, match="is one of the inputs"):
        find_datasets(datasets, datasets[0])
    with pytest.raises(UsageError, match="exists already"):
        merge_datasets(datasets[:1], datasets[1])
    build(tmp_path / "wide", [[1]], np.int32)
    with pytest.raises(UsageError, match=r"its ids are int32, those of .* uint16"):
        merge_datasets([datasets[0], str(tmp_path / "wide")], str(tmp_path / "all"))
    run_job([tmp_path / "a.jsonl"], tmp_path / "bos", sentencepiece_args(model), prepend_bos=True)
    with pytest.raises(UsageError, match=r"begins with the ids \[1\], in .* it is nothing; .*--prepend-bos"):
        merge_datasets([datasets[0], str(tmp_path / "bos_text_document")], str(tmp_path / "all"))
    other = make_tokenizer(tmp_path / "empty", vocab_size=700)
    run_job([tmp_path / "a.jsonl"], tmp_path / "other", sentencepiece_args(other))
    with pytest.raises(UsageError, match="made with another tokenizer"):
        merge_datasets([datasets[0], str(tmp_path / "other_text_document")], str(tmp_path / "all"))
    damage(tmp_path / "a_text_document.bin", 5)
    with pytest.raises(UsageError, match=r"a_text_document\.bin: its sha256 differs from its manifest's"):
        merge_datasets(datasets, str(tmp_path / "all"))
    assert not [name for name in leftovers(tmp_path) if name.startswith("all") or "partial" in name]


def test_one_dataset_by_two_names(datasets, tmp_path, monkeypatch):
    """By another spelling, a link to its files, or a link to its folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path)
    for suffix in (".bin", ".idx"):
        (tmp_path / f"link{suffix}").symlink_to(f"{datasets[0]}{suffix}")
    (tmp_path / "link.idx").rename(tmp_path / "other.idx")
    (tmp_path / "link.bin").rename(tmp_path / "other.bin")
    for other in ("a_text_document", "./a_text_document", "linked/a_text_document", "other"):
        with pytest.raises(UsageError, match=rf"--input {other}: named twice \(as .*\), so its documents"):
            find_datasets([datasets[0], other], "all")
        with pytest.raises(UsageError, match=r"--output-prefix .* is one of the inputs"):
            find_datasets([datasets[0]], other)
    with pytest.raises(UsageError, match="named twice"):  # of one folder
        find_datasets(["."], "all")


def test_merging_again_never_doubles_a_document(datasets, tmp_path, monkeypatch):
    """An earlier output among the inputs is not an input; under another name it is recognised."""
    monkeypatch.chdir(tmp_path)
    for output in ("all", "./all", str(tmp_path / "all")):
        inputs = find_datasets(["."], output)
        assert sorted(inputs) == ["a_text_document", "b_text_document"]
        made = merge_datasets(inputs, output, overwrite=True)
        assert made["documents"] == len(TEXTS) + 4
    with pytest.raises(UsageError, match="all: already contains the documents of a_text_document"):
        merge_datasets(find_datasets(["."], "again"), "again")
    for suffix in (".bin", ".idx", ".manifest.json"):
        shutil.copy(f"b_text_document{suffix}", f"copy{suffix}")
    with pytest.raises(UsageError, match="copy: already contains the documents of b_text_document"):
        merge_datasets(["a_text_document", "b_text_document", "copy"], "again")
    for suffix in (".bin", ".idx"):  # which Megatron-LM's tool makes without manifests
        shutil.copy(f"b_text_document{suffix}", f"bare{suffix}")
    with pytest.raises(UsageError, match="bare: has the same documents as b_text_document"):
        merge_datasets(["a_text_document", "b_text_document", "bare"], "again")
    assert not [name for name in leftovers(tmp_path) if name.startswith("again")]
    merge_datasets(["b_text_document"], "other")
    with pytest.raises(UsageError, match=r"all: already contains documents of other"):
        merge_datasets(["all", "other"], "again")


def test_more_datasets_than_a_process_may_open(tmp_path):
    prefixes = [str(tmp_path / f"{number:03d}") for number in range(80)]
    for number, prefix in enumerate(prefixes):
        build(prefix, [[number]], np.uint16)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = len(os.listdir("/proc/self/fd")) + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (room, limits[1]))
    try:
        merge_datasets(prefixes, str(tmp_path / "all"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert read_back(tmp_path / "all") == [[number] for number in range(80)]


def test_datasets_without_documents(datasets, tmp_path):
    """One among others adds nothing; alone there is nothing to check or to merge, which is said."""
    empty = str(tmp_path / "empty")
    build_with_megatron(empty, [], np.uint16)
    with pytest.raises(UsageError, match=r"empty: holds no tokens \(0 documents\)"):
        inspect(empty)
    assert list(read_documents(empty, 3)) == []
    with pytest.raises(UsageError, match="no documents in any of the 1 datasets"):
        merge_datasets([empty], str(tmp_path / "all"))
    merge_datasets([datasets[0], empty], str(tmp_path / "all"))
    assert read_back(tmp_path / "all") == read_back(datasets[0])
    build_with_megatron(empty, [[[]]], np.uint16)
    with pytest.raises(UsageError, match=r"holds no tokens \(1 documents\)"):
        inspect(empty)


@pytest.mark.parametrize("manifest", [True, False])
def test_a_flipped_bit_takes_no_memory(manifest, tmp_path):
    """Counting up to the largest possible id would take gigabytes."""
    build(tmp_path / "x", [[1, 2, 3]], np.int32)
    if manifest:
        write_manifest(tmp_path / "x", max_token_id=3)
    damage(tmp_path / "x.bin", 7, bit=1 << 6)
    tracemalloc.start()
    with pytest.raises(UsageError, match=r"x\.bin: holds the id 1073741826, but (its manifest says|no vocabulary is)"):
        inspect(str(tmp_path / "x"))
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def damage(path, position: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= bit
    path.write_bytes(data)


DAMAGES = {
    "no index": (lambda prefix: prefix.with_suffix(".idx").unlink(), r"\.idx: no such file"),
    "no data": (lambda prefix: prefix.with_suffix(".bin").unlink(), r"\.bin: no such file"),
    "not an index": (lambda prefix: prefix.with_suffix(".idx").write_text("hello"), "not the index of"),
    "index cut off": (
        lambda prefix: prefix.with_suffix(".idx").write_bytes(b"MMIDIDX\0\0" + bytes(20)),
        "not the index",
    ),
    "magic": (lambda prefix: damage(prefix.with_suffix(".idx"), 0), "not the index of"),
    "version": (lambda prefix: damage(prefix.with_suffix(".idx"), 9), "damaged"),
    "dtype": (lambda prefix: damage(prefix.with_suffix(".idx"), 17), "damaged"),
    "number of sequences": (lambda prefix: damage(prefix.with_suffix(".idx"), 18), "damaged"),
    "a length": (lambda prefix: damage(prefix.with_suffix(".idx"), 34), "lengths and offsets"),
    "a boundary": (lambda prefix: damage(prefix.with_suffix(".idx"), -1), "document boundaries"),
    "data cut off": (lambda prefix: prefix.with_suffix(".bin").write_bytes(b"\0\0"), "do not belong together"),
    "one bit of data": (lambda prefix: damage(prefix.with_suffix(".bin"), 30), r"\.bin: its sha256"),
    "the manifest": (lambda prefix: prefix.with_suffix(".manifest.json").write_text("{"), "cannot be read"),
    "no manifest at all": (lambda prefix: prefix.with_suffix(".manifest.json").write_text("[]"), "not a manifest"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(name, datasets, tmp_path):
    spoil, message = DAMAGES[name]
    inspect(datasets[0])
    spoil(tmp_path / "a_text_document")
    with pytest.raises(UsageError, match=message):
        inspect(datasets[0])


def test_an_index_of_another_dataset_is_noticed(datasets):
    shutil.copy(f"{datasets[1]}.idx", f"{datasets[0]}.idx")
    with pytest.raises(UsageError, match="do not belong together"):
        read_index(datasets[0])


def test_the_dataset_that_may_be_meant_is_named(datasets, tmp_path):
    meant = str(tmp_path / "a_text_document")
    for wrong in (f"{meant}.bin", f"{meant}.idx", str(tmp_path / "a"), str(tmp_path / "a_txet_document")):
        with pytest.raises(UsageError, match=rf"did you mean {meant}\?$"):
            read_index(wrong)
    with pytest.raises(UsageError, match="a dataset is named by its path"):
        read_index(str(tmp_path / "quite different"))


def test_a_manifest_that_lies_is_noticed(datasets, tmp_path):
    path = tmp_path / "a_text_document.manifest.json"
    manifest = json.loads(path.read_text())
    for name in ("documents", "tokens", "max_token_id"):
        path.write_text(json.dumps({**manifest, name: 1}))
        with pytest.raises(UsageError, match=f"its manifest says {name} 1"):
            inspect(datasets[0])


@in_one_folder
@given(documents=documents)
def test_statistics(documents, tmp_path):
    build(tmp_path / "x", documents, np.uint16)
    statistics, manifest = inspect(str(tmp_path / "x"))
    flat, lengths = [id for ids in documents for id in ids], [len(ids) for ids in documents]
    assert manifest is None
    assert (statistics.documents, statistics.tokens) == (len(documents), len(flat))
    assert {id: statistics.count(id) for id in flat} == {id: flat.count(id) for id in flat}
    assert statistics.count(None) == statistics.count(max(flat) + 1) == 0
    assert statistics.lengths == (min(lengths), len(flat) / len(lengths), max(lengths))
    for low, high, count in statistics.histogram:
        assert count == sum(low <= length <= high for length in lengths)
    assert sum(count for _, _, count in statistics.histogram) == len(lengths)
    shown = {number: ids.tolist() for number, ids in read_documents(str(tmp_path / "x"), 4)}
    assert len(shown) == min(4, len(documents))
    assert all(documents[number] == ids for number, ids in shown.items())


def test_index_bytes_of_many_pieces():
    lengths = [np.array([3, 1]), np.array([4])]
    whole = b"".join(index_bytes(np.dtype(np.uint16), 3, lambda: iter(lengths)))
    assert np.frombuffer(whole[34:46], np.int32).tolist() == [3, 1, 4]
    assert np.frombuffer(whole[46:70], np.int64).tolist() == [0, 6, 8]
    assert np.frombuffer(whole[70:], np.int64).tolist() == [0, 1, 2, 3]
