"""Tokenizer training: Llama's format, no [MASK] from text, deterministic, and one line for what cannot work."""

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_meap.errors import UsageError
from megatron_meap.preprocessing import tokenizer_training
from megatron_meap.preprocessing.readers import InputOptions
from megatron_meap.preprocessing.tokenizer_training import train_tokenizer
from tests.unit.preprocessing import compressed, make_tokenizer, topics, write_jsonl, write_parquet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def processor(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(make_tokenizer(folder, vocab_size=1000)))


def test_ids(processor):
    assert processor.get_piece_size() == 1000
    assert [processor.id_to_piece(id) for id in range(5)] == ["<unk>", "<s>", "</s>", "[MASK]", "<0x00>"]
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()) == (0, 1, 2, -1)
    assert processor.is_control(3)


def test_printable_ascii_is_never_bytes(tmp_path):
    """However rare it is: by its share of this text no digit, capital or sign would be a piece."""
    source = write_jsonl(tmp_path / "prose.jsonl", ["the cat sat on the mat and the dog sat on the log\n" * 2000, "Q7"])
    train_tokenizer([str(source)], tmp_path / "m", vocab_size=355 + 20)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m"))
    for character in map(chr, range(33, 127)):
        assert processor.encode(f"a{character}", out_type=str)[-1].endswith(character)
    train_tokenizer([str(source)], tmp_path / "smallest", vocab_size=355)


