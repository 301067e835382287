"""What an input file is, judged by its first bytes and compared with what its name claims."""

import json
import re
from typing import Literal

from megatron_meap.errors import UsageError
from megatron_meap.preprocessing.streams import COMPRESSIONS

Kind = Literal["jsonl", "text", "parquet"]

KINDS: dict[Kind, str] = {"jsonl": "JSON lines", "parquet": "Parquet", "text": "plain text"}
"""Their names in messages."""

HEAD_BYTES = 1 << 16
"""Bytes of a file that are examined."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_WIDE_BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")  # of UTF-16 and UTF-32
_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_UNREADABLE = {
    (".csv", ".tsv"): "a table: convert it to Parquet or JSON lines, or give --input-format text if each such file is "
    "one document",
    (".dvc",): "the pointer that DVC leaves, not the file; fetch it with `dvc pull`",
    (".zip", ".7z", ".rar", ".tar", ".tgz", ".lz4", ".lzma", ".lzo", ".br", ".z", ".snappy"): "not unpacked here: "
    "unpack it, or compress it with gzip, zstd, xz or bzip2",
    (".arrow", ".feather", ".orc", ".avro"): "a table: convert it to Parquet",
    (".part", ".crdownload", ".aria2", ".incomplete", "._copying_", ".tmp"): "an unfinished download, by its name: "
    "complete it, or rename it",
    ("~", ".bak", ".orig", ".swp"): "an editor's copy, by its name: remove it, or rename it",
}
_WEB_PAGE = re.compile(
    rb"(<\?xml[^>]*>\s*)?<(!doctype\s+html|html|error)\b", re.IGNORECASE
)  # `error`: of object storage
_PAGE_SUFFIXES = (".html", ".htm", ".xhtml", ".xml")
_POINTERS = {  # what a checkout contains in place of a large file, and how to fetch that
    b"version https://git-lfs.github.com/spec/": "Git LFS leaves, not the file; fetch it with `git lfs pull`",
    b"/annex/objects/": "git-annex leaves, not the file; fetch it with `git annex get`",
    b"# xet version": "Git Xet leaves, not the file; fetch it with `git xet checkout`",
}
_NOT_TEXT = {  # by its first bytes, and how to get the text
    (b"%PDF-", b"%!PS", b"{\\rtf"): "PDF, PostScript or RTF; convert it to text (pdftotext, pandoc)",
    (b"ARROW1\0", b"FEA1\0", b"Obj\x01"): "Arrow, Feather or Avro; convert it to Parquet",
    (b"WARC/1.", b"<mediawiki "): "an archive of pages (WARC, Wikipedia); extract their texts",
}


def check_compression(name: str, compression: str | None, empty: bool) -> None:
    """Refuse a file that is not compressed as its name says."""
    for known in COMPRESSIONS:
        if name.lower().endswith(known.suffix) and compression != known.name:
            found = "empty" if empty else f"{compression}" if compression else "not compressed"
            raise UsageError(f"{name}: its name says {known.name}, but it is {found}; fetch it again, or rename it")


def recognise(name: str, head: bytes, *, asked: Kind | None = None, default: Kind | None = None) -> Kind:
    """What a file is.

    Args:
        name: its path.
        head: its first bytes, decompressed; empty for an empty file.
        asked: what the user says it is.
        default: what to assume if its first bytes do not tell; None: plain text.

    Raises:
        UsageError: it is not what its name claims, or cannot be read at all.
    """
    kind = asked or _recognise(name, head, default)
    if kind == "jsonl":
        _check_json_lines(name, head)
    return kind


def refuse_pointer(name: str, head: bytes) -> None:
    """Refuse what a checkout contains in place of a large file."""
    for beginning, left in _POINTERS.items():
        if head.startswith(beginning):
            raise UsageError(f"{name}: the pointer that {left}")


def _recognise(name: str, head: bytes, default: Kind | None) -> Kind:
    stem = name.lower()
    for compression in COMPRESSIONS:
        stem = stem.removesuffix(compression.suffix)
    if head.startswith(b"PAR1"):
        return "parquet"
    for magics, reason in _NOT_TEXT.items() if default is None else ():
        if head.startswith(magics):
            raise UsageError(f"{name}: {reason}")
    if stem.endswith(".parquet"):
        begins = f"begins with {head[:20].decode(errors='replace')!r}" if head else "is empty"
        raise UsageError(f"{name}: its name says Parquet, but it {begins}; fetch or write it again, or rename it")
    for suffixes, reason in _UNREADABLE.items():
        if stem.endswith(suffixes):
            raise UsageError(f"{name}: {reason}")
    if head.startswith(_WIDE_BYTE_ORDER_MARKS):
        raise UsageError(f"{name}: binary data, UTF-16 or UTF-32; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
    # Under any other name, only an object with a quoted key is taken for JSON lines: a text may begin with a brace.
    first = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if stem.endswith(_JSON_SUFFIXES) or re.match(rb'(\[\s*)?\{\s*"', first):
        return "jsonl"
    if default == "jsonl" and first and first[:1] not in (b"{", b"["):
        raise UsageError(f"{name}: does not begin like JSON lines; if it is plain text, give --input-format text")
    if default is None and _WEB_PAGE.match(first) and not stem.endswith(_PAGE_SUFFIXES):
        raise UsageError(
            f"{name}: a web page, as a download that failed leaves it; fetch it again, or give --input-format text if "
            "pages are meant"
        )
    if default is None and b"\0" in head:
        raise UsageError(f"{name}: binary data; expected JSON lines, text (UTF-8) or Parquet")
    return default or "text"


def _check_json_lines(name: str, head: bytes) -> None:
    """Refuse JSON that does not have one object per line: all its lines would be bad ones."""
    first = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if re.match(rb'\[\s*\{\s*"', first):
        raise UsageError(f"{name}: a JSON array, not JSON lines; make a line of each entry: jq -c '.[]' IN > OUT")
    refuse_printed(name, first)


def refuse_printed(name: str, first: bytes) -> None:
    """Refuse JSON whose first object or list spans several lines."""
    text = first.decode(errors="ignore")
    try:
        spans_lines = "\n" in text[: json.JSONDecoder().raw_decode(text)[1]]
    except (ValueError, RecursionError):
        spans_lines = re.match(r"[{\[]\s*\n", text) is not None  # too long for the head, perhaps
    if spans_lines:
        raise UsageError(
            f"{name}: JSON over several lines (pretty-printed), not JSON lines; give each object a line: jq -c . IN"
        )
