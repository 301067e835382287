"""The pipeline: the right ids, in order, whatever the form of the input and the number of workers."""

import io
import json
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_meap.errors import UsageError
from megatron_meap.preprocessing import pipeline, readers
from megatron_meap.preprocessing.documents import documents
from megatron_meap.preprocessing.readers import InputOptions
from tests.unit.preprocessing import (
    TEXTS,
    compressed,
    leftovers,
    make_tokenizer,
    outputs,
    read_back,
    run_job,
    sentencepiece_args,
    topics,
    write_jsonl,
    write_parquet,
)

EOD = 2
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="▁")  # SentencePiece's own space


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def args(model):
    return sentencepiece_args(model)


@pytest.fixture(scope="module")
def processor(model):
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few lines, so that small inputs are many tasks."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", 500)
    monkeypatch.setattr("megatron_meap.preprocessing.streams._READ_BYTES", 300)


def test_ids_are_those_of_megatrons_tokenizer(args, tmp_path):
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    full = dict(vars(args), pad_vocab_size=False, chat_template=None, tokenizer_sentencepiece_legacy=False)
    full |= {"metadata_path": None, "tokenizer_sentencepiece_ignore_extra_whitespaces": True}
    megatron = build_tokenizer(type("Args", (), full))
    run_job([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out", args)
    assert read_back(tmp_path / "out_text_document") == [[*megatron.tokenize(text), megatron.eod] for text in TEXTS]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(CHARACTERS, min_size=1), min_size=1))
def test_round_trip_of_arbitrary_unicode(texts, args, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unicode")
    run_job([write_jsonl(folder / "a.jsonl", texts)], folder / "out", args)
    ids = read_back(folder / "out_text_document")
    assert [document[-1] for document in ids] == [EOD] * len(texts)
    # The library's own `decode` drops one leading space, which the encoder put there.
    assert [processor.decode(document[:-1]) for document in ids] == texts


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(CHARACTERS), min_size=1, max_size=40).filter(any))
def test_any_documents_in_every_form(texts, args, tmp_path_factory, small_blocks):
    folder = tmp_path_factory.mktemp("forms")
    plain = write_jsonl(folder / "plain.jsonl", texts)
    run_job([plain], folder / "x1", args, workers=1)
    expected = outputs(folder / "x1_text_document")
    forms = [(plain, 2), (plain, 3), (compressed(plain, "gz"), 2), (compressed(plain, "zst"), 2)]
    for number, (path, workers) in enumerate([*forms, (write_parquet(folder / "table", texts), 3)]):
        run_job([path], folder / f"y{number}", args, workers=workers)
        assert outputs(folder / f"y{number}_text_document") == expected


def test_every_form_and_worker_count_gives_the_same_bytes(args, tmp_path, small_blocks):
    texts = [text for text in TEXTS if "\x00" not in text] + topics()[:12]
    plain = write_jsonl(tmp_path / "plain.jsonl", texts)
    separated = tmp_path / "separated.txt"
    separated.write_bytes("<|doc|>".join(texts).encode())
    forms = {
        **{form: compressed(plain, form) for form in ("gz", "zst", "xz", "bz2")},
        "parquet": write_parquet(tmp_path / "table.data", texts),
        "text": separated,
    }
    run_job([plain], tmp_path / "one", args, workers=1)
    expected = outputs(tmp_path / "one_text_document")
    for workers in (2, 3):
        run_job([plain], tmp_path / f"w{workers}", args, workers=workers)
        assert outputs(tmp_path / f"w{workers}_text_document") == expected
    for name, path in forms.items():
        run_job([path], tmp_path / name, args, separator="<|doc|>")
        assert outputs(tmp_path / f"{name}_text_document") == expected, name


def test_files_are_taken_in_order(args, tmp_path, small_blocks):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in (2, 0, 1):
        write_jsonl(folder / f"{number}.jsonl", [f"file {number} line {line}" for line in range(30)])
    (folder / ".hidden").write_text("not this one")
    (folder / "0a-empty.jsonl").touch()
    write_jsonl(tmp_path / "whole.jsonl", [f"file {number} line {line}" for number in range(3) for line in range(30)])
    run_job([folder], tmp_path / "folder", args)
    run_job([folder / "[0-9].jsonl"], tmp_path / "glob", args)
    run_job([tmp_path / "whole.jsonl"], tmp_path / "whole", args)
    assert outputs(tmp_path / "folder_text_document") == outputs(tmp_path / "whole_text_document")
    assert outputs(tmp_path / "glob_text_document") == outputs(tmp_path / "whole_text_document")


