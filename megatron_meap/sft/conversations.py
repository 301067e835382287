"""Conversations from JSON: read, checked, and brought into one shape, lists of messages with roles.

Three shapes are taken: `messages` (role, content), `conversations` (from, value) and Alpaca's fields (instruction,
input, output). A conversation is an optional system prompt, then questions and answers in turn.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from megatron_meap.errors import UsageError
from megatron_meap.preprocessing.streams import DamagedError, decompressed

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`; Alpaca's `instruction` and `input` besides, for its template."""

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_SHAPES = "'messages', 'conversations', or Alpaca's 'instruction' and 'output'"


class BadConversation(ValueError):
    """A conversation that cannot be trained on; the message says why, without file and line."""


@dataclass(frozen=True)
class Conversation:
    """One conversation, checked."""

    messages: list[Message]
    place: str
    """File and line (or entry of a JSON list), for people."""


def parse(record: Any) -> list[Message]:
    """Messages of one JSON record.

    Raises:
        BadConversation: none of the shapes, roles out of order, missing fields, or values that are not strings.
    """
    if not isinstance(record, dict):
        raise BadConversation(f"expected an object with {_SHAPES}, got {_kind(record)}")
    if "messages" in record:
        messages = _listed(record, "messages", "role", "content")
    elif "conversations" in record:
        messages = _listed(record, "conversations", "from", "value")
    elif "instruction" in record:
        messages = _alpaca(record)
    else:
        raise BadConversation(f"has none of the fields {_SHAPES}")
    if messages and messages[0]["role"] != "system":
        for name in ("system", "system_prompt"):
            if record.get(name):
                messages.insert(0, {"role": "system", "content": _text(record, name)})
                break
    _check_order(messages)
    return messages


def _listed(record: dict, field: str, role_key: str, content_key: str) -> list[Message]:
    """Messages of a list of objects."""
    entries = record[field]
    if not isinstance(entries, list):
        raise BadConversation(f"'{field}' is {_kind(entries)}, not a list")
    if not entries:
        raise BadConversation(f"'{field}' is empty")
    messages = []
    for number, entry in enumerate(entries, 1):
        try:
            if not isinstance(entry, dict):
                raise BadConversation(f"is {_kind(entry)}, not an object")
            role = _text(entry, role_key)
            if role not in _ROLES:
                raise BadConversation(f"has the unknown {role_key} {role!r}; known are {', '.join(_ROLES)}")
            messages.append({"role": _ROLES[role], "content": _text(entry, content_key)})
        except BadConversation as error:
            raise BadConversation(f"message {number} {error}") from None
    return messages


def _alpaca(record: dict) -> list[Message]:
    """A question and its answer; the question's parts stay apart for the template that wants them so."""
    instruction, answer = _text(record, "instruction"), _text(record, "output")
    given = _text(record, "input") if record.get("input") is not None else ""
    content = f"{instruction}\n\n{given}" if given else instruction
    question = {"role": "user", "content": content, "instruction": instruction, "input": given}
    return [question, {"role": "assistant", "content": answer}]


def _text(fields: dict, name: str) -> str:
    if name not in fields:
        raise BadConversation(f"has no {name!r}")
    if not isinstance(fields[name], str):
        raise BadConversation(f"has {_kind(fields[name])} as {name!r}, not a string")
    return fields[name]


def _check_order(messages: list[Message]) -> None:
    """A system prompt or none, then user and assistant in turn, an answer last."""
    first = 1 if messages and messages[0]["role"] == "system" else 0
    for number, message in enumerate(messages[first:]):
        expected = ("user", "assistant")[number % 2]
        if message["role"] != expected:
            raise BadConversation(
                f"roles out of order: message {first + number + 1} is of {message['role']}, expected {expected}"
            )
    if len(messages) == first:
        raise BadConversation("holds no question and answer")
    if messages[-1]["role"] != "assistant":
        raise BadConversation("ends with a question that has no answer")


def _kind(value: Any) -> str:
    """What a JSON value is, for people."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")


def read_conversations(path: str, bad: Callable[[UsageError], None]) -> Iterator[Conversation]:
    """Conversations of a file: JSON lines or one JSON list, plain or compressed (gz, zst, xz, bz2).

    Args:
        path: of the file.
        bad: called with an error that names file and line for each bad one, which is then passed over; it may raise.

    Raises:
        UsageError: the file cannot be read, or is no JSON at all.
    """
    for place, content in _records(path):
        try:
            yield Conversation(parse(orjson.loads(content) if isinstance(content, bytes) else content), place)
        except orjson.JSONDecodeError as error:
            bad(UsageError(f"{place}: not JSON: {error}; mend it, or pass such lines over with --skip-bad-lines"))
        except BadConversation as error:
            bad(UsageError(f"{place}: {error}; mend it, or pass such lines over with --skip-bad-lines"))


def _records(path: str) -> Iterator[tuple[str, Any]]:
    """Place and content of every record: bytes of a line, or the parsed entry of a list."""
    try:
        with open(path, "rb") as file:
            stream, _ = decompressed(io.BufferedReader(file))  # type: ignore[arg-type]
            if stream.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                entries = orjson.loads(stream.read().removeprefix(b"\xef\xbb\xbf"))
                yield from ((f"{path}, entry {number}", entry) for number, entry in enumerate(entries, 1))
                return
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield f"{path}, line {number}", line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except orjson.JSONDecodeError as error:
        raise UsageError(f"{path}: begins like a JSON list, but is none: {error}") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except DamagedError as error:
        raise UsageError(f"{path}: damaged or truncated compressed file: {error}") from error
