"""Within torchrun: a short message when a training of ours ends, instead of thirty lines of torchrun's own traceback.

torchrun loads this module itself, as a plugin of the entry point group `torchrun.handlers` (pyproject.toml); for other
scripts it changes nothing. What a rank has already reported (`megatron_meap.errors`) is not repeated.
"""

import atexit
import contextlib
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from megatron_meap.errors import LAST_STATUS

_OURS = ("pretrain_gpt_meap.py", "inspect_batches.py")
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
_SHUTDOWN_S = "600"
"""Seconds that the ranks have for a last checkpoint; torchrun would kill them after 30 s."""


_TALKERS = ("multiprocessing.api", "multiprocessing.errors.error_handler", "agent.server.api")
_SAID_BETTER = re.compile(
    "OMP_NUM_THREADS|closing signal|via signal|death signal|termination signal|failed .exitcode|no error file defined"
)


def handler() -> Callable[[Any], Any]:
    """The plugin: prepares torchrun, and gives it the rendezvous backend `meap`, which is its own `c10d`."""
    if _launches_us(sys.orig_argv):
        _prepare()
    from torch.distributed.elastic.rendezvous.registry import _create_c10d_handler

    return _create_c10d_handler


def _launches_us(command: list[str]) -> bool:
    """Whether a command line runs one of our scripts or modules with torchrun."""
    launcher = next((i for i, word in enumerate(command[:6]) if _is_torchrun(word)), None)
    return launcher is not None and any(
        Path(word).name in _OURS or word.startswith("megatron_meap.") for word in command[launcher + 1 :]
    )


def _is_torchrun(word: str) -> bool:
    return Path(word).name == "torchrun" or word in ("torch.distributed.run", "torch.distributed.launch")


def _prepare() -> None:
    """Set torchrun's defaults, which its flags override, and replace its final messages."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # nohup: torchrun would end all the same
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", _SIGNALS.replace("SIGHUP,", "") if ignored else _SIGNALS)
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", _SHUTDOWN_S)
    for name in ("run", *(f"elastic.{each}" for each in _TALKERS)):
        logging.getLogger(f"torch.distributed.{name}").addFilter(
            lambda record: not _SAID_BETTER.search(str(record.msg))
        )
    folder = Path(tempfile.mkdtemp(prefix="meap-torchrun-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[LAST_STATUS] = str(folder / "status")
    _mark_signals()
    sys.excepthook = _say


def _mark_signals() -> None:
    """Tell the ranks that torchrun has received a signal, before it passes it on to them (`passes_on`)."""
    from torch.distributed.elastic.multiprocessing import api

    handle = api._terminate_process_handler

    def mark_and_handle(signum: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):
            _mark().touch()
        handle(signum, frame)

    api._terminate_process_handler = mark_and_handle


def _mark() -> Path:
    return Path(os.environ[LAST_STATUS]).with_name("signal")


def passes_on() -> bool:
    """Whether this rank's torchrun has received a signal, which it passes on to the rank once more, now or soon."""
    return LAST_STATUS in os.environ and _mark().exists()


def _say(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Python's hook for what ends torchrun: one line, if the ranks have printed none, and the ranks' own status."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    status = None
    with contextlib.suppress(OSError, ValueError):
        status = int(Path(os.environ[LAST_STATUS]).read_text())
    if isinstance(error, SignalException):
        sys.exit(128 + error.sigval if status is None else status)
    if not isinstance(error, ChildFailedError):
        sys.__excepthook__(kind, error, traceback)
        sys.exit(1)
    rank, failure = error.get_first_failure()
    if status is None:
        how = (
            f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with status {failure.exitcode}"
        )
        hint = " (the system does this when memory runs out)" if failure.exitcode == -signal.SIGKILL else ""
        print(f"error: rank {rank} (process {failure.pid}) {how}{hint}; its output is above", file=sys.stderr)
    sys.exit(status or 1)
