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
"""A signal may reach a rank by more ways than one, as from Slurm and from a script that it started."""
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Takes the place of Megatron's signal handler, which knows one signal; its trainer asks it after every step.

    The first SIGTERM, SIGUSR1, SIGINT or SIGHUP (a closed terminal) asks for a checkpoint and an orderly end; a second
    one, later than ten seconds after it, ends the process at once with status 128 + signal. What torchrun sends on is
    no second one, however late: on a busy machine it takes its time. Before the end of the first step there is nothing
    to save, and ranks wait for each other: the first signal ends the process.
    """

    def __init__(self, requests: Requests) -> None:
        """`requests` are the files that ask the same; only rank 0's counts."""
        self.received: int | None = None
        """The signal that came to this rank."""

        self.stopping = self.stop_asked = self.save_asked = False
        """What all ranks know since the last `poll`: whether the job stops, a file asks it to, or asks to save."""

        self._requests = requests

        self._received_at = 0.0
        self._launcher = os.getppid()
        self._sent_on = False  # by torchrun, and come to this rank
        self._stepped = False

    def install(self) -> "StopRequest":
        """Start listening; also when the launcher dies, by whatever signal, which would leave the ranks behind."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        # A rank that waits in a collective runs no Python code, hence no handler: but Python writes the number of a
        # signal to this socket at once, and another thread can act on it.
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
        """Take the first signal as the request, and a later one as the end of patience."""
        now = time.monotonic()
        if not self._stepped:
            _leave(number)
        elif self.received is None:
            self._received_at, self.received = now, number
        elif not self._sent_on and torchrun.passes_on() and os.getppid() == self._launcher:
            self._sent_on = True  # else torchrun's end has sent it
        elif now - self._received_at > _SAME_REQUEST_S:
            os._exit(128 + number)

    def poll(self) -> bool:
        """Let all ranks, which call this together, know of signals and files; whether a file asks for a checkpoint."""
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
        """What the files asked for is done."""
        if torch.distributed.get_rank() == 0 and (self.save_asked or self.stop_asked):
            self._requests.remove()

    def signals_received(self) -> list[bool]:
        """What Megatron asks for: whether to save and leave."""
        return [self.stopping]


def _leave(number: int) -> None:
    """End this process, of which nothing is to be saved."""
    if os.environ.get("RANK", "0") == "0":
        name = signal.Signals(number).name
        print(f"stopped by {name} before the end of the first step: nothing is lost, the same command starts again")
        sys.stdout.flush()
    note_status(EXIT_STOPPED)
    os._exit(EXIT_STOPPED)
