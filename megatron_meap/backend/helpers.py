"""Megatron's helper processes, as the one that writes checkpoints, end with their rank; light, for they import this."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

from megatron_meap.backend.patching import replace


def end_with_this_process() -> None:
    """Let all processes of `multiprocessing` that this one starts from now on end with it, even where it is killed.

    By itself each waits for work without end, and holds hundreds of megabytes.
    """

    def watched(start: Callable) -> Callable:
        def watch_and_start(process: Any) -> None:
            if process._target is not None:
                process._target = partial(_beside_the_parent, process._target)
            start(process)

        return watch_and_start

    replace(BaseProcess, "start", watched)


def _beside_the_parent(target: Callable, *args: Any, **kwargs: Any) -> None:
    """In the new process: what it is for."""
    threading.Thread(target=_end_after_the_parent, daemon=True, name="parent").start()
    target(*args, **kwargs)


def _end_after_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
