"""A job that is told to stop saves and ends; a job that is killed loses only what came after its last checkpoint."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_meap.checkpoint import latest
from megatron_meap.checkpoint.reader import open_checkpoint
from tests.conftest import Corpus
from tests.launch import ENTRY, MODEL, REPOSITORY, TRAINING, environment, parse, torchrun

STOPPED = 75  # the ranks' exit status, as documented


class Job:
    """A training job in a process group of its own, its output in a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                command, env=environment(), cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def wait_for_step(self, step: int, timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not any(reached >= step for reached in parse(self.log.read_text()).steps):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.05)

    def ranks(self) -> list[int]:
        """Process ids of the ranks: the launcher's children."""
        listed = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]

    def end(self, timeout: float = 90) -> int:
        """Wait for the launcher to end; whatever is left is killed, so that a failing test leaves nothing behind."""
        try:
            return self.process.wait(timeout)
        finally:
            self.kill()

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait()


def ended(pids: list[int], timeout: float = 60) -> bool:
    """Whether the processes end in time; one that its parent has not yet asked for counts as ended."""
    deadline = time.monotonic() + timeout

    def alive(pid: int) -> bool:
        stat = Path(f"/proc/{pid}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"

    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture
def flags(corpus: Corpus, tmp_path: Path) -> list[str]:
    save = str(tmp_path / "run")
    return [
        *MODEL, *TRAINING, *corpus.data_flags, "--data-cache-path", str(tmp_path / "cache"), "--num-workers", "1",
        "--train-iters", "100000", "--save", save, "--load", save, "--save-interval", "50000",
    ]  # fmt: skip


WAYS: dict[str, tuple[Callable[[Job], None], str]] = {
    "SIGTERM to the launcher": (lambda job: job.process.send_signal(signal.SIGTERM), "SIGTERM"),
    "SIGUSR1 to one rank": (lambda job: os.kill(job.ranks()[-1], signal.SIGUSR1), "SIGUSR1"),
    "Ctrl-C": (lambda job: os.killpg(job.process.pid, signal.SIGINT), "SIGINT"),
    # torchrun does not handle it unless told to, and dies; its ranks notice
    "SIGUSR1 to the launcher": (lambda job: job.process.send_signal(signal.SIGUSR1), "SIGTERM"),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_job_saves_and_ends(flags: list[str], tmp_path: Path, way: str) -> None:
    stop, name = WAYS[way]
    job = Job(torchrun(2, str(ENTRY), *flags), tmp_path / "log")
    try:
        job.wait_for_step(3)
        ranks = job.ranks()
        stop(job)
        assert job.process.wait(90) != 0
        assert ended(ranks)
    finally:
        job.kill()
    output = job.log.read_text()
    assert f"stopped by {name} after iteration" in output
    saved = latest.pointer(tmp_path / "run")
    assert saved is not None
    assert int(saved) >= 3
    assert latest.damage(latest.directory(tmp_path / "run", int(saved))) is None
    assert f"after iteration {saved}: checkpoint in {tmp_path / 'run'}" in output


def test_the_exit_status_of_a_rank(flags: list[str], tmp_path: Path) -> None:
    """Without a launcher the rank's own status is seen."""
    job = Job([sys.executable, str(ENTRY), *flags], tmp_path / "log")
    job.wait_for_step(2)
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == STOPPED


def test_a_second_signal_ends_it_at_once(flags: list[str], tmp_path: Path) -> None:
    """Even where the first one cannot be obeyed, because a rank hangs."""
    job = Job(torchrun(2, str(ENTRY), *flags), tmp_path / "log")
    try:
        job.wait_for_step(2)
        first, second = job.ranks()
        os.kill(second, signal.SIGSTOP)  # it answers no more: the first waits for it
        os.kill(first, signal.SIGTERM)
        time.sleep(5.5)
        assert not ended([first], 0)
        os.kill(first, signal.SIGTERM)
        assert ended([first], 10)
    finally:
        job.kill()
    assert latest.pointer(tmp_path / "run") is None


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", [pytest.param("one", marks=pytest.mark.slow), "tp2"])
def test_killed_and_resumed_ends_with_the_same_bits(corpus: Corpus, tmp_path: Path, layout: str, kills: int) -> None:
    """SIGKILL at random moments, in the middle of saving too; after all resumptions the weights are the same bits."""
    rng = random.Random(kills)
    steps = 12 * (kills + 1)
    processes = {"one": 1, "tp2": 2}[layout]
    common = [
        *MODEL, *TRAINING, *corpus.data_flags, "--data-cache-path", str(tmp_path / "cache"),
        "--train-iters", str(steps), "--save-interval", "2", "--meap-keep-last", "2",
        "--tensor-model-parallel-size", str(processes),
    ]  # fmt: skip

    def start(name: str) -> Job:
        save = str(tmp_path / name)
        return Job(torchrun(processes, str(ENTRY), *common, "--save", save, "--load", save), tmp_path / f"{name}.log")

    assert start("whole").end(200) == 0
    for kill in range(kills):
        job = start("killed")
        job.wait_for_step(12 * kill + rng.randint(3, 12))
        time.sleep(rng.uniform(0, 0.3))
        job.kill()
    assert start("killed").end(200) == 0, (tmp_path / "killed.log").read_text()[-3000:]
    whole, killed = (open_checkpoint(tmp_path / name) for name in ("whole", "killed"))
    assert whole.iteration == killed.iteration == steps
    assert whole.weights().keys() == killed.weights().keys()
    for name in whole.weights():
        assert torch.equal(whole.read(name), killed.read(name)), name
