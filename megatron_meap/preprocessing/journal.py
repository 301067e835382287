"""The journal of a running job: what an interrupted one has finished, and the lock that keeps two jobs apart."""

import fcntl
import json
import os
from typing import Any

from megatron_meap.errors import UsageError


class Journal:
    """`PREFIX.journal.partial`: one JSON line that names the job, then one for each finished input file.

    The lock is the operating system's and goes with the process, however it ends.
    """

    def __init__(self, prefix: str, job: dict[str, Any], *, resume: bool) -> None:
        """Open, lock and (with `resume`) read the journal of an earlier run.

        Raises:
            UsageError: another process is writing here, or the earlier run was another job.
        """
        self.path = f"{prefix}.journal.partial"
        try:
            self._file = open(self.path, "a+b")  # noqa: SIM115 - closed by close()
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--output-prefix {prefix}: another run is writing there; wait for it to end") from None
        except OSError as error:
            raise UsageError(f"--output-prefix {prefix}: cannot be written: {error.strerror}") from error
        self.last: dict[str, Any] | None = None
        """The state after the last finished file of the earlier run; None to begin anew."""
        if resume:
            self._read(job)
        if self.last is None:
            self._file.truncate(0)
            self._append(job)

    def _read(self, job: dict[str, Any]) -> None:
        self._file.seek(0)
        lines = self._file.read().split(b"\n")[:-1]  # what follows the last newline was cut off while being written
        if len(lines) < 2:
            return
        earlier = json.loads(lines[0])
        if earlier != json.loads(json.dumps(job)):
            changed = ", ".join(sorted(name for name in job if earlier.get(name) != json.loads(json.dumps(job[name]))))
            raise UsageError(f"--resume: the interrupted run had other settings ({changed}); start without --resume")
        self.last = json.loads(lines[-1])

    def record(self, state: dict[str, Any]) -> None:
        """Note that one more input file is finished."""
        self.last = state
        self._append(state)

    def _append(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()

    def close(self, *, remove: bool) -> None:
        """Unlock; `remove` when there is nothing to continue."""
        if remove:
            os.unlink(self.path)
        self._file.close()
