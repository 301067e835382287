"""Small JSON files that are read back: their structure is checked before anything in them is used."""

import json
from pathlib import Path
from types import UnionType
from typing import Any, get_args

from megatron_meap.errors import UsageError, one_line


def read_json(path: str | Path, shape: Any, remedy: str) -> Any:
    """The content of a JSON file.

    Args:
        path: the file.
        shape: the structure it must have (see `misfit`).
        remedy: what to do otherwise, for the error.

    Raises:
        UsageError: it cannot be read, is not JSON, or has another structure; the message says where.
        FileNotFoundError: there is no such file.
    """
    try:
        return parsed(Path(path).read_bytes(), shape)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise UsageError(f"{path}: cannot be read: {reason}; {remedy}") from error


def parsed(content: bytes, shape: Any) -> Any:
    """The value of JSON text of a known shape.

    Raises:
        ValueError: it is not JSON, or has another shape; the message says where.
    """
    try:
        value = json.loads(content.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if wrong := misfit(value, shape):
        raise ValueError(wrong)
    return value


def misfit(value: Any, shape: Any, at: str = "") -> str | None:
    """Where a JSON value does not have a shape, in a few words; None if it has.

    A shape is a type (`int`, `int | None`; true is not a number), `[shape]` for a list of any length, `(shape, shape)`
    for one of this length, `{str: shape}` for an object with any keys, or `{"key": shape}` for one that has at least
    these keys; `"key?"` may be missing.
    """
    if isinstance(shape, type | UnionType):
        fits = bool in (get_args(shape) or (shape,)) if isinstance(value, bool) else isinstance(value, shape)
        return None if fits else _differs(at, shape, value)
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return _differs(at, dict, value)
        names = dict.fromkeys(value, shape[str]) if str in shape else shape
        for name, part in names.items():
            key, place = name.removesuffix("?"), f"{at}.{name}".strip(".?")
            if key not in value and key == name:
                return f"{place} is missing"
            if key in value and (wrong := misfit(value[key], part, place)):
                return wrong
        return None
    if not isinstance(value, list) or (isinstance(shape, tuple) and len(value) != len(shape)):
        return _differs(at, list if isinstance(shape, list) else f"list of {len(shape)}", value)
    parts = shape * len(value) if isinstance(shape, list) else shape
    found = (misfit(each, part, f"{at}[{i}]") for i, (each, part) in enumerate(zip(value, parts, strict=True)))
    return next(filter(None, found), None)


def _differs(at: str, expected: Any, value: Any) -> str:
    kind = expected.__name__ if isinstance(expected, type) else str(expected)
    return f"{at or 'the whole'} is {type(value).__name__}, not {kind}".replace("NoneType", "None").replace(
        "None", "null"
    )
