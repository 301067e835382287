"""The journal of a job: what it has finished, in case it is interrupted, and the lock against a second job."""

import contextlib
import fcntl
import json
import os
from itertools import zip_longest
from typing import Any

from megatron_meap.errors import UsageError
from megatron_meap.files import cannot_write
from megatron_meap.records import parsed


class Journal:
    """`PREFIX.journal.partial`: a JSON line with the job's settings, then one each time input files are finished.

    The operating system holds the lock, and releases it when the process ends, however it ends.
    """

    def __init__(
        self, prefix: str, settings: dict[str, Any], files: list[Any], *, resume: bool, state_shape: Any = dict
    ) -> None:
        """Open and lock the journal; with `resume`, read what an earlier run wrote.

        Args:
            prefix: of the job's outputs.
            settings: what determines the ids.
            files: for each input file, in order, what shows whether it is still the same.
            resume: continue the earlier run, or begin if there is none.
            state_shape: what a state looks like (`records.misfit`).

        Raises:
            UsageError: another process is writing here, the earlier run had other settings or files, or its journal
                cannot be read.
        """
        self.path = f"{prefix}.journal.partial"
        self._files = files
        self.finished = 0
        """How many input files are finished."""
        self.state: dict[str, Any] | None = None
        """The state of the outputs after them; None if there are none."""
        try:
            self._file = open(self.path, "a+b")  # noqa: SIM115 - closed by close()
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--output-prefix {prefix}: another run is writing there; wait for it to end") from None
        except OSError as error:
            raise cannot_write(f"--output-prefix {prefix}", error) from error
        if resume:
            self._read(json.loads(json.dumps(settings)), {"files": [(str, int, int)], "state": state_shape})
        if self.state is None:
            self._file.truncate(0)
            try:
                self._append(settings)
            except OSError as error:
                self.close(remove=True)
                raise cannot_write(self.path, error) from error

    def _read(self, settings: dict[str, Any], shape: Any) -> None:
        self._file.seek(0)
        *lines, incomplete = self._file.read().split(b"\n")
        self._file.truncate(self._file.tell() - len(incomplete))  # the job ended while it wrote that
        if len(lines) < 2:
            return
        try:
            earlier, records = parsed(lines[0], dict), [parsed(line, shape) for line in lines[1:]]
        except ValueError as error:
            raise UsageError(f"{self.path}: not a journal of this project ({error}); start without --resume") from error
        changed = [name for name in settings if earlier.get(name) != settings[name]]
        if changed:
            raise UsageError(f"--resume: the earlier run had another {' and '.join(changed)}; start without --resume")
        finished = [file for record in records for file in record["files"]]
        for before, now in zip_longest(finished, self._files[: len(finished)]):
            if before != now:
                raise UsageError(f"--resume: {before[0]} is not what the earlier run read; start without --resume")
        self.finished, self.state = len(finished), records[-1]["state"]

    def record(self, finished: int, state: dict[str, Any]) -> None:
        """Write that all files before number `finished` are finished, and the state of the outputs."""
        self._append({"files": self._files[self.finished : finished], "state": state})
        self.finished, self.state = finished, state

    def _append(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()

    def close(self, *, remove: bool) -> None:
        """Release the lock; with `remove`, delete the journal because there is nothing to continue."""
        if remove:
            os.unlink(self.path)
        with contextlib.suppress(OSError):  # a disk that was full before is still full
            self._file.close()
