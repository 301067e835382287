"""Garbage collection without objects that live as long as the process."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def nothing_is_garbage() -> Iterator[None]:
    """No garbage collection during imports and the loading of vocabularies, which create half a million objects.

    Scanning them would cost a sixth more time. They are not scanned later either, here or in a forked process, where
    that would copy them.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
