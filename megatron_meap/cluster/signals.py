"""Stopping a job from outside: a signal to any rank or to the launcher, or a file, makes all ranks save together."""

import ctypes
import os
import signal
import socket
import sys
import threading
import time

import torch

from megatron_meap.cluster import torchrun
from megatron_meap.cluster.run_files import Requests
from megatron_meap.errors import note_status

EXIT_STOPPED = 75
"""Exit status of a rank stopped by a signal, after its checkpoint is saved (EX_TEMPFAIL: run it again later)."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_SAME_REQUEST_S = 10.0
"""A signal may reach a rank in several ways, such as from Slurm and from the script that it runs."""
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Replaces Megatron's signal handler, which knows only one signal; its trainer asks it after every step.

    The first SIGTERM, SIGUSR1, SIGINT or SIGHUP (a closed terminal) asks for a checkpoint and an orderly end; a second
    one, more than ten seconds later, ends the process at once with status 128 + signal. A signal passed on by torchrun
    does not count as a second one, however late: on a busy machine it takes time. Before the end of the first step
    there is nothing to save, and ranks wait for each other: the first signal ends the process.
    """

    def __init__(self, requests: Requests) -> None:
        """`requests` are those by files; only rank 0's count."""
        self.received: int | None = None
        """The signal that this rank received."""

        self.stopping = self.stop_asked = self.save_asked = False
        """Known to all ranks since the last `poll`: whether the job stops, or a file asks to stop or to save."""

        self._requests = requests

        self._received_at = 0.0
        self._launcher = os.getppid()
        self._sent_on = False  # by torchrun, and received by this rank
        self._stepped = False

    def install(self) -> "StopRequest":
        """Start listening; if the launcher dies, the ranks get a signal as well instead of being orphaned."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        # A rank that waits in a collective runs no Python code, and so no handler: but Python writes the number of a
        # signal to this socket at once, and another thread can react.
        signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a worker's signals are its own
        threading.Thread(target=self._listen, args=(reader,), daemon=True, name="signals").start()
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # under nohup
            signal.signal(number, lambda *_: None)
        if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        return self

    def _listen(self, reader: socket.socket) -> None:
        while True:
            for number in reader.recv(64):
                if number in SIGNALS:
                    self._note(number)

    def _note(self, number: int) -> None:
        """Treat the first signal as the request, and a later one as the order to end at once."""
        now = time.monotonic()
        if not self._stepped:
            _leave(number)
        elif self.received is None:
            self._received_at, self.received = now, number
        elif not self._sent_on and torchrun.passes_on() and os.getppid() == self._launcher:
            self._sent_on = True  # otherwise the death of torchrun sent it
        elif now - self._received_at > _SAME_REQUEST_S:
            os._exit(128 + number)

    def poll(self) -> bool:
        """Share signals and files among all ranks, which call this together; returns whether a file asks to save."""
        self._stepped = True
        save, stop = self._requests.asked()
        news = torch.tensor([self.received or 0, save, stop], dtype=torch.int32, device=torch.cuda.current_device())
        torch.distributed.all_reduce(news, op=torch.distributed.ReduceOp.MAX)
        number, *asked = news.tolist()
        self.save_asked, self.stop_asked = map(bool, asked)
        self.stopping = number > 0 or self.stop_asked
        if number and self.received is None:
            self.received = number
        return self.save_asked

    def honoured(self) -> None:
        """Remove the files once their requests are fulfilled."""
        if torch.distributed.get_rank() == 0 and (self.save_asked or self.stop_asked):
            self._requests.remove()

    def signals_received(self) -> list[bool]:
        """Called by Megatron: whether to save and exit."""
        return [self.stopping]


def _leave(number: int) -> None:
    """End this process without saving."""
    if os.environ.get("RANK", "0") == "0":
        name = signal.Signals(number).name
        print(f"stopped by {name} before the end of the first step: nothing is lost, the same command starts again")
        sys.stdout.flush()
    note_status(EXIT_STOPPED)
    os._exit(EXIT_STOPPED)
