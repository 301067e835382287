"""Files in the directory given to `--save` by which people and scripts talk with a run.

touch checkpoints/save     a checkpoint after the running step
touch checkpoints/stop     the same, and the run ends with status 0
checkpoints/heartbeat      written by rank 0 while the run lives: JSON, and how old it is tells whether it hangs
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
"""Environment variable: where the heartbeat is written too, for the script that has started the run."""

TRAINING, ENDED, FINISHED = "training", "ended", "finished"
"""States of a heartbeat; what has ended may be started again, what is finished has done its last step."""

_LOOK_S, _BEAT_S = 1.0, 10.0


def refuse_a_stop(save: str | None) -> None:
    """Refuse to start where the file is there that would end the run at once.

    Raises:
        UsageError: names it.
    """
    if save is not None and (path := Path(save) / STOP).exists():
        raise UsageError(f"{path}: asks this run to stop; remove it to train")


class Requests:
    """What the files in a directory ask for, as rank 0 sees them; None is no directory."""

    def __init__(self, folder: str | None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._next = 0.0

    def asked(self) -> tuple[bool, bool]:
        """Whether to save, and whether to stop; it looks once a second at most."""
        if self._folder is None or time.monotonic() < self._next:
            return False, False
        self._next = time.monotonic() + _LOOK_S
        return (self._folder / SAVE).exists(), (self._folder / STOP).exists()

    def remove(self) -> None:
        """Remove the files, once what they ask for is done; those that cannot be removed are not looked at again."""
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
    """Written every ten seconds at most, by rank 0 where there is a directory, whenever a micro batch is computed."""

    def __init__(self, folder: str | None) -> None:
        self._paths = [Path(folder) / HEARTBEAT] if folder is not None else []
        self._paths += [Path(os.environ[SCRIPTS])] if SCRIPTS in os.environ else []
        self._next = 0.0
        self._step = 0

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Its state says how the block has ended."""
        state = ENDED
        try:
            yield
            state = FINISHED
        finally:
            self._write(state)

    def beat(self, step: int) -> None:
        """The run lives, in this step."""
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
            with contextlib.suppress(OSError):  # a full disk ends no training
                new = path.with_name(f".{path.name}.new")
                new.write_text(json.dumps(content) + "\n")
                new.replace(path)


def state_of(folder: Path) -> tuple[str, float] | None:
    """State of the run that saves there, and the seconds since it was written; None without a heartbeat."""
    path = folder / HEARTBEAT
    try:
        return parsed(path.read_bytes(), {"state": str})["state"], time.time() - path.stat().st_mtime
    except (OSError, ValueError):
        return None