def test_an_existing_tokenizer_is_kept(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", topics()[:5])
    (tmp_path / "m").write_text("mine")
    with pytest.raises(UsageError, match=r"--output .*/m: already exists.*--overwrite"):
        train_tokenizer([str(source)], tmp_path / "m", vocab_size=400)
    assert (tmp_path / "m").read_text() == "mine"
    train_tokenizer([str(source)], tmp_path / "m", vocab_size=400, overwrite=True)
    assert (tmp_path / "m").stat().st_size > 1000
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(UsageError, match=r"--output .*/link: is one of the inputs; name another file"):
        train_tokenizer([str(tmp_path / "*.jsonl")], tmp_path / "link", vocab_size=400, overwrite=True)
    with pytest.raises(UsageError, match=r"is a directory; name the .model file, such as .*/new/tokenizer.model"):
        train_tokenizer([str(source)], f"{tmp_path}/new/", vocab_size=400)


def test_digits_are_split(processor):
    assert processor.encode("2024", out_type=str) == ["▁", "2", "0", "2", "4"]
    pieces = [processor.id_to_piece(id) for id in range(260, 1000)]
    assert not [piece for piece in pieces if any(map(str.isdigit, piece)) and len(piece) > 1]


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")) | st.text(" \n\t[MASK]</s>é"))
def test_text_comes_back_as_it_was_and_never_makes_a_special_token(text, processor):
    ids = processor.encode(text)
    assert processor.decode(ids) == text
    assert all(id > 3 for id in ids)


def test_the_same_corpus_gives_the_same_file(tmp_path):
    plain = write_jsonl(tmp_path / "a.jsonl", topics()[:20])
    inputs = {
        "first": plain,
        "again": plain,
        "gz": compressed(plain, "gz"),
        "parquet": write_parquet(tmp_path / "a.parquet", topics()[:20]),
    }
    for name, path in inputs.items():
        train_tokenizer([str(path)], tmp_path / "models" / name, vocab_size=400)
    models = {(tmp_path / "models" / name).read_bytes() for name in inputs}
    assert len(models) == 1


def test_padding_and_another_mask_token(tmp_path, folder):
    train_tokenizer(
        [str(folder / "corpus.jsonl")], tmp_path / "m", vocab_size=400, pad_token="<pad>", mask_token="<|mask|>"
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m"))
    assert processor.pad_id() == 3
    assert processor.piece_to_id("<|mask|>") == 4
    assert processor.is_control(4)


def test_only_so_much_text_is_read(tmp_path):
    """Text after the limit has no effect, even if it is invalid."""
    source = write_jsonl(tmp_path / "a.jsonl", topics()[:10])
    train_tokenizer([str(source)], tmp_path / "all", vocab_size=400)
    with open(source, "a") as file:
        file.write("not JSON\n")
    size = sum(len(line.encode()) for text in topics()[:10] for line in text.splitlines() if line)
    train_tokenizer([str(source)], tmp_path / "limited", vocab_size=400, max_bytes=size)
    assert (tmp_path / "all").read_bytes() == (tmp_path / "limited").read_bytes()


def test_the_limit_is_shared_among_files(tmp_path):
    """Each gives the same amount; what short ones lack, longer ones give."""
    letters = {"a": 20_000, "b": 300, "c": 20_000, "d": 20_000}
    paths = [
        write_jsonl(tmp_path / f"{x}.jsonl", [f"{x * 99}\n" * 10] * (count // 1000 + 1)) for x, count in letters.items()
    ]
    lines, used = tokenizer_training._sample(list(map(str, paths)), InputOptions(), 12_000)
    counts = {letter: sum(line.count(letter) for line in lines) for letter in letters}
    assert counts["b"] == 990  # all of it
    assert all(abs(counts[letter] - 11_000 / 3) < 100 for letter in "acd")
    assert [line[0] for line in lines] == sorted(line[0] for line in lines)  # in the order of the files
    assert used == "0.0 MB of text from 4 files, 3 of which only in part (--max-mb)"
    assert tokenizer_training._sample([str(paths[1])], InputOptions(), 12_000)[1] == "0.0 MB of text from 1 file"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"mask_token": "<s>"}, "--mask-token <s>: is one of UNK, BOS and EOS of this tokenizer already"),
        ({"pad_token": "</s>"}, "--pad-token </s>: is one of UNK, BOS and EOS of"),
        ({"pad_token": "[MASK]"}, r"--pad-token \[MASK\]: is the token of --mask-token of this tokenizer already"),
        ({"mask_token": ""}, "--mask-token '': must be printable, and not a single character"),
        ({"mask_token": "a"}, "--mask-token 'a': must be printable, and not a single character"),
        ({"mask_token": "<a\nb>"}, r"--mask-token '<a\\nb>': must be printable"),
        ({"mask_token": "<a\0b>"}, r"--mask-token '<a\\x00b>': must be printable"),
        ({"pad_token": "<pad\udcff>"}, r"--pad-token '<pad\\udcff>': must be printable"),
        ({"pad_token": "<0x0A>"}, "--pad-token '<0x0A>': must be printable, and not a single character or a byte"),
    ],
)
def test_tokens_that_are_another_one(names, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        train_tokenizer([str(write_jsonl(tmp_path / "a.jsonl", topics()[:9]))], tmp_path / "m", vocab_size=400, **names)
    assert not (tmp_path / "m").exists()


def test_what_cannot_work(tmp_path, folder):
    corpus = str(folder / "corpus.jsonl")
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    short = write_jsonl(tmp_path / "short.jsonl", ["hello"])
    many = write_jsonl(tmp_path / "many.jsonl", ["".join(map(chr, range(0x4E00, 0x5000)))])
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "x"}\n\n{"body": "x"}\n')
    for inputs, size, message in [
        ([str(tmp_path / "missing")], 400, "nothing there"),
        ([str(empty)], 400, "no text in it; give a corpus"),
        ([str(short)], 4000, "--vocab-size 4000: .*give more text, or a smaller vocabulary"),
        ([str(many)], 400, "--vocab-size 400: .*; name a larger one"),
        ([str(bad)], 400, r"bad\.jsonl:3: no key 'text', only body"),
        ([corpus], 260, "--vocab-size 260: at least 355"),
    ]:
        with pytest.raises(UsageError, match=message) as error:
            train_tokenizer(inputs, tmp_path / "out" / "m", vocab_size=size)
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="cannot be written"):
        train_tokenizer([corpus], bad / "m", vocab_size=400)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", ["é" * 700_000, "ein Wörtchen " * 200_000, "x" * 3_000_000 + " end"])
def test_long_lines_are_cut_and_nothing_is_left_out(line):
    """At spaces where there are any, never within a character; SentencePiece leaves lines above the limit out."""
    parts = list(tokenizer_training._cut(line.encode()))
    assert "".join(parts) == line
    assert max(len(part.encode()) for part in parts) <= tokenizer_training._LONGEST
    if line.count(" ") > 1:
        assert all(part.startswith(" ") for part in parts[1:])


def test_a_corpus_of_one_long_line_trains(tmp_path):
    """Characters that occur only in long lines are pieces too."""
    source = write_jsonl(tmp_path / "long.jsonl", ["short", "ŵord in a line of its own " * 60_000])
    train_tokenizer([str(source)], tmp_path / "m", vocab_size=390)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m"))
    assert len(processor.encode("ŵ", out_type=str)) <= 2  # not in bytes
    assert "<0x" not in "".join(processor.encode("ŵord", out_type=str))
