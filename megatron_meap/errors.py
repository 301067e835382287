"""What is wrong with the user's input, said in one line: a traceback is for our own bugs only."""

import os
import sys
from collections.abc import Callable


class UsageError(Exception):
    """Input, flags or files that cannot be used.

    The message is one line that names the file or flag, says what is wrong with it and what to do.
    """


def run(main: Callable[[], None]) -> None:
    """Run a command's ``main``; turn what a user can mend into one line and a non-zero exit status.

    Exit status: 0 success, 2 a `UsageError`, 130 interrupted by Ctrl-C. Other exceptions pass through.
    """
    try:
        main()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away (`tool | head`): nothing is wrong, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
