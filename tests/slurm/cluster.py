"""A real Slurm cluster on this machine, with separate munged, slurmctld and slurmd processes."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch import REPOSITORY
from tests.network import Host

LOOPBACK = Host("node1", "", "127.0.0.1")
CONTROLLER_PORT, NODE_PORT = 16817, 16818

CONFIGURATION = """
ClusterName=meap-test
SlurmctldHost={machine}({controller})
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0
KillWait=60
SlurmdTimeout=30
ReturnToService=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Cluster:
    """A running cluster."""

    folder: Path
    hosts: list[Host]

    def command(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands, on the first host."""
        return subprocess.run(
            _on(self.hosts[0], *words), capture_output=True, text=True, timeout=60, cwd=REPOSITORY,
            env={**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), **variables},
        )  # fmt: skip

    def submit(self, *words: str, **variables: str) -> int:
        """Submit a batch script with these words after `sbatch`, from the repository's root: the job's number."""
        done = self.command("sbatch", "--parsable", *words, **variables)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def job(self, number: int | str) -> dict[str, str]:
        """What Slurm says of a job, or of a member of an array (`NUMBER_INDEX`): JobState, Restarts and so on."""
        shown = self.command("scontrol", "show", "job", str(number)).stdout
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def wait_for(self, number: int | str, *states: str, seconds: float = 120) -> dict[str, str]:
        """Wait until a job is in one of the states."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"{job}\n{self.output(job)}"
            time.sleep(0.2)
        return job

    @staticmethod
    def output(job: dict[str, str]) -> str:
        """What a job has written so far."""
        path = Path(job["StdOut"])
        return path.read_text() if path.exists() else ""

    def make_eligible(self, number: int) -> None:
        """Let a requeued job start: Slurm holds it back for two minutes, and must not start it in the same second."""
        time.sleep(2)
        self.command("scontrol", "update", f"JobId={number}", "StartTime=now")


@contextlib.contextmanager
def running(folder: Path, hosts: list[Host]) -> Iterator[Cluster]:
    """A cluster whose nodes are these hosts, the controller on the first; all of it ends with the block."""
    for command in ("munged", "slurmctld", "slurmd", "sbatch"):
        if shutil.which(command) is None:
            pytest.skip(f"no `{command}` on this machine (Debian: apt install slurm-wlm munge)")
    if os.geteuid() != 0:
        pytest.skip("a Slurm cluster of one's own needs root")
    _configure(folder, hosts)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    commands = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}",
         f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"],
        _on(hosts[0], "slurmctld", "-D"),
        *(_on(host, "slurmd", "-D", "-N", host.name) for host in hosts),
    ]  # fmt: skip
    daemons: list[subprocess.Popen] = []
    try:
        for command in commands:
            daemons.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )
            if not daemons[1:]:
                _wait_for(folder / "munge.socket")
        cluster = Cluster(folder, hosts)
        _wait_until_idle(cluster)
        yield cluster
        cluster.command("scancel", "--user=root", "--signal=KILL", "--full")
        cluster.command("scancel", "--user=root")
        _wait_until_idle(cluster)
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(daemons):
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()


def _configure(folder: Path, hosts: list[Host]) -> None:
    machine = os.uname().nodename
    nodes = [
        f"NodeName={host.name} NodeHostname={machine} NodeAddr={host.address} Port={NODE_PORT + number} "
        f"CPUs={os.cpu_count()} RealMemory=1000 State=UNKNOWN"
        for number, host in enumerate(hosts)
    ]
    text = CONFIGURATION.format(
        machine=machine, controller=hosts[0].address, controller_port=CONTROLLER_PORT, folder=folder
    )
    (folder / "slurm.conf").write_text(text + "\n".join(nodes) + "\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "state").mkdir()
    for host in hosts:
        (folder / f"spool-{host.name}").mkdir()


def _on(host: Host, *words: str) -> list[str]:
    return host.command(*words) if host.namespace else list(words)


def _wait_for(path: Path, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.05)


def _wait_until_idle(cluster: Cluster, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        shown = cluster.command("sinfo", "--noheader", "--Node", "--format=%T")
        if shown.returncode == 0 and shown.stdout.split() == ["idle"] * len(cluster.hosts):
            return
        logs = "\n".join(path.read_text()[-1500:] for path in cluster.folder.glob("*.log"))
        assert time.monotonic() < deadline, f"{shown.stdout}{shown.stderr}\n{logs}"
        time.sleep(0.2)
