"""The manifest's check in training, and the tokenizer's fingerprint."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from megatron_meap.errors import UsageError
from megatron_meap.preprocessing.manifest import check_manifest, read_manifest
from megatron_meap.preprocessing.merge import merge_datasets
from megatron_meap.preprocessing.statistics import inspect
from megatron_meap.tokenization.fingerprint import ids_fingerprint, tokenizer_fingerprint
from megatron_meap.tokenization.reference import load_reference
from tests.unit.preprocessing import (
    TEXTS,
    make_tokenizer,
    run_job,
    sentencepiece_args,
    tokenizer_args,
    write_jsonl,
    write_manifest,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def dataset(model, tmp_path):
    run_job([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "x", sentencepiece_args(model))
    return str(tmp_path / "x_text_document")


def test_a_fitting_dataset_passes(dataset, model):
    check_manifest(dataset, tokenizer_sha256=tokenizer_fingerprint(sentencepiece_args(model)), vocab_size=600)
    check_manifest(dataset, tokenizer_sha256=None, vocab_size=600)


def test_another_tokenizer_is_refused(dataset, tmp_path):
    other = tokenizer_fingerprint(sentencepiece_args(make_tokenizer(tmp_path, vocab_size=601)))
    with pytest.raises(UsageError, match=r"made with another tokenizer \(SentencePieceTokenizer tok"):
        check_manifest(dataset, tokenizer_sha256=other, vocab_size=601)


def test_a_small_vocabulary_is_refused(dataset, tmp_path):
    largest = json.loads((tmp_path / "x_text_document.manifest.json").read_text())["max_token_id"]
    check_manifest(dataset, tokenizer_sha256=None, vocab_size=largest + 1)
    with pytest.raises(UsageError, match=f"holds the token id {largest}, but"):
        check_manifest(dataset, tokenizer_sha256=None, vocab_size=largest)


def test_a_file_of_another_size_is_refused(dataset):
    with open(f"{dataset}.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(UsageError, match=r"x_text_document\.bin: .* bytes, but its manifest says"):
        check_manifest(dataset, tokenizer_sha256=None, vocab_size=600)


def test_without_a_manifest_nothing_is_refused(tmp_path):
    check_manifest(str(tmp_path / "nothing"), tokenizer_sha256="x", vocab_size=1)


def test_the_fingerprint_is_of_the_contents(model, tmp_path):
    expected = tokenizer_fingerprint(sentencepiece_args(model))
    copy = shutil.copy(model, tmp_path / "other-name.model")
    assert tokenizer_fingerprint(sentencepiece_args(copy)) == expected
    # One model under another type's name gives the same ids.
    assert tokenizer_fingerprint(tokenizer_args("Llama2Tokenizer", tokenizer_model=str(copy))) == expected
    (tmp_path / "other-name.model").write_bytes(b"x" + model.read_bytes())
    assert tokenizer_fingerprint(sentencepiece_args(copy)) != expected


def test_the_fingerprint_of_a_folder_is_of_its_vocabulary(tmp_path):
    args = tokenizer_args("HuggingFaceTokenizer", tokenizer_model=str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    expected = tokenizer_fingerprint(args)
    (tmp_path / "README.md").write_text("a readme changes nothing")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "neither does this"}')
    assert tokenizer_fingerprint(args) == expected
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    assert tokenizer_fingerprint(args) != expected


def test_a_name_on_the_hub_is_the_folder_of_its_files(tmp_path, monkeypatch):
    """As the hub's cache has them; a name without files there is told from others by itself."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--org--name"
    folder = cached / "snapshots" / ("0" * 40)
    for path, text in ((cached / "refs" / "main", "0" * 40), (folder / "tokenizer.json", "{}")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    named = [
        tokenizer_fingerprint(tokenizer_args("HuggingFaceTokenizer", tokenizer_model=name))
        for name in (str(folder), "org/name", "org/other")
    ]
    assert named[0] == named[1] != named[2]


def test_what_else_determines_the_ids(tmp_path):
    a, b = (str(tmp_path / name) for name in ("a.json", "b.txt"))
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b.txt").write_text("merges")
    prints = [
        tokenizer_fingerprint(args)
        for args in (
            tokenizer_args("NullTokenizer", vocab_size=10),
            tokenizer_args("NullTokenizer", vocab_size=11),
            tokenizer_args("TikTokenizer", tokenizer_model=a),
            tokenizer_args("TikTokenizer", tokenizer_model=a, tiktoken_pattern="v1"),
            tokenizer_args("TikTokenizer", tokenizer_model=a, tiktoken_num_special_tokens=9),
            tokenizer_args("GPT2BPETokenizer", vocab_file=a, merge_file=b),
            tokenizer_args("GPT2BPETokenizer", vocab_file=a, merge_file=str(tmp_path / "a.json")),
            tokenizer_args("HuggingFaceTokenizer", tokenizer_model="org/name-on-a-hub"),
            tokenizer_args("HuggingFaceTokenizer", tokenizer_model="org/another-name"),
        )
    ]
    assert len(set(prints)) == len(prints)


def test_other_special_tokens_are_refused(dataset, model):
    """The same vocabulary file may name another end of documents, which the fingerprint does not see."""
    sha256 = tokenizer_fingerprint(sentencepiece_args(model))
    fits = {"bos": 1, "eod": 2}
    check_manifest(dataset, tokenizer_sha256=sha256, vocab_size=600, special=fits)
    for name, id, message in [
        ("eod", 7, "made with the EOD token 2, but this run's tokenizer has the EOD token 7"),
        ("eod", None, "made with the EOD token 2, but this run's tokenizer has no EOD token"),
        ("bos", None, "made with the BOS token 1, but this run's tokenizer has no BOS token"),
    ]:
        with pytest.raises(UsageError, match=message):
            check_manifest(dataset, tokenizer_sha256=sha256, vocab_size=600, special=fits | {name: id})


def test_other_ids_of_the_same_vocabulary_are_refused(dataset, model):
    """Settings beside the vocabulary's file decide too; a manifest that is older says nothing about the ids."""
    args = sentencepiece_args(model)
    facts = {"tokenizer_sha256": tokenizer_fingerprint(args), "vocab_size": 600}
    check_manifest(dataset, tokenizer_ids=ids_fingerprint(load_reference(args).tokenizer), **facts)
    with pytest.raises(UsageError, match="gives different ids from this run's: their vocabulary files are the"):
        check_manifest(dataset, tokenizer_ids="another", **facts)
    without_ids(dataset)
    check_manifest(dataset, tokenizer_ids="another", **facts)


def test_merging_datasets_of_other_ids(dataset, model, tmp_path):
    """What one of them knows is known of the result."""
    ids = ids_fingerprint(load_reference(sentencepiece_args(model)).tokenizer)
    others = []
    for number in range(2):
        run_job(
            [write_jsonl(tmp_path / "b.jsonl", [f"{number}", *TEXTS])],
            tmp_path / f"{number}",
            sentencepiece_args(model),
        )
        others.append(str(tmp_path / f"{number}_text_document"))
    without_ids(dataset)
    merged = merge_datasets([dataset, *others], str(tmp_path / "all"))
    assert merged is not None
    assert merged["tokenizer"]["ids"] == ids
    path = Path(f"{others[1]}.manifest.json")
    whole = path.read_text()
    path.write_text(whole.replace('"eod": 2', '"eod": 7'))
    with pytest.raises(
        UsageError, match=f"{others[1]}: made with the EOD token 7, {dataset} with the EOD token 2; pre"
    ):
        merge_datasets([dataset, *others], str(tmp_path / "other"))
    path.write_text(whole.replace(ids, "f" * 64))
    with pytest.raises(
        UsageError, match=f"{others[1]}: made with a tokenizer that gives different ids from that of {others[0]}"
    ):
        merge_datasets([dataset, *others], str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        (("tokenizer", "bos"), -1),
        (("tokenizer", "eod"), 2**40),
        (("tokenizer", "unk"), -5),
        (("after_document",), [-2]),
    ],
)
def test_ids_that_no_token_has_are_refused(dataset, entry, value):
    path = Path(f"{dataset}.manifest.json")
    manifest = part = json.loads(path.read_text())
    *names, last = entry
    for name in names:
        part = part[name]
    part[last] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(
        UsageError, match=rf"manifest\.json: not a manifest .*{re.escape('.'.join(entry))}: .* is no token"
    ):
        read_manifest(dataset)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (("documents",), "says documents 17, but it has"),
        (("tokens",), "says tokens 17, but it has"),
        (("max_token_id",), "max_token_id 17"),
        (("files", ".bin", "bytes"), r"says bytes of \.bin 17, but it has"),
        (("files", ".idx", "bytes"), r"says bytes of \.idx 17, but it has"),
        (("files", ".bin", "sha256"), r"\.bin: its sha256 differs from its manifest's"),
        (("files", ".idx", "sha256"), r"\.idx: its sha256 differs from its manifest's"),
    ],
)
def test_a_manifest_that_lies_is_refused(dataset, tmp_path, entry, message):
    """By whatever reads the whole dataset: merging would pass it on under a manifest of its own."""
    path = Path(f"{dataset}.manifest.json")
    manifest = part = json.loads(path.read_text())
    for name in entry[:-1]:
        part = part[name]
    part[entry[-1]] = "17" if entry[-1] == "sha256" else 17
    path.write_text(json.dumps(manifest))
    for read in (lambda: inspect(dataset), lambda: merge_datasets([dataset], str(tmp_path / "all"))):
        with pytest.raises(UsageError, match=message):
            read()
    assert not list(tmp_path.glob("all*"))


def without_ids(prefix):
    """A manifest as it was before it held a digest of the ids."""
    path = Path(f"{prefix}.manifest.json")
    manifest = json.loads(path.read_text())
    del manifest["tokenizer"]["ids"]
    path.write_text(json.dumps(manifest))


def test_names_that_are_not_utf8_are_kept(tmp_path):
    """POSIX names are bytes: such a name must not make the job fail at its end."""
    name = os.fsdecode(b"caf\xe9.jsonl")
    inputs = [{"path": each} for each in (name, "naïve.jsonl")]
    write_manifest(tmp_path / "x", inputs=inputs)
    manifest = read_manifest(str(tmp_path / "x"))
    assert manifest is not None
    assert manifest["inputs"] == inputs