def test_plain_text_is_one_document_a_file(args, tmp_path, processor):
    (tmp_path / "a.txt").write_text("first\n\nstill first\n")
    (tmp_path / "b.txt").write_text("second")
    run_job([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "out", args)
    documents = read_back(tmp_path / "out_text_document")
    assert [processor.decode(ids[:-1]) for ids in documents] == ["first\n\nstill first\n", "second"]


def test_several_keys_give_several_datasets(args, tmp_path, processor):
    lines = [{"question": f"q{n}", "answer": f"a{n}" * (n % 3 > 0)} for n in range(9)]
    source = tmp_path / "qa.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    questions, answers = run_job([source], tmp_path / "qa", args, keys=("question", "answer"))
    assert (questions["documents"], answers["documents"], answers["empty_documents"]) == (9, 6, 3)
    documents = read_back(tmp_path / "qa_answer_document")
    assert [processor.decode(ids[:-1]) for ids in documents] == [line["answer"] for line in lines if line["answer"]]


def test_standard_input(args, tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    run_job([source], tmp_path / "file", args)
    for name, path in (("plain", source), ("gz", compressed(source, "gz"))):
        stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(path)))
        monkeypatch.setattr(sys, "stdin", stdin)
        manifest = run_job(["-"], tmp_path / name, args)[0]
        assert outputs(tmp_path / f"{name}_text_document") == outputs(tmp_path / "file_text_document")
        assert manifest["inputs"][0]["path"] == "-"


