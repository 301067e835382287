"""Checks of single fields of a record, which raise `BadConversation`."""

import json
from typing import Any


class BadConversation(ValueError):
    """A conversation that cannot be trained on; the message says why, without file and line."""


def text(fields: dict, name: str) -> str:
    """A required field that must be a string."""
    if name not in fields:
        raise BadConversation(f"has no {name!r}")
    if not isinstance(fields[name], str):
        raise BadConversation(f"has {kind(fields[name])} as {name!r}, not a string")
    return fields[name]


def parsed(written: str, name: str) -> Any:
    """The value of a field that is JSON within JSON."""
    try:
        return json.loads(written)
    except (ValueError, RecursionError):
        raise BadConversation(f"has {name!r} that is not JSON") from None


def kind(value: Any) -> str:
    """The kind of a JSON value, for messages."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")
