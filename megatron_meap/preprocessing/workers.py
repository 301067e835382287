"""Worker processes: answers come back in order, and the death of a process is noticed at once.

Each process is served by a thread of the parent, which sends a task, waits for the answer, and sees the pipe close if
the process dies. (A `multiprocessing.Pool`, as in Megatron-LM's tool, would wait forever.)
"""

import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

from megatron_meap.errors import UsageError

_FORK = multiprocessing.get_context("fork")  # workers inherit the loaded tokenizer and its warm caches
_GONE = object()  # the answer of a worker that has died


class WorkerPool[Task, Answer]:
    """`size` forked processes that each call `work(task)`; create it before starting any thread.

    Use it as a context manager: leaving it ends the processes.
    """

    def __init__(self, work: Callable[[Task], Answer], size: int) -> None:
        self.size = size
        self._workers = [_Worker(work, number) for number in range(size)]

    def __enter__(self) -> "WorkerPool[Task, Answer]":
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(self.size, thread_name_prefix="worker")
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            worker.end()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def map[Tag](self, tasks: Iterable[tuple[Tag, Task]]) -> Iterator[tuple[Tag, Answer]]:
        """Answers in the order of the tasks, each with its task's tag.

        Memory is bounded: each worker has at most two tasks at a time.

        Raises:
            UsageError: a worker died; the message says why.
        """
        under_way: deque[tuple[Tag, Future[Answer]]] = deque()
        for tag, task in tasks:
            under_way.append((tag, self._threads.submit(self._serve, task)))
            while under_way and (len(under_way) >= 2 * self.size or under_way[0][1].done()):
                first, future = under_way.popleft()
                yield first, future.result()
        for tag, future in under_way:
            yield tag, future.result()

    def _serve(self, task: Task) -> Answer:
        worker = self._idle.get()
        try:
            return worker.ask(task)
        finally:
            self._idle.put(worker)


class _Worker:
    def __init__(self, work: Callable[[Any], Any], number: int) -> None:
        self._connection, theirs = _FORK.Pipe()
        self._number = number
        self._process = _FORK.Process(target=_serve_until_closed, args=(theirs, self._connection, work), daemon=True)
        self._process.start()
        theirs.close()  # so that the pipe closes when the process dies

    def ask(self, task: Any) -> Any:
        try:
            self._connection.send(task)
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            answer = _GONE
        if answer is _GONE:  # not raised above: the frames of a failed send hold buffers that crash Python at exit
            self._process.join(5)
            raise UsageError(f"worker {self._number} {_cause(self._process.exitcode)}")
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def end(self) -> None:
        self._process.terminate()
        self._process.join()


def _cause(exitcode: int | None) -> str:
    """Why a process ended, in words."""
    if exitcode is None or exitcode >= 0:
        return f"ended with status {exitcode}"
    name = signal.Signals(-exitcode).name
    hint = " (out of memory? use fewer --workers)" if -exitcode == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


def _serve_until_closed(connection: Any, parents_end: Any, work: Callable[[Any], Any]) -> None:
    """Run a worker: answer tasks until the parent closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parents_end.close()
    while True:
        try:
            task = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            answer = work(task)
        except Exception as error:
            if not isinstance(error, UsageError):
                error.add_note("in a preprocessing worker:\n" + traceback.format_exc())
            answer = error
        try:
            connection.send(answer)
        except ConnectionError:
            return
