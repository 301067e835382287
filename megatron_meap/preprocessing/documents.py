"""Parses and checks the documents of a block of input; each bad one is reported with its line and the reason."""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import orjson

from megatron_meap.preprocessing import parquet
from megatron_meap.preprocessing.readers import InputOptions
from megatron_meap.preprocessing.recognition import Kind

Texts = tuple[str, ...]
"""One document: a text for each key."""


class BadDocumentError(Exception):
    """A line, row or text that is not a document; the message says why."""


def documents(kind: Kind, block: bytes, options: InputOptions) -> Iterator[Texts | BadDocumentError | None]:
    """What is at each position of a block, in order: a document, what is wrong with it, or nothing (a blank line).

    Positions are lines of JSON, rows of Parquet, or pieces of text.
    """
    split, parse = _FORMATS[kind]
    for item in split(block, options):
        try:
            yield parse(item, options)
        except BadDocumentError as error:
            yield error


def _lines(block: bytes, options: InputOptions) -> list[bytes]:
    lines = block.split(b"\n")
    if not lines[-1]:
        lines.pop()  # a block ends after its last line
    return lines


def _from_json(line: bytes, options: InputOptions) -> Texts | None:
    if not line or line.isspace():
        return None
    checked = _checked
    try:
        data = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        data, checked = _lenient_json(line, error), _checked_unicode
    if not isinstance(data, dict):
        raise BadDocumentError(f"not a JSON object but {_kind_of(data)}")
    texts = tuple(checked(data, key) for key in options.keys)
    for key, text in zip(options.keys, texts, strict=True):
        if _is_repeated(line, key, text):
            raise BadDocumentError(f"the key {key!r} occurs twice")
    return texts


def _is_repeated(line: bytes, key: str, text: str) -> bool:
    """Whether an object has a key twice: parsers take the last one, so that the other document would be lost.

    `text` is that one's value. It follows the key, so only a few bytes have to be searched.
    """
    before = line[: len(line) - len(text)]
    candidates = sum(map(before.count, (_quoted(key), rb"\u", rb"\/")))
    if candidates < 2 or len(_spelled(key).findall(before)) < 2:
        return False
    pairs = json.JSONDecoder(object_pairs_hook=list).decode(line.decode())
    return sum(name == key for name, _ in pairs) > 1


@functools.cache
def _quoted(key: str) -> bytes:
    return json.dumps(key, ensure_ascii=False).encode()


@functools.cache
def _spelled(key: str) -> re.Pattern[bytes]:
    """A key and its colon, in every way that JSON allows: any character may be an escape of its UTF-16 code units."""
    found = b""
    for character in key:
        escape = "".join(rf"\\u{unit:04x}" for unit in memoryview(character.encode("utf-16-le")).cast("H"))
        plain = re.escape(json.dumps(character, ensure_ascii=False)[1:-1])
        found += rf"(?:{plain}|(?i:{escape}){r'|\\/' * (character == '/')})".encode()
    return re.compile(b'"' + found + rb'"\s*:')


def _lenient_json(line: bytes, error: orjson.JSONDecodeError) -> Any:
    """Parse with Python's parser, which accepts the NaN and Infinity that Python's writer puts into other fields."""
    try:
        return json.loads(line.decode())  # given bytes that contain zeros, it would guess UTF-16 or UTF-32
    except UnicodeDecodeError:
        raise BadDocumentError("not UTF-8") from None
    except (ValueError, RecursionError):
        raise BadDocumentError(f"not JSON: {str(error).split(': line')[0]}") from None


def _checked(data: dict[str, Any], key: str) -> str:
    if key not in data:
        present = ", ".join(sorted(map(str, data))[:8]) or "no keys at all"
        raise BadDocumentError(f"no key {key!r}, only {present}")
    value = data[key]
    if not isinstance(value, str):
        raise BadDocumentError(f"the value of {key!r} is not a string but {_kind_of(value)}")
    return value


def _checked_unicode(data: dict[str, Any], key: str) -> str:
    """The same for Python's parser, which accepts what orjson refuses."""
    value = _checked(data, key)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadDocumentError(f"the value of {key!r} is not Unicode text (a lone surrogate)") from None
    return value


def _kind_of(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}.get(
        type(value), "a number"
    )


def _pieces(block: bytes, options: InputOptions) -> list[bytes]:
    if options.separator is None:
        return [block]
    pieces = block.split(options.separator.encode())
    if not pieces[-1]:
        pieces.pop()
    return pieces


def _from_text(piece: bytes, options: InputOptions) -> Texts:
    if (place := piece.find(b"\0")) >= 0:
        raise BadDocumentError(f"binary data, not text (a zero at byte {place} of the document)")
    return (_decoded(piece),)


def _rows(block: bytes, options: InputOptions) -> Iterable[tuple[bytes | None, ...]]:
    return parquet.rows(block, options.keys)


def _from_row(row: tuple[bytes | None, ...], options: InputOptions) -> Texts:
    for key, value in zip(options.keys, row, strict=True):
        if value is None:
            raise BadDocumentError(f"the value of {key!r} is null")
    return tuple(_decoded(value) for value in row if value is not None)


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise BadDocumentError(f"not UTF-8 (byte {error.start} of the document)") from None


_FORMATS: dict[
    Kind, tuple[Callable[[bytes, InputOptions], Iterable[Any]], Callable[[Any, InputOptions], Texts | None]]
] = {
    "jsonl": (_lines, _from_json),
    "text": (_pieces, _from_text),
    "parquet": (_rows, _from_row),
}
