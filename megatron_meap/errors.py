"""What is wrong with the user's input, said in one line: a traceback is for our own bugs only."""

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Mostly all ranks meet the same error: rank 0 says it and leaves, whereupon torchrun ends the others before they
# repeat it. An error of another rank alone is said by that rank, a little later.
_RANK_ZERO_SPEAKS_FIRST_S = 3.0


class UsageError(Exception):
    """Input, flags or files that cannot be used.

    The message is one line that names the file or flag, says what is wrong with it and what to do.
    """


class JobError(Exception):
    """What ends a job through no fault of its input or of this code, as a host that is gone; one line says it."""


def refuse_to_overwrite(flag: str, path: str | Path, overwrite: bool) -> None:
    """Refuse an output that is there already, unless `--overwrite` says that it is meant."""
    if Path(path).exists() and not overwrite:
        raise UsageError(f"{flag} {path}: is there already; name another one, or add --overwrite to replace it")


def one_line(error: BaseException, most: int = 200) -> str:
    """What an exception says, as one line of at most `most` characters; its type where it says nothing."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= most else said[: most - 3] + "..."


def run(main: Callable[[], None]) -> None:
    """Run a command's ``main``; turn what a user can mend into one line and a non-zero exit status.

    Exit status: 0 success, 1 a `JobError`, 2 a `UsageError`, 130 interrupted by Ctrl-C. Other exceptions pass through.
    """
    try:
        main()
    except UsageError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(_RANK_ZERO_SPEAKS_FIRST_S)
        # A data loader's worker process sends its traceback along; the last line is the message.
        message = str(error).strip().splitlines()[-1]
        message = re.sub(r"^megatron_meap[\w.]+: ", "", message)
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away (`tool | head`): nothing is wrong, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
