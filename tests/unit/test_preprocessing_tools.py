"""The tools as a user runs them: from this machine's text to a checked dataset, and one line for each error."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from megatron_meap.preprocessing.progress import Counts, Progress
from tests.unit.preprocessing import make_tokenizer, write_jsonl

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch, capsys, tmp_path):
    """Run a tool in a separate folder; returns (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def start(name: str, flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *flags.split()])
        status = 0
        try:
            runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return start


def test_from_this_machines_text_to_a_checked_dataset(tool):
    """The commands of docs/data.md, with less text."""
    tokenizer = "--tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer/tokenizer.model"
    status, said, _ = tool("build_corpus", "--train c/train.jsonl --valid c/valid.jsonl --max-mb 0.5 --valid-share 0.1")
    assert status == 0
    assert said.startswith("c/train.jsonl: ")
    status, said, _ = tool(
        "train_tokenizer", "--input c/train.jsonl --output tokenizer/tokenizer.model --vocab-size 800"
    )
    assert status == 0
    assert said.startswith("tokenizer/tokenizer.model: 800 ids, trained on 0.5 MB of text from 1 file")
    for side in ("train", "valid"):
        flags = f"--input c/{side}.jsonl --output-prefix data/{side} --append-eod {tokenizer}"
        status, said, shown = tool("preprocess_data", flags)
        assert status == 0
        assert said.startswith(f"{side}_text_document: ")
        assert shown.startswith("encoder: gigatoken, same ids as sentencepiece for all ")
    status, said, _ = tool("check_data", f"--data data/train_text_document --samples 2 {tokenizer}")
    assert status == 0
    assert "data/train_text_document: as its manifest says\n" in said
    assert said.count("  document ") == 3  # the lengths, and two samples
    assert "unknown (id 0): 0, 0.000%" in said
    status, said, _ = tool("merge_datasets", "--input data --output-prefix data/all")
    assert status == 0
    assert said.startswith("data/all: ")
    assert tool("check_data", "--data data/all")[0] == 0


def test_checking_with_another_tokenizer(tool):
    write_jsonl(Path("a.jsonl"), ["1 2 3"])
    tool("preprocess_data", "--input a.jsonl --output-prefix x --tokenizer-type NullTokenizer --vocab-size 9")
    status, _, error = tool("check_data", "--data x_text_document --tokenizer-type NullTokenizer --vocab-size 8")
    assert status == 2
    assert error.startswith("error: x_text_document: made with another tokenizer (NullTokenizer")


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("check_data", "--data x --samples -3", "--samples -3: at least 0"),
        ("check_data", "--data x --tokenizer-type NullTokenizer --vocab-size -5", "--vocab-size -5: at least 1"),
        (
            "preprocess_data",
            f"--input {__file__} --output-prefix y --log-interval 0 --tokenizer-type NullTokenizer --vocab-size 9",
            "--log-interval 0: at least 1",
        ),
        ("train_tokenizer", f"--input {__file__} --output y --vocab-size {10**20}", f"--vocab-size {10**20}: INVALID"),
        ("train_tokenizer", "--input x --output y --vocab-size 500 --max-mb nan", "--max-mb nan: how much text"),
        ("train_tokenizer", "--input x --output y --vocab-size 500 --max-mb -1", "--max-mb -1: how much text"),
        ("build_corpus", "--train x --valid y --max-mb nan", "--max-mb nan: how much text"),
        ("build_corpus", "--train x --valid y --valid-share -1", "--valid-share -1: "),
        ("inspect_batches", "--statistics -3", "--statistics -3: at least 1, or 0 for none"),
    ],
)
def test_numbers_that_make_no_sense(name, flags, message, tool):
    status, _, error = tool(name, flags)
    assert status == 2
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_bad_lines_are_counted(tool):
    Path("a.jsonl").write_text('{"text": "1 2"}\n{"text": null}\n')
    null = "--tokenizer-type NullTokenizer --vocab-size 9"
    status, _, error = tool("preprocess_data", f"--input a.jsonl --output-prefix x {null}")
    assert status == 2
    assert error.splitlines()[-1].startswith("error: a.jsonl:2: the value of 'text' is not a string but null; fix it")
    status, said, _ = tool("preprocess_data", f"--input a.jsonl --output-prefix x --skip-bad-lines {null}")
    assert status == 0
    assert "bad lines skipped: 1, see x.bad_lines.jsonl" in said


def test_datasets_of_several_keys_that_do_not_line_up(tool):
    make_tokenizer(Path())
    flags = "--json-keys a b --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model --overwrite"
    for second, warned in (("", True), ("3", False)):
        Path("a.jsonl").write_text('{"a": "1", "b": "2"}\n' + json.dumps({"a": "1", "b": second}))
        status, _, error = tool("preprocess_data", f"--input a.jsonl --output-prefix x {flags}")
        assert status == 0
        assert ("with the same number do not correspond" in error) == warned


def test_separators_are_typed_with_escapes(tool):
    Path("a.txt").write_text("1 2\n\n3\n\n4")
    flags = r"--input a.txt --output-prefix x --text-separator \n\n --tokenizer-type NullTokenizer --vocab-size 9"
    assert tool("preprocess_data", flags)[1].startswith("x_text_document: 3 documents, 4 tokens")


def test_what_is_not_supported_is_said(tool):
    flags = "--input a --output-prefix x --tokenizer-type NullTokenizer --split-sentences"
    status, _, error = tool("preprocess_data", flags)
    assert (status, error) == (
        2,
        "error: --split-sentences: not supported; split the text beforehand, one sentence per line\n",
    )


def test_progress_lines_without_a_terminal(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = Progress(1000, Counts(200, 100, 10, 50))
    now = 4.0
    progress.update(Counts(400, 4_000_100, 210, 450))
    assert capsys.readouterr().err == ""  # not yet
    now = 8.0
    progress.update(Counts(600, 8_000_100, 410, 850))
    progress.close()
    assert capsys.readouterr().err == (
        " 60% | 410 documents | 1.0 MB/s | 50 documents/s | 100 tokens/s | ETA 0:00:08\n"
    )


def test_progress_lines_every_so_many_documents(capsys):
    progress = Progress(0, Counts(), every_documents=100)
    for documents in (50, 120, 150, 230):
        progress.update(Counts(1, 1, documents, 1))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["120", "230"]
    assert "ETA" not in lines[0]  # the size is not known


def test_documents_that_nothing_ends_are_said(tool):
    make_tokenizer(Path())
    Path("a.txt").write_text("1 2")
    flags = "--input a.txt --output-prefix x --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model"
    for more in ("", " --append-eod --overwrite"):
        status, _, error = tool("preprocess_data", flags + more)
        assert status == 0
        assert ("add --append-eod" in error) == (not more)
