"""Processes of this host, by their ids."""

import subprocess
import time
from pathlib import Path


def children(pid: int) -> list[int]:
    """Child processes of a process, including ended ones that it has not waited for."""
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(child) for child in listed.stdout.split()]


def ended(pids: list[int], timeout: float = 60) -> bool:
    """Whether the processes end in time; one that its parent has not waited for counts as ended."""
    deadline = time.monotonic() + timeout
    while any(_is_alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
