"""Checkpoints carry their tokenizer and manifests, so that resuming and export survive moved or deleted files."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_meap.errors import UsageError
from megatron_meap.huggingface.export import ExportJob, export
from megatron_meap.tokenization import files
from megatron_meap.tokenization.fingerprint import tokenizer_fingerprint
from megatron_meap.tokenization.huggingface import tokenizer_of
from megatron_meap.trainer import carried
from tests.conftest import Corpus
from tests.functional.test_record import flags_of
from tests.sft import prepare, save
from tests.unit.preprocessing import write_manifest

TEXT = "The quick brown fox; def main(): return 'über'"


@pytest.mark.parametrize("kind", ["file", "directory", "tokenizer.json", "vocabulary and merges"])
def test_a_copy_is_the_same_tokenizer(corpus: Corpus, huggingface_folder: Path, tmp_path: Path, kind: str) -> None:
    """Whatever names the files; the ids that end a text and the chat template are in the copy, too."""
    folder = tmp_path / "original"
    shutil.copytree(huggingface_folder, folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "model.safetensors").write_text("none of the tokenizer's")
    args = Namespace(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder), vocab_file=None)
    args.merge_file, args.padded_vocab_size = None, 640
    if kind == "file":
        args.tokenizer_type, args.tokenizer_model = "SentencePieceTokenizer", corpus.tokenizer
    elif kind == "tokenizer.json":
        args.tokenizer_model = str(folder / kind)
    elif kind == "vocabulary and merges":
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        (folder / "v.json").write_text(json.dumps(model["vocab"] | {"<|endoftext|>": len(model["vocab"])}))
        (folder / "m.txt").write_text("\n".join(" ".join(merge) for merge in model["merges"]))
        args.tokenizer_type, args.tokenizer_model = "GPT2BPETokenizer", None
        args.vocab_file, args.merge_file = str(folder / "v.json"), str(folder / "m.txt")
    expected, digest = tokenizer_of(args), tokenizer_fingerprint(args)
    assert files.missing(args) == []
    copy = tmp_path / "copy"
    copy.mkdir()
    for place, path in files.files_of(args).items():
        shutil.copy(path, copy / place)
    shutil.rmtree(folder)
    moved = files.at(args, copy)
    assert files.missing(args) or kind == "file"
    assert tokenizer_fingerprint(moved) == digest
    found = tokenizer_of(moved)
    assert found(TEXT)["input_ids"] == expected(TEXT)["input_ids"]
    assert found.chat_template == expected.chat_template
    assert not (copy / "model.safetensors").exists()


@pytest.fixture
def folder(corpus: Corpus, tmp_path: Path) -> Path:
    """A checkpoint in `run`, as a run leaves it whose tokenizer and data, with a manifest, are in `elsewhere`."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(corpus.tokenizer, elsewhere / "tokenizer.model")
    for suffix in (".bin", ".idx"):
        shutil.copy(corpus.prefix + suffix, elsewhere / f"data{suffix}")
    args = prepare(*flags(corpus, tmp_path))
    files = {s: {"bytes": (elsewhere / f"data{s}").stat().st_size, "sha256": ""} for s in (".bin", ".idx")}
    facts = {"type": args.tokenizer_type, "sha256": args.meap_tokenizer_sha256}
    write_manifest(elsewhere / "data", facts, before_document=[1], tokens=7, files=files)
    args = prepare(*flags(corpus, tmp_path))
    save(args, tmp_path / "run")
    carried.write(tmp_path / "run" / "iter_0000002", carried.collect(args))
    return tmp_path


def flags(corpus: Corpus, folder: Path, *extra: str) -> list[str]:
    own = [
        "--tokenizer-model",
        str(folder / "elsewhere/tokenizer.model"),
        "--data-path",
        str(folder / "elsewhere/data"),
    ]
    return flags_of(corpus, folder, *own, *extra)


def test_a_run_resumes_without_the_files_of_its_tokenizer(
    corpus: Corpus, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    there = prepare(*flags(corpus, folder, "--load", str(folder / "run")))
    assert "note: tokenizer" not in capsys.readouterr().out
    (folder / "elsewhere/tokenizer.model").unlink()
    with pytest.raises(UsageError, match=r"tokenizer\.model: no such file"):
        prepare(*flags(corpus, folder, "--save", str(folder / "another")))
    with pytest.raises(UsageError, match=r"tokeniser\.model: no such file"):
        prepare(*flags(corpus, folder, "--load", str(folder / "run"), "--tokenizer-model", "tokeniser.model"))
    here = prepare(*flags(corpus, folder, "--load", str(folder / "run")))
    copy = folder / "run/iter_0000002/tokenizer"
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("note:", "warning:"))]
    original = folder / "elsewhere/tokenizer.model"
    assert said == [f"note: tokenizer {original} is not there; the checkpoint's own copy is taken, {copy}"]
    assert here.tokenizer_model == str(copy / "tokenizer.model")
    assert here.meap_record == there.meap_record
    (copy / "tokenizer.model").write_bytes(Path(corpus.tokenizer).read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"not there, and the copy in .*/tokenizer is damaged"):
        prepare(*flags(corpus, folder, "--load", str(folder / "run")))


def test_an_export_takes_what_the_checkpoint_carries(
    corpus: Corpus, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    """Its tokenizer; and from its manifests whether texts begin with BOS, and the rows of the model card."""
    shutil.rmtree(folder / "elsewhere")
    moved = folder / "moved"
    (folder / "run/iter_0000002").rename(moved)
    export(ExportJob(str(moved), str(folder / "exported"), check=False))
    assert f"tokenizer and manifests: the checkpoint's own, in {moved}" in capsys.readouterr().out
    ids = AutoTokenizer.from_pretrained(folder / "exported")(TEXT)["input_ids"]
    assert ids[0] == 1
    assert "| Data `data` | 7 tokens, manifest sha256" in (folder / "exported/README.md").read_text()


def test_an_imported_model_is_moved_with_its_tokenizer(corpus: Corpus, folder: Path) -> None:
    """Which lies beside its iteration: one that starts from it finds it in the new place."""
    (folder / "run/iter_0000002/tokenizer").rename(folder / "run/tokenizer")
    (folder / "run").rename(folder / "moved")
    (folder / "elsewhere/tokenizer.model").unlink()
    args = prepare(*flags(corpus, folder, "--pretrained-checkpoint", str(folder / "moved")))
    assert args.tokenizer_model == str(folder / "moved/tokenizer/tokenizer.model")


@pytest.mark.parametrize("damaged", ["{", "[]]", "{}", "[1]", '[["a", "b"]]', '[["a", "b", []]]', '[["a", 1, {}]]'])
def test_manifests_that_are_damaged_are_one_line(damaged: str, tmp_path: Path) -> None:
    listed = tmp_path / "manifests.json"
    listed.write_text('[["a", "0", {"tokens": 5}]]')
    args = Namespace(meap_manifests=str(listed))
    assert carried.manifests(args) == [("a", "0", {"tokens": 5})]
    listed.write_text(damaged)
    with pytest.raises(UsageError, match=r"manifests\.json: cannot be read: .*; copy the checkpoint again"):
        carried.manifests(args)
