"""Lost hosts: how long the other ranks wait for them, and what they report."""

import os
import re
import socket
import stat
from dataclasses import dataclass

from megatron_meap.errors import JobError, UsageError
from megatron_meap.flags import Settings, flag

_LOST = re.compile("gloo/transport/|ncclRemoteError|remote process exited")  # in messages of gloo and NCCL
_SOURCE_LINE = re.compile(r"^\[\S+:\d+\] ")


@dataclass(frozen=True)
class ConnectionSettings(Settings):
    """How long a host may be unreachable."""

    lost_host_seconds: int = flag(
        120,
        "end the job when a host has not answered for this long (default: %(default)s; gloo only: NCCL waits for "
        "--distributed-timeout-minutes)",
        metavar="SECONDS",
    )

    def check(self) -> None:
        """Refuse a time that is not positive."""
        if self.lost_host_seconds < 1:
            raise UsageError(f"--meap-lost-host-seconds {self.lost_host_seconds}: must be at least 1")


def watch(seconds: int, backend: str) -> None:
    """Let the kernel watch this process's TCP connections: a peer that cannot be reached is an error after `seconds`.

    gloo and PyTorch's store set no such limit: the kernel resends data to an unreachable host for a quarter of an hour,
    and data from there is awaited until `--distributed-timeout-minutes`, which must be longer than anything one rank
    does while the others wait. The peer's kernel answers, not its Python: a rank that computes for an hour counts as
    alive. But one that does not read while much is sent to it is also disconnected; NCCL, which has limits of its own
    and may use TCP, is not changed.

    Args:
        seconds: how long a peer may be unreachable.
        backend: of PyTorch's process groups.
    """
    if backend != "gloo":
        return
    limits = {
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): max(1, seconds // 4),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): max(1, seconds // 8),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT): seconds * 1000,
    }
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            with socket.socket(fileno=os.dup(number)) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                    for option, value in limits.items():
                        connection.setsockopt(*option, value)
        except OSError:  # closed in the meantime
            continue


def explain(error: BaseException) -> JobError | None:
    """One line for a broken connection to another rank; None for any other error."""
    if not isinstance(error, RuntimeError) or _LOST.search(str(error)) is None:
        return None
    reason = _SOURCE_LINE.sub("", str(error).strip().splitlines()[0]).partition(". ")[0]
    return JobError(
        f"rank {os.environ['RANK']} on {socket.gethostname()} lost another rank ({reason}): that rank or its host has "
        "ended or cannot be reached; the same command resumes from the last checkpoint"
    )
