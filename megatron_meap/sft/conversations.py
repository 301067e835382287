"""Conversations from files (JSON lines, one JSON list or Parquet), checked and brought into one form."""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from megatron_meap.errors import UsageError
from megatron_meap.preprocessing.recognition import BYTE_ORDER_MARK, HEAD_BYTES, refuse_pointer, refuse_printed
from megatron_meap.preprocessing.streams import DamagedError, decompressed
from megatron_meap.sft.fields import BadConversation
from megatron_meap.sft.records import Message, parse, unused
from megatron_meap.sft.tools import tools_of

FIX_OR_SKIP = "fix it, or skip such lines with --skip-bad-lines"


@dataclass(frozen=True)
class Conversation:
    """One conversation, checked."""

    messages: list[Message]
    place: str
    """File and line (or entry of a JSON list, or row), for people."""
    tools: list[Any] | None = None
    """What the assistant may call, as templates take them."""
    unused: frozenset[str] = frozenset()
    """Names of fields that change nothing."""

    @property
    def ends_unanswered(self) -> bool:
        """Whether it ends with an unanswered question, which is not trained on."""
        return self.messages[-1]["role"] != "assistant"


def read_conversations(path: str, bad: Callable[[UsageError], None]) -> Iterator[Conversation]:
    """Conversations of a file: JSON lines or one JSON list, plain or compressed (gz, zst, xz, bz2), or Parquet rows.

    Args:
        path: of the file.
        bad: called with an error that names file and line for each bad one, which is then skipped; it may raise.

    Raises:
        UsageError: the file cannot be read, or is not JSON at all.
    """
    for place, content in _records(path):
        try:
            record = _parsed(content) if isinstance(content, bytes) else content
            yield Conversation(parse(record), place, tools_of(record), frozenset(unused(record)))
        except orjson.JSONDecodeError as error:
            bad(UsageError(f"{place}: not JSON: {error}; {FIX_OR_SKIP}"))
        except BadConversation as error:
            bad(UsageError(f"{place}: {error}; {FIX_OR_SKIP}"))


def _parsed(written: bytes) -> Any:
    """JSON in which no object has a key twice: parsers silently take the last one."""
    record = orjson.loads(written)
    json.loads(written, object_pairs_hook=_each_once, parse_int=str, parse_float=str)
    return record


def _each_once(pairs: list[tuple[str, Any]]) -> None:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadConversation(f"the key {twice!r} occurs twice in an object")


def _records(path: str) -> Iterator[tuple[str, Any]]:
    """Place and content of every record: bytes of a line, or the parsed entry of a list."""
    try:
        with open(path, "rb") as file:
            stream, _ = decompressed(io.BufferedReader(file))  # type: ignore[arg-type]
            if stream.peek(4)[:4] == b"PAR1":
                yield from _rows(path)
                return
            head = stream.peek(HEAD_BYTES)[:HEAD_BYTES]
            refuse_pointer(path, head)
            first = head.removeprefix(BYTE_ORDER_MARK).lstrip()
            if not first.startswith(b"["):
                refuse_printed(path, first)
            else:
                entries = _parsed(stream.read().removeprefix(BYTE_ORDER_MARK))
                yield from ((f"{path}, entry {number}", entry) for number, entry in enumerate(entries, 1))
                return
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield f"{path}, line {number}", line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
    except BadConversation as error:
        raise UsageError(f"{path}: {error}; give each key once") from error
    except orjson.JSONDecodeError as error:
        raise UsageError(f"{path}: begins like a JSON list, but is not one: {error}") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except DamagedError as error:
        raise UsageError(f"{path}: damaged or truncated compressed file: {error}") from error


def _rows(path: str) -> Iterator[tuple[str, Any]]:
    """Place and content of every row of a Parquet file."""
    import pyarrow
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", _without_nulls(row)
    except pyarrow.ArrowException as error:
        raise UsageError(f"{path}: a damaged Parquet file: {' '.join(str(error).split())}") from error


def _without_nulls(value: Any) -> Any:
    """A row without its nulls: Parquet gives every object the fields of all others, as nulls."""
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