@pytest.mark.parametrize("text", [b"Once upon a time", b"\n\n  # Title\n", b"\xef\xbb\xbfa", b'"a string"\n', b"12 3"])
def test_plain_text_on_standard_input_is_told_what_to_say(text, args, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(text)
    for flags, refused in (({}, True), ({"kind": "text"}, False)):
        with open(tmp_path / "a.txt") as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            if refused:
                with pytest.raises(UsageError, match=r"standard input: .*plain text, give --input-format text"):
                    run_job(["-"], tmp_path / "out", args, **flags)
            else:
                assert run_job(["-"], tmp_path / "out", args, **flags)[0]["documents"] == 1


def test_bos_and_eod_around_every_document(args, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    run_job([source], tmp_path / "with", args, prepend_bos=True)
    run_job([source], tmp_path / "without", args, append_eod=False)
    bare = read_back(tmp_path / "without_text_document")
    assert read_back(tmp_path / "with_text_document") == [[1, *ids, EOD] for ids in bare]


def test_special_tokens_in_text_are_text(args, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["[MASK]<s></s><unk>", "a [MASK] b </s>"])
    for encoder in ("gigatoken", "reference"):
        run_job([source], tmp_path / encoder, args, append_eod=False, encoder=encoder)
        assert all(id > 3 for ids in read_back(tmp_path / f"{encoder}_text_document") for id in ids)


def test_empty_documents_are_counted_and_left_out(args, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["", "one", "", "two"])
    source.write_text("\n  \n" + source.read_text())  # blank lines are nothing at all
    manifest = run_job([source], tmp_path / "out", args, prepend_bos=True)[0]
    assert (manifest["documents"], manifest["empty_documents"], manifest["skipped_lines"]) == (2, 2, 0)


def test_nothing_produced_is_a_failure(args, tmp_path):
    folder = tmp_path / "out"
    for texts in ([], ["", ""]):
        with pytest.raises(UsageError, match=r"a\.jsonl: no documents for 'text' "):
            run_job([write_jsonl(tmp_path / "a.jsonl", texts)], folder / "out", args)
        assert leftovers(folder) == []


@pytest.mark.parametrize(
    ("name", "message"), [("", "is a folder; add the beginning of the files' names"), ("a.bin", "leave out .bin")]
)
def test_a_prefix_that_begins_no_name(name, message, args, tmp_path):
    prefix = f"{tmp_path}/out/{name}"
    with pytest.raises(UsageError, match=f"--output-prefix {prefix}: {message}"):
        run_job([write_jsonl(tmp_path / "a.jsonl", ["a text"])], prefix, args)
    assert not (tmp_path / "out").exists()


BAD_LINES = {
    "not JSON": (b'{"text": "cut off', "not JSON"),
    "plain text": (b"Once upon a time", "not JSON"),
    "no object": (b"[1, 2]", "not a JSON object but a list"),
    "no key": (b'{"body": "x"}', "no key 'text', only body"),
    "a number": (b'{"text": 7}', "'text' is not a string but a number"),
    "null": (b'{"text": null}', "'text' is not a string but null"),
    "a list": (b'{"text": ["a"]}', "'text' is not a string but a list"),
    "not UTF-8": (b'{"text": "\xff\xfe"}', "not UTF-8"),
    "lone surrogate": (b'{"text": "\\ud800"}', "not Unicode text"),
    "a key twice": (b'{"text": "lost", "id": 1, "text": "found"}', "the key 'text' occurs twice"),
    "a key twice, once in escapes": (b'{"\\u0074ex\\u0074": "lost", "text": "found"}', "the key 'text' occurs twice"),
    "a key twice with NaN": (b'{"text" : null, "x": NaN, "text": "found"}', "the key 'text' occurs twice"),
}


@pytest.mark.parametrize("key", ["text", "a/b", "é", "\U0001f600x", 'q"u', "b\\c"])
def test_a_key_twice_is_noticed_in_every_spelling(key):
    """Literally or in escapes, in any order; and once, it is not."""
    escapes = "".join(f"\\u{unit:04X}" for unit in memoryview(key.encode("utf-16-le")).cast("H"))
    literal = json.dumps(key, ensure_ascii=False)[1:-1]
    spellings = [literal, json.dumps(key)[1:-1], escapes, escapes.lower(), literal.replace("/", "\\/")]
    options = InputOptions(keys=(key,))
    for first in spellings:
        once = f'{{"x": {{"{first}": 1}}, "{first}": "found"}}'.encode()
        assert list(documents("jsonl", once, options)) == [("found",)]
        for second in spellings:
            [found] = documents("jsonl", f'{{"{first}": "lost", "{second}" : "found"}}'.encode(), options)
            assert "occurs twice" in str(found), (first, second)


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_stops_with_file_and_line(name, args, tmp_path, small_blocks):
    line, reason = BAD_LINES[name]
    good = b'{"text": "a good line"}\n'
    source = tmp_path / "a.jsonl"
    source.write_bytes(good * 70 + line + b"\n" + good * 70 + line + b"\n")
    folder = tmp_path / "out"
    with pytest.raises(UsageError) as error:
        run_job([source], folder / "out", args)
    assert str(error.value).startswith(f"{source}:71: ")
    assert reason in str(error.value)
    for flag, begins in (("--json-keys", "no key"), ("--input-format text", "not JSON")):
        assert (flag in str(error.value)) == reason.startswith(begins)
    assert leftovers(folder) == []
    manifest = run_job([source], folder / "out", args, skip_bad_lines=True)[0]
    assert (manifest["documents"], manifest["skipped_lines"]) == (140, 2)
    report = [json.loads(line) for line in (folder / "out.bad_lines.jsonl").read_text().splitlines()]
    assert [entry["position"] for entry in report] == [71, 142]
    assert all(reason in entry["reason"] and entry["file"] == str(source) for entry in report)


def test_lines_that_only_look_bad(args, tmp_path):
    """A number that JSON does not know is in another field, and a second key of that name in another object."""
    source = tmp_path / "a.jsonl"
    lines = [
        '{"text": "x", "score": NaN}',
        '{"type": "text", "text": "\\"text\\": x"}',
        '{"text": "é", "more": {"text": "y", "a": ["text"]}}',
    ]
    source.write_text("\n".join(lines))
    assert run_job([source], tmp_path / "out", args)[0]["documents"] == len(lines)


def test_bad_rows_and_texts_are_named(args, tmp_path):
    table = write_parquet(tmp_path / "a.parquet", ["x"] * 8 + [None, "y"])
    with pytest.raises(UsageError, match=r"a\.parquet:9 \(row 9\): the value of 'text' is null"):
        run_job([table], tmp_path / "out", args)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match=r"latin\.txt:1 \(document 1\): not UTF-8 \(byte 3"):
        run_job([tmp_path / "latin.txt"], tmp_path / "out", args)


def test_an_existing_dataset_is_replaced_only_when_asked(args, tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", ["first"])
    run_job([first], tmp_path / "out", args)
    before = outputs(tmp_path / "out_text_document")
    second = write_jsonl(tmp_path / "b.jsonl", ["another one"])
    with pytest.raises(UsageError, match=r"out_text_document.bin: exists already; give --overwrite"):
        run_job([second], tmp_path / "out", args)
    assert outputs(tmp_path / "out_text_document") == before
    run_job([second], tmp_path / "out", args, overwrite=True)
    run_job([second], tmp_path / "fresh", args)
    assert outputs(tmp_path / "out_text_document") == outputs(tmp_path / "fresh_text_document")


def test_outputs_that_cannot_be_written(args, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(UsageError, match=r"--output-prefix .*cannot create .*: "):
        run_job([source], source / "out", args)
    with pytest.raises(UsageError, match="File name too long"):
        run_job([source], tmp_path / ("n" * 300), args)


def test_settings_that_make_no_sense(args, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["x"])
    for settings_, message in [
        ({"workers": 0}, "--workers 0"),
        ({"keys": ("text", "text")}, "named twice"),
        ({"keys": ("text", "meta/title")}, "--json-keys text meta/title: has a slash"),
        ({"separator": "\udcff"}, "--text-separator \udcff: cannot occur in text that is UTF-8"),
        ({"keys": ("\udcff",)}, "--json-keys \udcff: cannot occur"),
    ]:
        with pytest.raises(UsageError, match=message):
            run_job([source], tmp_path / "out", args, **settings_)
    with pytest.raises(UsageError, match="--resume: standard input"):
        run_job(["-"], tmp_path / "out", args, resume=True)


def test_the_manifest_says_what_was_done(args, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    made = run_job([source], tmp_path / "out", args, prepend_bos=True)[0]
    written = json.loads(Path(tmp_path / "out_text_document.manifest.json").read_text())
    assert written == {"format": 1, **made}
    ids = read_back(tmp_path / "out_text_document")
    assert written["tokens"] == sum(map(len, ids))
    assert written["documents"] == len(TEXTS)
    assert written["max_token_id"] == max(map(max, ids))
    assert written["text_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert written["tokenizer"]["vocab_size"] == 600
    assert written["mask_token"] == {"text": "[MASK]", "id": 3, "added": False}
    assert written["flags"]["prepend_bos"] is True
    assert written["inputs"][0]["bytes"] == source.stat().st_size
    assert leftovers(tmp_path) == ["a.jsonl", *(f"out_text_document.{end}" for end in ("bin", "idx", "manifest.json"))]


@pytest.mark.parametrize(
    "name",
    [
        *(f"_text_document.{kind}" for kind in ("bin", "idx", "manifest.json")),
        *(f"_text_document.{kind}.partial" for kind in ("bin", "idx", "lengths", "manifest")),
        *(".bad_lines.jsonl", ".bad_lines.jsonl.partial", ".journal.partial"),
    ],
)
def test_a_folder_with_the_name_of_a_file_is_refused_at_the_start(name, args, tmp_path, monkeypatch):
    """Hours of work would be lost if it showed only when the files get their names."""
    monkeypatch.setattr(pipeline, "_encode_all", lambda *_: pytest.fail("it began"))
    (tmp_path / f"x{name}").mkdir()
    corpus = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    with pytest.raises(UsageError, match="Is a directory"):
        run_job([corpus], tmp_path / "x", args, workers=1, overwrite=True)
    assert leftovers(tmp_path) == sorted([f"x{name}", "in.jsonl"])


def test_names_that_are_too_long_are_refused_at_the_start(args, tmp_path, monkeypatch):
    """Some of a job's names are longer than others."""
    corpus = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    began = False

    def begin(*_):
        nonlocal began
        began = True
        encode_all(*_)

    encode_all = pipeline._encode_all
    monkeypatch.setattr(pipeline, "_encode_all", begin)
    for length in range(223, 229):
        began, said = False, ""
        try:
            run_job([corpus], tmp_path / ("y" * length), args, workers=1)
        except UsageError as error:
            said = str(error)
        assert began != ("File name too long" in said)
        assert not list(tmp_path.glob("*.partial"))
    assert not began
