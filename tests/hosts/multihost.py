"""One training job on several hosts: torchrun on each of them, in network namespaces."""

import os
import signal
import subprocess
import time
from pathlib import Path

from tests.launch import REPOSITORY, Run, environment, parse, torchrun
from tests.network import INTERFACE, Host, Network

PORT = 29431


class MultiHostJob:
    """The same command on every host, with the output of each in a file of its own."""

    def __init__(
        self, network: Network, script: Path, flags: list[str], folder: Path, rendezvous: str = "static",
        private: Path | None = None,
    ) -> None:  # fmt: skip
        """Start it, with one process on each host.

        Args:
            network: its hosts.
            script: what torchrun runs, with these `flags`.
            folder: for the logs.
            rendezvous: torchrun's, "static" or "c10d".
            private: a directory that is another, empty one on every host but the first.
        """
        folder.mkdir(exist_ok=True)
        self.logs = [folder / f"{host.name}.log" for host in network.hosts]
        self.launchers = [
            self._start(network, host, [str(script), *flags], rendezvous, private if number else None)
            for number, host in enumerate(network.hosts)
        ]

    def _start(
        self, network: Network, host: Host, words: list[str], rendezvous: str, private: Path | None
    ) -> subprocess.Popen:
        number = network.hosts.index(host)
        first = network.hosts[0].address
        nodes = ["--nnodes", str(len(network.hosts)), "--local-addr", host.address]  # the hosts share their name
        if rendezvous == "c10d":
            nodes += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first}:{PORT}", "--rdzv-id", "test"]
            nodes += ["--rdzv-conf", f"is_host={int(number == 0)}"]
        else:
            nodes += ["--node-rank", str(number), "--master-addr", first, "--master-port", str(PORT)]
        command = [word for word in torchrun(1, *words) if word != "--standalone"]
        place = command.index("--nproc_per_node")
        command = host.command(*command[:place], *nodes, *command[place:])
        if private is not None:
            command = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {private} && exec "$@"', "_", *command]
        with open(self.logs[number], "w") as output:
            return subprocess.Popen(
                command, env={**environment(), "GLOO_SOCKET_IFNAME": INTERFACE}, cwd=REPOSITORY, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def output(self) -> str:
        """What all hosts have written."""
        return "\n".join(log.read_text() for log in self.logs)

    def run(self) -> Run:
        """The steps that were logged so far, on whichever host."""
        return parse(self.output())

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        """Wait until a step has been logged."""
        deadline = time.monotonic() + seconds
        while not any(reached >= step for reached in self.run().steps):
            assert all(launcher.poll() is None for launcher in self.launchers), self.output()[-6000:]
            assert time.monotonic() < deadline, self.output()[-6000:]
            time.sleep(0.1)

    def wait(self, seconds: float) -> list[int]:
        """Exit statuses of the launchers; whatever is left after that time is killed and fails the test."""
        deadline = time.monotonic() + seconds
        try:
            return [launcher.wait(deadline - time.monotonic()) for launcher in self.launchers]
        finally:
            self.kill()

    def kill(self) -> None:
        """Leave no process behind."""
        for launcher in self.launchers:
            try:
                os.killpg(launcher.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            launcher.wait()
