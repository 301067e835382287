"""Which files are read and as what: every document once, in any container, or one line with the file's name."""

import json
import os
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_meap.errors import UsageError
from megatron_meap.preprocessing.inputs import find
from tests.unit.preprocessing import read_back, run_job, sentencepiece_args, write_jsonl, write_parquet
from tests.unit.test_preprocessing_streams import COMPRESS, SUFFIXES


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    from tests.unit.preprocessing import make_tokenizer

    return sentencepiece_args(make_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocab_size=400))


def written(prefix, args) -> Counter:
    """The documents of a dataset, as text."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=args.tokenizer_model)
    return Counter(processor.decode(ids[:-1]) for ids in read_back(f"{prefix}_text_document"))


class Containers:
    """Documents put into random containers below a folder, and how often each went in."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.generator, self.folder = random.Random(seed), folder
        self.documents: Counter = Counter()
        self.texts: list[int] = []  # documents of each plain text
        self.separator = self.generator.choice(["\n\n", "<|doc|>", "ab"])
        for number in range(self.generator.randrange(1, 6)):
            self.add_file(number)

    def add_file(self, number: int) -> None:
        texts = [f"document {number}.{n} " + "é\r\n" * (n % 3) for n in range(self.generator.randrange(0, 30))]
        below = Path(*self.generator.choices(["a", "b c", "d*[e]", "_f"], k=self.generator.randrange(3)))
        name = self.generator.choice(["part-{}", "é{}", "x {}.y"]).format(number)
        place = self.folder / below
        place.mkdir(parents=True, exist_ok=True)
        kind = self.generator.choice(["jsonl", "json", "parquet", "text"])
        if kind == "parquet":
            path = write_parquet(place / f"{name}.parquet", texts)
        elif kind == "text":
            whole = self.separator.join(texts)
            path = self.packed(place / f"{name}.txt", whole.encode())
            texts = whole.split(self.separator) if whole else []  # a text may end with half of a separator
            texts = texts if not texts or texts[-1] else texts[:-1]
            self.texts += [len(texts)] if texts else []
        else:
            path = self.packed(
                place / f"{name}.{kind}", "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
            )
        self.documents.update(texts)
        self.link(path)

    def problem(self) -> str | None:
        """What the job must be refused for: no document at all, or no text file that is cut into several."""
        if self.texts and max(self.texts) < 2:
            return "--text-separator .* occurs nowhere"
        return None if self.documents else "no documents for 'text'"

    def packed(self, path: Path, data: bytes) -> Path:
        form = self.generator.choice([None, *COMPRESS])
        if form is None:
            path.write_bytes(data)
            return path
        path = path.with_name(f"{path.name}.{SUFFIXES[form]}")
        cuts = sorted({0, len(data), *(self.generator.randrange(len(data) + 1) for _ in range(3))})
        streams = [COMPRESS[form](data[a:b]) for a, b in pairwise(cuts)] or [COMPRESS[form](b"")]
        path.write_bytes(
            b"".join(stream + bytes(4 * self.generator.randrange(3) * (form == "xz")) for stream in streams)
        )
        return path

    def link(self, path: Path) -> None:
        """A second name for the file, a folder somewhere else with a link to it, or a way back up."""
        how = self.generator.choice(["none", "soft", "hard", "folder", "loop"])
        other = path.with_name(f"z-{path.name}")
        if how == "soft":
            other.symlink_to(path)
        elif how == "hard":
            os.link(path, other)
        elif how == "folder" and path.parent != self.folder:
            away = self.folder.parent / "elsewhere"
            away.mkdir(exist_ok=True)
            path.parent.rename(away / path.name)
            path.parent.symlink_to(away / path.name)
        elif how == "loop" and not other.exists():
            other.symlink_to(self.folder)


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 80))])
def test_the_documents_that_went_in_come_out(seed, args, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    made = Containers(folder, seed)
    how = made.generator.choice(["folder", "glob", "inside"])
    inputs = [folder / "*"] if how == "glob" else [folder]
    prefix = folder / "out" if how == "inside" else tmp_path / "out"
    if problem := made.problem():
        with pytest.raises(UsageError, match=problem):
            run_job(inputs, prefix, args, separator=made.separator)
        return
    run_job(inputs, prefix, args, separator=made.separator)
    assert written(prefix, args) == made.documents
    run_job(inputs, prefix, args, separator=made.separator, overwrite=True)  # beside its own outputs
    assert written(prefix, args) == made.documents


def test_a_job_whose_outputs_lie_among_its_inputs_resumes(args, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one"])
    (tmp_path / "b.jsonl").write_text("oops\n")
    with pytest.raises(UsageError, match="continue with --resume"):
        run_job([tmp_path], tmp_path / "x", args)
    write_jsonl(tmp_path / "b.jsonl", ["two"])
    run_job([tmp_path], tmp_path / "x", args, resume=True)
    assert written(tmp_path / "x", args) == Counter(["one", "two"])
    run_job([tmp_path], tmp_path / "y", args)  # another job reads neither the dataset nor its manifest
    assert written(tmp_path / "y", args) == Counter(["one", "two"])
    with pytest.raises(UsageError, match=r"x_text_document\.bin: written by a preprocessing job"):
        run_job([tmp_path / "x_text_document.bin"], tmp_path / "z", args)


def test_one_file_by_two_spellings(tmp_path, monkeypatch):
    first = write_jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "soft").symlink_to(first)
    os.link(first, tmp_path / "hard")
    (tmp_path / "folder").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for other in ("a.jsonl", "./a.jsonl", "soft", "hard", "folder/a.jsonl", "*.jsonl", "folder/*.jsonl"):
        with pytest.raises(UsageError, match="is named twice"):
            find([str(first), other])


def test_a_glob_reads_what_the_shell_would_give(tmp_path):
    for name in ("a.jsonl", "b/c.jsonl", "b/.hidden", "b/d/e.jsonl", "_SUCCESS", "_metadata", "b/_committed_7"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    expected = [str(tmp_path / name) for name in ("a.jsonl", "b/c.jsonl", "b/d/e.jsonl")]
    quoted = find([str(tmp_path / "*")])
    assert quoted.paths == expected == find([str(tmp_path)]).paths
    assert quoted.left_out() == "1 hidden, 3 of Spark's own"
    (tmp_path / "b" / "d" / "up").symlink_to(tmp_path)  # which `**` follows until the system refuses
    assert find([str(tmp_path / "**")]).paths == expected
    (tmp_path / "b" / "itself").symlink_to("itself")
    with pytest.raises(UsageError, match=r"b/itself: cannot be read: Too many levels of symbolic links"):
        find([str(tmp_path)])


@pytest.mark.parametrize("pattern", ["*/*.jsonl", "b/d*/e.jsonl", "**/e.jsonl", "b/d/*", "b/d"])
def test_a_folder_that_cannot_be_read_is_not_skipped(pattern, tmp_path, monkeypatch):
    """Python's glob and the shell skip it without a word."""
    for name in ("a.jsonl", "b/c.jsonl", "b/d/e.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / name, ["x"])
    (tmp_path / "b" / "d").chmod(0)
    if os.access(tmp_path / "b" / "d", os.R_OK):  # root reads everything
        closed, access, scandir = str(tmp_path / "b" / "d"), os.access, os.scandir

        def refused(path):
            if path == closed:
                raise PermissionError(13, "Permission denied", path)
            return scandir(path)

        monkeypatch.setattr(os, "access", lambda path, mode: path != closed and access(path, mode))
        monkeypatch.setattr(os, "scandir", refused)
    place = "b" if pattern == "*/*.jsonl" else "b/d"
    if place == "b":
        (tmp_path / "b").chmod(0o755)
        assert find([str(tmp_path / pattern)]).paths == [str(tmp_path / "b" / "c.jsonl")]  # needs nothing of b/d
        return
    with pytest.raises(UsageError, match=f"{place}: cannot be read: Permission denied"):
        find([str(tmp_path / pattern)])


def test_folders_that_are_not_read(args, tmp_path):
    """What failed attempts of Spark left is skipped, as by Spark itself; a table of several versions is refused."""
    folder = tmp_path / "table"
    for name in ("part-0", "year=2026/part-1", "_temporary/0/part-0", "_spark_metadata/0"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_parquet(folder / f"{name}.parquet", [name])
    run_job([folder], tmp_path / "x", args)
    assert written(tmp_path / "x", args) == Counter(["part-0", "year=2026/part-1"])
    for pattern in ("*", "**"):
        assert len(find([f"{folder}/{pattern}"]).paths) == 2
    assert len(find([f"{folder}/_temporary/*"]).paths) == 1  # asked for
    for name, table in (("_delta_log", "Delta Lake"), (".hoodie", "Hudi")):
        (folder / name).mkdir()
        with pytest.raises(UsageError, match=f"/table: a table of {table}, whose folder also has files"):
            run_job([tmp_path / "t*"], tmp_path / "y", args)
        with pytest.raises(UsageError, match="/table: a table of"):
            find([f"{folder}/*.parquet"])
        (folder / name).rmdir()


def test_what_is_read_is_said(args, tmp_path, capfd):
    write_jsonl(tmp_path / "a.jsonl", ["one"])
    write_parquet(tmp_path / "b.parquet", ["two"])
    (tmp_path / "README.md").write_text("# What this is")
    (tmp_path / ".hidden").touch()
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    run_job([tmp_path], tmp_path / "out", args)
    said = capfd.readouterr().err
    assert "input: 3 files, 0.0 MB: 1 plain text, 1 JSON lines, 1 Parquet; left out: 1 hidden, 1 names of" in said
    assert "warning: a mixture: " in said
    assert "plain text, each of which becomes a document: " in said


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = "<!DOCTYPE html>\n<html><title>404 Not Found</title></html>\n"
NOT_WHAT_THEY_CLAIM = {
    "a pointer": ("a.parquet", POINTER, "the pointer that Git LFS leaves"),
    "a pointer to lines": ("a.jsonl", POINTER, "the pointer that Git LFS leaves"),
    "a pointer to what is packed": ("a.jsonl.gz", POINTER, "the pointer that Git LFS leaves"),
    "a pointer to text": ("a.txt", POINTER, "the pointer that Git LFS leaves"),
    "a pointer of git-annex": ("a.txt", "/annex/objects/SHA256E-s12--0a.txt\n", "the pointer that git-annex leaves"),
    "a pointer of DVC": ("a.jsonl.dvc", "outs:\n- md5: 0a\n  path: a.jsonl\n", "the pointer that DVC leaves"),
    "a document to print": ("a.txt", "%PDF-1.4\n1 0 obj", "PDF, PostScript or RTF; convert it"),
    "a page": ("a.parquet", PAGE, "its name says Parquet, but it begins with '<!DOCTYPE html>"),
    "a packed page": ("a.jsonl.zst", PAGE, "its name says zstd, but it is not compressed"),
    "a page for text": ("a.txt", f"\ufeff \n{PAGE.lower()}", "a web page, as a download that failed leaves it"),
    "a page for nothing known": ("part-0", "<html lang='en'>\n<body>x", "a web page, as a download that failed"),
    "what object storage says": ("a.md", '<?xml version="1.0"?>\n<Error><Code>NoSuchKey</Code>', "a web page, as a"),
    "nothing": ("a.parquet", "", "its name says Parquet, but it is empty"),
    "nothing packed": ("a.jsonl.xz", "", "its name says xz, but it is empty"),
    "a table": ("a.csv", "id,text\n1,x\n", "a table: convert it"),
    "an archive": ("a.lz4", "x", "not unpacked here"),
    "an array": ("a.json", '[{"text": "x"}, {"text": "y"}]', "a JSON array, not JSON lines"),
    "an array of any name": ("a", '[\n {"text": "x"},\n {"text": "y"}\n]\n', "a JSON array, not JSON lines"),
    "an archive packed": ("a.tgz", "x", "not unpacked here"),
    "pages": ("a.warc.gz.txt", "WARC/1.0\r\nWARC-Type: conversion\r\n", "an archive of pages"),
    "articles": ("dump.xml", '<mediawiki xmlns="x">\n<page>', "an archive of pages"),
    "a table of records": ("part-0", "Obj\x01\x02x", "Arrow, Feather or Avro; convert it"),
    "a table of columns": ("data-0.arrow", "ARROW1\0\0", "Arrow, Feather or Avro; convert it"),
    "half of a download": ("a.jsonl.part", '{"text": "x"}\n', "an unfinished download, by its name"),
    "half of a copy": ("a.jsonl._COPYING_", '{"text": "x"}\n', "an unfinished download, by its name"),
    "what an editor left": ("a.jsonl~", '{"text": "x"}\n', "an editor's copy, by its name"),
    "something packed otherwise": ("a.jsonl.gz", "\0\1", "its name says gzip, but it is not compressed"),
    "a printed array": ("a.json", '[\n "x",\n "y"\n]\n', r"JSON over several lines \(pretty-printed\)"),
    "a printed object": ("a.jsonl", '{\n  "text": "x"\n}\n', r"JSON over several lines \(pretty-printed\)"),
    "printed objects": ("a.json", '{ "text":\n "x" }\n' * 2, r"JSON over several lines \(pretty-printed\)"),
}


@pytest.mark.parametrize("name", NOT_WHAT_THEY_CLAIM)
def test_what_is_not_what_its_name_claims_is_refused(name, args, tmp_path):
    """Before any work, though it is the last of the files, and though bad lines would be left out."""
    file, data, reason = NOT_WHAT_THEY_CLAIM[name]
    good = write_jsonl(tmp_path / "0.jsonl", ["good"])
    (tmp_path / file).write_text(data)
    with pytest.raises(UsageError, match=reason) as error:
        run_job([good, tmp_path / file], tmp_path / "out" / "x", args, skip_bad_lines=True)
    assert str(error.value).startswith(f"{tmp_path / file}: ")
    assert not list((tmp_path / "out").iterdir())


def test_pages_that_are_meant(args, tmp_path):
    """By their name, or by the flag; and a text about pages is text."""
    (tmp_path / "a.html").write_text(PAGE)
    run_job([tmp_path / "a.html"], tmp_path / "x", args)
    (tmp_path / "a.txt").write_text(PAGE)
    run_job([tmp_path / "a.txt"], tmp_path / "y", args, kind="text")
    (tmp_path / "b.txt").write_text(f"A page begins with {PAGE}")
    (tmp_path / "c.txt").write_text("<htmlish> or <errors>")
    run_job([tmp_path / "b.txt", tmp_path / "c.txt"], tmp_path / "z", args)
    assert sum(written(tmp_path / name, args).total() for name in "xyz") == 4


@pytest.mark.parametrize("place", [0, 5, 90_000])
def test_a_zero_byte_spoils_its_line_alone(place, args, tmp_path):
    lines = [b'{"text": "%d"}' % n for n in range(9000)]
    data = bytearray(b"\n".join(lines))
    data[place] = 0
    number = data[:place].count(b"\n") + 1
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(UsageError, match=rf"a\.jsonl:{number}: not JSON"):
        run_job([tmp_path / "a.jsonl"], tmp_path / "x", args)
    assert run_job([tmp_path / "a.jsonl"], tmp_path / "x", args, skip_bad_lines=True)[0]["documents"] == 8999
    (tmp_path / "a.txt").write_bytes(b"text " * 40_000 + bytes(100))
    with pytest.raises(UsageError, match=r"a\.txt:1 \(document 1\): binary data"):
        run_job([tmp_path / "a.txt"], tmp_path / "y", args)


def test_parquet_as_others_write_it(args, tmp_path):
    texts = ["one", "two", "", "one", "zwei é"]
    kinds = {
        "plain": pa.array(texts, pa.string()),
        "large": pa.array(texts, pa.large_string()),
        "view": pa.array(texts, pa.string_view()),
        "categorical": pa.array(texts).dictionary_encode(),
        "large-categorical": pa.array(texts, pa.large_string()).dictionary_encode(),
    }
    for name, column in kinds.items():
        pq.write_table(pa.table({"text": column}), tmp_path / f"{name}.parquet", row_group_size=2)
        made = run_job([tmp_path / f"{name}.parquet"], tmp_path / name, args)[0]
        assert (made["documents"], made["empty_documents"]) == (4, 1), name
        assert written(tmp_path / name, args) == Counter(filter(None, texts))


def test_parquet_without_rows(args, tmp_path):
    """As Spark writes for an empty partition: no row group, one without rows, or one between others."""
    schema = pa.schema([("text", pa.string())])
    pq.write_table(schema.empty_table(), tmp_path / "0.parquet")
    pq.ParquetWriter(tmp_path / "1.parquet", schema).close()
    with pq.ParquetWriter(tmp_path / "2.parquet", schema) as writer:
        for texts in ([], ["one"], [], ["two"]):
            writer.write_table(pa.table({"text": pa.array(texts, pa.string())}))
    run_job([tmp_path], tmp_path / "out", args)
    assert written(tmp_path / "out", args) == Counter(["one", "two"])
    with pytest.raises(UsageError, match="no documents for 'text'"):
        run_job([tmp_path / "0.parquet", tmp_path / "1.parquet"], tmp_path / "none", args)


def test_parquet_of_a_column_without_values(args, tmp_path):
    """Of which pandas does not know that it holds strings: an empty part is fine, and each null is a bad row."""
    for name, values in (("0", []), ("1", [None, None])):
        pq.write_table(pa.table({"text": pa.array(values, pa.null())}), tmp_path / f"{name}.parquet")
    write_parquet(tmp_path / "2.parquet", ["one"])
    with pytest.raises(UsageError, match=r"1\.parquet:1 \(row 1\): the value of 'text' is null"):
        run_job([tmp_path], tmp_path / "out", args)
    assert run_job([tmp_path], tmp_path / "out", args, skip_bad_lines=True)[0]["skipped_lines"] == 2
    assert written(tmp_path / "out", args) == Counter(["one"])


def test_parquet_whose_checksums_do_not_fit(args, tmp_path):
    table, path = pa.table({"text": [f"document {n}" for n in range(9)]}), tmp_path / "a.parquet"
    pq.write_table(table, path, write_page_checksum=True, use_dictionary=False, compression="none")
    whole = path.read_bytes()
    place = whole.find(b"document 5") + 9
    path.write_bytes(whole[:place] + b"6" + whole[place + 1 :])
    with pytest.raises(UsageError, match=r"a\.parquet: damaged Parquet file: .*CRC"):
        run_job([path], tmp_path / "out", args)


def test_parquet_with_a_column_twice(args, tmp_path):
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], ["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"a\.parquet: 2 columns named 'text'"):
        run_job([tmp_path / "a.parquet"], tmp_path / "out", args)


def test_an_input_that_changes_while_it_is_read(args, tmp_path, monkeypatch):
    from megatron_meap.preprocessing import readers

    monkeypatch.setattr(readers, "BLOCK_BYTES", 500)
    monkeypatch.setattr("megatron_meap.preprocessing.streams._READ_BYTES", 300)
    for number, change in enumerate(
        (lambda path: os.truncate(path, 2000), lambda path: path.open("ab").write(b"{}\n"))
    ):
        path = write_jsonl(tmp_path / f"{number}.jsonl", [f"line {n}" for n in range(2000)])
        file = readers.InputFile(str(path), readers.InputOptions())
        blocks = file.blocks()
        next(blocks)
        change(path)
        with pytest.raises(UsageError, match=rf"{number}\.jsonl: changed while it was read"):
            list(blocks)
