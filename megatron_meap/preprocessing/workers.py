"""Worker processes: answers come back in order, and the death of a process is noticed at once.

Each process is served by a thread of the parent, which sends a task, waits for the answer, and sees the pipe close if
the process dies. (A `multiprocessing.Pool`, as in Megatron-LM's tool, would wait forever.)
"""

import mmap
import multiprocessing
import pickle
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
_SHARED_BYTES = 16 << 20
"""Memory that each worker shares with the parent; only what is used of it is taken."""


class WorkerPool[Task, Answer]:
    """`size` forked processes that each call `work(task)`; create it before starting any thread.

    Use it as a context manager: leaving it ends the processes.
    """

    def __init__(self, work: Callable[[Task], Answer], size: int) -> None:
        """Start the processes.

        Raises:
            UsageError: the system does not allow so many.
        """
        self.size = size
        self._workers: list[_Worker] = []
        try:
            for number in range(size):
                self._workers.append(_Worker(work, number))
        except OSError as error:  # open files, processes or memory
            for worker in self._workers:
                worker.end()
            raise UsageError(
                f"--workers {size}: only {len(self._workers)} could be started: {error.strerror}; use fewer, or raise "
                "the limit (ulimit -a shows it)"
            ) from error

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
        ours, theirs = _FORK.Pipe()
        shared = mmap.mmap(-1, _SHARED_BYTES)
        self._channel = _Channel(ours, shared)
        self._number = number
        served = _Channel(theirs, shared), ours, work
        self._process = _FORK.Process(target=_serve_until_closed, args=served, daemon=True)
        self._process.start()
        theirs.close()  # so that the pipe closes when the process dies

    def ask(self, task: Any) -> Any:
        try:
            self._channel.send(task)
            answer = self._channel.receive()
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


class _Channel:
    """One end of a pipe beside which buffers go through memory that both ends share: the pipe takes ten times as long.

    The ends take turns, so the one that is read from is done with that memory. Buffers are what pickle's protocol 5
    leaves out: arrays, and what is wrapped in a `pickle.PickleBuffer`. Those that have no room go through the pipe.
    """

    def __init__(self, connection: Any, shared: mmap.mmap) -> None:
        self._connection = connection
        self._shared = shared

    def send(self, value: Any) -> None:
        buffers: list[pickle.PickleBuffer] = []
        message = pickle.dumps(value, 5, buffer_callback=buffers.append)
        views = [buffer.raw() for buffer in buffers]
        ends, end = [], 0
        for view in views:
            fits = end + len(view) <= len(self._shared)
            if fits:
                self._shared[end : end + len(view)] = view
                end += len(view)
            ends.append(end if fits else None)
        self._connection.send((message, ends))
        for view, fitted in zip(views, ends, strict=True):
            if fitted is None:
                self._connection.send_bytes(view)

    def receive(self) -> Any:
        message, ends = self._connection.recv()
        buffers, start = [], 0
        for end in ends:
            buffers.append(self._connection.recv_bytes() if end is None else self._shared[start:end])
            start = start if end is None else end
        return pickle.loads(message, buffers=buffers)


def _serve_until_closed(channel: _Channel, parents_end: Any, work: Callable[[Any], Any]) -> None:
    """Run a worker: answer tasks until the parent closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parents_end.close()
    while True:
        try:
            task = channel.receive()
        except (EOFError, ConnectionError):
            return
        try:
            answer = work(task)
        except Exception as error:
            if not isinstance(error, UsageError):
                error.add_note("in a preprocessing worker:\n" + traceback.format_exc())
            answer = error
        try:
            channel.send(answer)
        except ConnectionError:
            return
