"""Python's looking for garbage, kept away from what stays as long as the process."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def nothing_is_garbage() -> Iterator[None]:
    """While imports and vocabularies make half a million objects that stay: looking through them costs a sixth more.

    Nor are they ever looked through later, here or in a forked process, whose copies of them it would make.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
