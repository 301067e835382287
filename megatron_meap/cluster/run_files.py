"""Files in the directory given to `--save` by which people and scripts communicate with a run.

touch checkpoints/save     saves a checkpoint after the current step
touch checkpoints/stop     the same, and the run ends with status 0
checkpoints/heartbeat      written by rank 0 while the run is alive: JSON, whose age tells whether the run hangs
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from megatron_meap.errors import UsageError
from megatron_meap.records import parsed

SAVE, STOP, HEARTBEAT = "save", "stop", "heartbeat"
SCRIPTS = "MEAP_HEARTBEAT"
"""Environment variable: a second place for the heartbeat, for the script that started the run."""

TRAINING, ENDED, FINISHED = "training", "ended", "finished"
"""States of a heartbeat; a run that has ended may be started again, a finished one has done its last step."""

_LOOK_S, _BEAT_S = 1.0, 10.0


def refuse_a_stop(save: str | None) -> None:
    """Refuse to start if there is a stop file, which would end the run at once.

    Raises:
        UsageError: names it.
    """
    if save is not None and (path := Path(save) / STOP).exists():
        raise UsageError(f"{path}: asks this run to stop; remove it to train")


class Requests:
    """Requests by files in a directory, as rank 0 sees them; without a directory there are none."""

    def __init__(self, folder: str | None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._next = 0.0

    def asked(self) -> tuple[bool, bool]:
        """Whether to save, and whether to stop; the files are checked at most once a second."""
        if self._folder is None or time.monotonic() < self._next:
            return False, False
        self._next = time.monotonic() + _LOOK_S
        return (self._folder / SAVE).exists(), (self._folder / STOP).exists()

    def remove(self) -> None:
        """Remove the files once their requests are fulfilled; files that cannot be removed are ignored from then on."""
        assert self._folder is not None
        try:
            for name in (SAVE, STOP):
                (self._folder / name).unlink(missing_ok=True)
        except OSError as error:
            print(
                f"warning: {error.filename}: cannot be removed ({error.strerror}) and is ignored from now on",
                flush=True,
            )
            self._folder = None


class Heartbeat:
    """Written by rank 0 with each micro batch, at most every ten seconds, if there is a directory."""

    def __init__(self, folder: str | None) -> None:
        self._paths = [Path(folder) / HEARTBEAT] if folder is not None else []
        self._paths += [Path(os.environ[SCRIPTS])] if SCRIPTS in os.environ else []
        self._next = 0.0
        self._step = 0

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Write how the block ended."""
        state = ENDED
        try:
            yield
            state = FINISHED
        finally:
            self._write(state)

    def beat(self, step: int) -> None:
        """Note that the run is alive, in this step."""
        self._step = step
        if self._paths and time.monotonic() >= self._next:
            self._next = time.monotonic() + _BEAT_S
            self._write(TRAINING)

    def _write(self, state: str) -> None:
        content = {
            "state": state, "step": self._step, "time": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
            "process": os.getpid(), "host": socket.gethostname(),
        }  # fmt: skip
        for path in self._paths:
            with contextlib.suppress(OSError):  # a full disk must not end a training
                new = path.with_name(f".{path.name}.new")
                new.write_text(json.dumps(content) + "\n")
                new.replace(path)


def state_of(folder: Path) -> tuple[str, float] | None:
    """State of the run that saves there, and its age in seconds; None without a heartbeat."""
    path = folder / HEARTBEAT
    try:
        return parsed(path.read_bytes(), {"state": str})["state"], time.time() - path.stat().st_mtime
    except (OSError, ValueError):
        return None
