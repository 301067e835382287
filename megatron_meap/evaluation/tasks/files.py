"""Input files of the tasks: text or JSON Lines, plain or compressed; errors name the line."""

import io
import json
from collections.abc import Iterator
from typing import Any

from megatron_meap.errors import UsageError, refusing
from megatron_meap.preprocessing.streams import DamagedError, decompressed


def lines(path: str, flag: str) -> Iterator[tuple[str, str]]:
    """Places (`file:line`) and lines of a UTF-8 file.

    Args:
        path: the file; gzip, zstd, xz and bzip2 are recognised by their content.
        flag: what to call it in an error.

    Raises:
        UsageError: it cannot be read.
    """
    with (
        refusing(f"{flag} {path}: cannot be read", OSError, UnicodeDecodeError, DamagedError),
        open(path, "rb") as raw,
        io.TextIOWrapper(decompressed(raw)[0], encoding="utf-8") as file,
    ):
        for number, line in enumerate(file, 1):
            yield f"{path}:{number}", line


def rows(path: str, flag: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Places (`file:line`) and objects of a JSON Lines file; empty lines are skipped.

    Raises:
        UsageError: it cannot be read, or a line is not a JSON object.
    """
    for place, line in lines(path, flag):
        if not line.strip():
            continue
        with refusing(f"{flag} {place}: not JSON", json.JSONDecodeError):
            row = json.loads(line)
        if not isinstance(row, dict):
            raise UsageError(f"{flag} {place}: expected a JSON object")
        yield place, row
