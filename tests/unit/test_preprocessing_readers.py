"""Input is recognised by its content; damaged input gives one line that names the file."""

import gzip
import io
import lzma
import os

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megatron_meap.errors import UsageError
from megatron_meap.preprocessing.inputs import find_inputs
from megatron_meap.preprocessing.readers import InputFile, InputOptions
from megatron_meap.preprocessing.streams import cut, decompressed
from tests.unit.preprocessing import compressed, write_jsonl, write_parquet

LINES = [f"line {number} " + "x" * (number % 50) for number in range(3000)]


@given(data=st.binary(max_size=300), separator=st.sampled_from([b"\n", b"ab", b"aab", None]), size=st.integers(1, 40))
def test_blocks_are_the_input_cut_after_separators(data, separator, size):
    blocks = list(cut(io.BufferedReader(io.BytesIO(data)), separator, size))
    assert b"".join(blocks) == data
    assert all(blocks)
    if separator is None:
        assert len(blocks) <= 1
    else:
        assert all(block.endswith(separator) for block in blocks[:-1])


@given(data=st.text("ab\n", max_size=200), size=st.integers(1, 20))
def test_documents_never_change_with_the_block_size(data, size):
    blocks = cut(io.BufferedReader(io.BytesIO(data.encode())), b"ab", size)
    pieces = [piece for block in blocks for piece in block.split(b"ab")[: -1 if block.endswith(b"ab") else None]]
    expected = data.encode().split(b"ab")
    assert pieces == (expected if expected[-1] else expected[:-1])


def recognised(path) -> tuple[str, str | None]:
    file = InputFile(str(path), InputOptions())
    file.close()
    return file.kind, file.compression


def test_recognised_by_content(tmp_path):
    jsonl = write_jsonl(tmp_path / "a.jsonl", LINES)
    unnamed = tmp_path / "corpus"
    unnamed.write_bytes(b"\xef\xbb\xbf\n " + jsonl.read_bytes())
    text = tmp_path / "b.dat"
    text.write_text("{{Infobox}} is how this text begins\n")
    assert recognised(jsonl) == recognised(unnamed) == ("jsonl", None)
    assert recognised(text) == ("text", None)
    assert recognised(write_parquet(tmp_path / "c.txt", ["x"])) == ("parquet", None)
    for form, name in (("gz", "gzip"), ("zst", "zstd"), ("xz", "xz"), ("bz2", "bzip2")):
        assert recognised(compressed(unnamed, form)) == ("jsonl", name)
        assert recognised(compressed(text, form)) == ("text", name)
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(b"its name says what it should be"))
    assert recognised(broken) == ("jsonl", "gzip")


@pytest.mark.parametrize("form", ["gz", "zst", "xz", "bz2"])
def test_compressed_input_in_several_parts(form, tmp_path):
    """Compressed files may be put one after the other."""
    first = compressed(write_jsonl(tmp_path / "a.jsonl", LINES), form)
    both = tmp_path / "both"
    both.write_bytes(first.read_bytes() * 2)
    file = InputFile(str(both), InputOptions())
    assert b"".join(file.blocks()) == (tmp_path / "a.jsonl").read_bytes() * 2
    assert file.position == both.stat().st_size


@pytest.mark.parametrize("form", ["gz", "zst", "xz", "bz2"])
@pytest.mark.parametrize("share", [0.3, 0.99])
def test_truncated_compressed_input(form, share, tmp_path):
    whole = compressed(write_jsonl(tmp_path / "a.jsonl", LINES), form).read_bytes()
    path = tmp_path / "cut"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UsageError, match=r"cut: damaged or truncated"):
        list(InputFile(str(path), InputOptions(kind="jsonl")).blocks())


@pytest.mark.parametrize("form", ["gz", "zst", "xz", "bz2"])
def test_damaged_compressed_input(form, tmp_path):
    data = bytearray(compressed(write_jsonl(tmp_path / "a.jsonl", LINES), form).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 8] = b"DAMAGED!"
    path = tmp_path / "damaged"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"damaged: damaged or truncated"):
        list(InputFile(str(path), InputOptions(kind="jsonl")).blocks())


def test_zstd_with_a_skippable_frame():
    data = b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip" + zstandard.compress(b"hello")
    stream, name = decompressed(io.BufferedReader(io.BytesIO(data)))
    assert (stream.read(), name) == (b"hello", "zstd")


def test_what_is_not_text(tmp_path):
    for name, data in [("elf", b"\x7fELF\x02\x01\x01\x00"), ("utf16.txt", "hello".encode("utf-16"))]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UsageError, match=f"{name}: binary data"):
            InputFile(str(tmp_path / name), InputOptions())
    (tmp_path / "inside").write_bytes(lzma.compress(bytes(100)))
    with pytest.raises(UsageError, match="inside: binary data"):
        InputFile(str(tmp_path / "inside"), InputOptions())


def test_parquet_without_the_column(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["x"])
    with pytest.raises(UsageError, match=r"no column 'body', only id, text \(--json-keys\)"):
        list(InputFile(str(path), InputOptions(("body",))).blocks())
    with pytest.raises(UsageError, match="column 'id' holds int64, not strings"):
        list(InputFile(str(path), InputOptions(("id",))).blocks())


def test_damaged_parquet(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["x"] * 100)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UsageError, match="damaged Parquet file"):
        list(InputFile(str(path), InputOptions()).blocks())


def test_inputs_that_are_not_there(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "empty").mkdir()
    for name in ("missing.jsonl", "*.zst", "empty"):
        with pytest.raises(UsageError, match="nothing there; give a file, a glob or a folder"):
            find_inputs([str(tmp_path / name)])
    with pytest.raises(UsageError, match=r"a\.jsonl is named twice"):
        find_inputs([str(tmp_path / "a.jsonl"), str(tmp_path / "*.jsonl")])
    (tmp_path / "empty" / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name in ("empty", "empty/*"):
        with pytest.raises(UsageError, match="dangling: a link to nowhere, which cannot be read: No such file"):
            find_inputs([str(tmp_path / name)])
    with pytest.raises(UsageError, match="not a file; leave it out, or pipe it into standard input"):
        find_inputs([str(tmp_path / "pipe")])
    with pytest.raises(UsageError, match="cannot be combined"):
        find_inputs(["-", str(tmp_path / "a.jsonl")])


def test_plain_text_has_no_keys(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UsageError, match="plain text has one key only"):
        list(InputFile(str(tmp_path / "a.txt"), InputOptions(("a", "b"))).blocks())


def test_line_ends_that_keep_a_separator_from_cutting(tmp_path, capfd):
    """Throughout a file, it is refused; in places, reported; if the separator matches anyway, it is fine."""
    path = tmp_path / "a.txt"

    def read(content: bytes, separator: str) -> str:
        path.write_bytes(content)
        list(InputFile(str(path), InputOptions(separator=separator)).blocks())
        return capfd.readouterr().err

    with pytest.raises(UsageError, match=r"never occurs in it; give '\\r\\n\\r\\n'"):
        read(b"a\r\n\r\nb", "\n\n")
    assert "in 2 places --text-separator has" in read(b"a\n\nb\r\n\r\nc\r\n\r\nd", "\n\n")
    assert read(b"a\r\n\r\nb", "\r\n\r\n") == read(b"a\r\nb", "\n") == read(b"a\n\nb", "\n\n") == ""
