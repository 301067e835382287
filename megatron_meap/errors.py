"""Errors in the user's input, reported in one line: a traceback means a bug of our own."""

import contextlib
import io
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

# Usually all ranks meet the same error: rank 0 prints it and exits, and torchrun ends the others before they repeat it.
# An error on another rank only is printed by that rank, a little later.
_RANK_ZERO_SPEAKS_FIRST_S = 3.0

_REQUIRED = ("torch", "megatron", "numpy", "sentencepiece", "tokenizers", "transformers")
"""If one of these is missing, the wrong Python was started, or nothing was installed."""

_INTERRUPTED = 130
"""Exit status after Ctrl-C, as of a shell."""

LAST_STATUS = "MEAP_LAST_STATUS"
"""Environment variable: a file that the first rank to end on a host writes its exit status to (cluster/torchrun.py)."""


class UsageError(Exception):
    """Input, flags or files that cannot be used.

    The message is one line that names the file or flag, says what is wrong with it and what to do.
    """


class JobError(Exception):
    """A failure that neither the input nor this code caused, such as a lost host; the message is one line."""


def refuse(*checks: tuple[object, str]) -> None:
    """Raise a `UsageError` for the first check that is true; each is a pair of a condition and a message."""
    for wrong, message in checks:
        if wrong:
            raise UsageError(message)


@contextlib.contextmanager
def refusing(message: str, *kinds: type[Exception], remedy: str = "") -> Iterator[None]:
    """Make errors of files and libraries a `UsageError`: `MESSAGE (reason); REMEDY`.

    Args:
        message: names the file or flag, and says what is wrong with it.
        kinds: the errors to convert; all if none is given. A `UsageError` passes through.
        remedy: what to do.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UsageError) or not isinstance(error, kinds or Exception):
            raise
        reason = getattr(error, "strerror", None) or one_line(error)
        reason = f"no {reason}" if isinstance(error, KeyError) else reason
        raise UsageError(f"{message} ({reason})" + (f"; {remedy}" if remedy else "")) from error


def refuse_to_overwrite(flag: str, path: str | Path, overwrite: bool) -> None:
    """Refuse to replace an existing output without `--overwrite`."""
    if Path(path).exists() and not overwrite:
        raise UsageError(f"{flag} {path}: already exists; name another one, or add --overwrite to replace it")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and all that led to it, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def one_line(error: BaseException, most: int = 200) -> str:
    """The message of an exception in at most `most` characters; if it is empty, the line of code that raised it."""
    said = " ".join(str(error).split()) or type(error).__name__
    if said == type(error).__name__ and (frames := traceback.extract_tb(error.__traceback__)):
        said = f"{said} at `{' '.join((frames[-1].line or '').split())}`"
    return said if len(said) <= most else said[: most - 3] + "..."


def shown(text: object) -> str:
    """Text such as a file name, with characters that break a line or move the cursor escaped."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in str(text))


def run(main: Callable[[], None]) -> None:
    """Run a command's ``main``; turn what a user can fix into one line and a non-zero exit status.

    Under torchrun the line is in `$TORCHELASTIC_ERROR_FILE` too, which torchrun shows as the root cause.

    Exit status: 0 success, 1 a `JobError` or no memory left, 2 a `UsageError`, 130 interrupted by Ctrl-C. Other
    exceptions pass through.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # `>&-`: the next file that is opened would have its number
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # so that a name that is not UTF-8 can be printed
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except UsageError as error:
        # A data loader's worker process sends its traceback along; the message is at the end.
        message = re.split(r"^megatron_meap[\w.]+: ", str(error).strip(), flags=re.MULTILINE)[-1]
        _leave(f"error: {shown(message)}", 2)
    except JobError as error:
        _leave(f"error: {error}", 1)
    except MemoryError as error:
        _leave(f"error: out of memory: {one_line(error)}", 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output closed it (`tool | head`): nothing is wrong, and nothing more can be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _REQUIRED:
            raise
        _leave(
            f"error: {sys.executable} has no {error.name}: `source .venv/bin/activate` in the checkout, after `make`", 2
        )
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None and (reason := _output_problem()):
            _leave(f"error: standard output cannot be written: {reason}; what the command wrote elsewhere is kept", 1)
        _tell_torchrun(traceback.format_exc())
        raise


def _output_problem() -> str | None:
    """Why nothing more can be printed, as on a full disk; the output goes nowhere from then on."""
    try:
        print(flush=True)  # where nothing is buffered, a flush alone would not tell
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return one_line(error)
    return None


def end_at_once(*_: object) -> None:
    """Handler of Ctrl-C while there is nothing to lose: an exception in the middle of an import may become another."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, b"interrupted\n")
    note_status(_INTERRUPTED)
    os._exit(_INTERRUPTED)


def _leave(line: str, status: int) -> NoReturn:
    """Print a line once on this host, and exit with a status."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_RANK_ZERO_SPEAKS_FIRST_S)
    if _tell_torchrun(line):
        print(line, file=sys.stderr, flush=True)
    note_status(status)
    sys.exit(status)


def _tell_torchrun(message: str) -> bool:
    """Write this rank's error file for torchrun; False where another rank of this host wrote the same to its own."""
    if (name := os.environ.get("TORCHELASTIC_ERROR_FILE")) is None:
        return True
    own = Path(name)  # .../RANK/error.json
    extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
    content = json.dumps({"message": {"message": message, "extraInfo": extra}})
    new = True
    with contextlib.suppress(OSError):
        new = all(
            json.loads(each.read_text())["message"]["message"] != message
            for each in own.parent.parent.glob("*/error.json")
        )
        own.write_text(content)
    return new


def note_status(status: int) -> None:
    """Let torchrun end with this exit status, if it is running one of our scripts (cluster/torchrun.py)."""
    if LAST_STATUS in os.environ:
        with contextlib.suppress(OSError), open(os.environ[LAST_STATUS], "x") as file:
            file.write(str(status))
