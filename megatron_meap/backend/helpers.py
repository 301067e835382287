"""Megatron's helper processes, such as the writer of checkpoints, end with their rank: they import this module."""

import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

from megatron_meap.backend.patching import replace
from megatron_meap.errors import UsageError


def end_with_this_process() -> None:
    """Let all `multiprocessing` processes that this one starts from now on end with it, even if it is killed.

    Otherwise each would wait for work forever, with hundreds of megabytes.
    """

    def watched(start: Callable) -> Callable:
        def watch_and_start(process: Any) -> None:
            if process._target is not None:
                process._target = partial(_beside_the_parent, process._target)
            start(process)

        return watch_and_start

    replace(BaseProcess, "start", watched)


class _InBytes:
    """A queue of Megatron's that hands on what it is given as bytes, which the process in between need not read."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, item: Any) -> None:
        self._queue.put(pickle.dumps(item))

    def get_nowait(self) -> Any:
        return pickle.loads(self._queue.get_nowait())


def say_results_in_bytes() -> None:
    """The first save of a rank waits two seconds for a process that only keeps the names of what was written.

    It is `multiprocessing`'s manager of a queue, and imports PyTorch to build the objects that are put into it.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    replace(
        filesystem_async,
        "get_write_results_queue",
        lambda original: lambda *args, **more: _InBytes(original(*args, **more)),
    )


def notice_a_killed_one() -> None:
    """A run whose saving process is killed ends in one line: Megatron waits for it without end.

    Raises (in the run):
        UsageError: it has ended before the save was done.
    """
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    def while_it_lives(is_done: Callable) -> Callable:
        def asked(self: Any, blocking: bool = False, no_dist: bool = False) -> bool:
            worker = self.process
            while worker is not None and self.cur_item is None and self._persistent_comp_q.empty():
                if not worker.is_alive():
                    self._persistent_queue.cancel_join_thread()  # it may not have read its orders, and never will
                    raise UsageError(
                        f"--async-save: the process that saves has ended with status {worker.exitcode} (negative: "
                        "killed by that signal, perhaps for lack of memory); that save is lost, earlier ones are whole"
                    )
                if not blocking:
                    break
                time.sleep(0.1)
            return is_done(self, blocking, no_dist)

        return asked

    replace(PersistentAsyncCaller, "is_current_async_call_done", while_it_lives)


def _beside_the_parent(target: Callable, *args: Any, **kwargs: Any) -> None:
    """In the new process: its target, and a thread that watches the parent."""
    threading.Thread(target=_end_after_the_parent, daemon=True, name="parent").start()
    target(*args, **kwargs)


def _end_after_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
