"""A job told to stop saves and ends; a job that is killed loses only the steps after its last checkpoint."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from megatron_meap.checkpoint import latest
from megatron_meap.checkpoint.reader import open_checkpoint
from megatron_meap.cluster import run_files
from megatron_meap.errors import UsageError
from tests.conftest import Corpus
from tests.launch import ENTRY, MODEL, REPOSITORY, TRAINING, environment, errors, launch, parse, start_ranks, torchrun
from tests.processes import children, ended

STOPPED = 75  # the ranks' exit status, as documented


def wait_for_step(log: Path, step: int, goes_on: Callable[[], bool], said: Path | None = None) -> None:
    """Until a step stands in a log, as long as the job goes on; what it has said tells why it does not."""
    deadline = time.monotonic() + 120
    while not (log.exists() and any(reached >= step for reached in parse(log.read_text()).steps)):
        assert goes_on(), (said or log).read_text()[-3000:]
        assert time.monotonic() < deadline, (said or log).read_text()[-3000:]
        time.sleep(0.05)


class Job:
    """A training job in a process group of its own, its output in a file."""

    def __init__(self, command: list[str], log: Path, piped: bool = False) -> None:
        """Start it; where it is piped, its standard output goes to a reader, and only its errors to the log."""
        self.log = log
        self.known: list[int] = []
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                command, env=environment(), cwd=REPOSITORY, stdout=subprocess.PIPE if piped else output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        self.reader = None
        if self.process.stdout is not None:
            self.reader = subprocess.Popen(["cat"], stdin=self.process.stdout, stdout=subprocess.DEVNULL)
            self.process.stdout.close()

    def wait_for_step(self, step: int, log: Path | None = None) -> None:
        wait_for_step(log or self.log, step, lambda: self.process.poll() is None, self.log)

    def ranks(self) -> list[int]:
        """Process ids of the ranks: the launcher's children."""
        self.known = children(self.process.pid)
        return self.known

    def end(self, timeout: float = 90) -> int:
        """Wait for the launcher to end; whatever is left is killed, so that a failing test leaves nothing behind."""
        try:
            return self.process.wait(timeout)
        finally:
            self.kill()

    def kill(self) -> None:
        for rank in self.known:  # torchrun gives each a session of its own
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        if self.reader is not None:
            self.reader.kill()
            self.reader.wait()
        for group in (self.process.pid, *self.ranks()):  # torchrun's ranks have groups of their own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def flags(corpus: Corpus, tmp_path: Path) -> list[str]:
    save = str(tmp_path / "run")
    return [
        *MODEL, *TRAINING, *corpus.data_flags, "--data-cache-path", str(tmp_path / "cache"), "--num-workers", "1",
        "--train-iters", "100000", "--save", save, "--load", save, "--save-interval", "50000",
    ]  # fmt: skip


def close_the_pipe(job: Job) -> None:
    """The reader exits; training continues until it is told to stop."""
    assert job.reader is not None
    job.reader.kill()
    words = list(job.process.args)  # type: ignore[arg-type]
    own = Path(words[words.index("--save") + 1]) / "train.log"
    job.wait_for_step(max(parse(own.read_text()).steps) + 5, log=own)
    job.process.send_signal(signal.SIGTERM)


def interrupt(job: Job) -> None:
    """Ctrl-C: the terminal sends it to all that belongs to the command."""
    os.killpg(job.process.pid, signal.SIGINT)
    if job.reader is not None:
        job.reader.send_signal(signal.SIGINT)


def hang_up(job: Job) -> None:
    """The terminal is closed, or the connection to it."""
    os.killpg(job.process.pid, signal.SIGHUP)


WAYS: dict[str, tuple[Callable[[Job], None], str]] = {
    "SIGTERM": (lambda job: job.process.send_signal(signal.SIGTERM), "SIGTERM"),
    "Ctrl-C": (interrupt, "SIGINT"),
    "SIGHUP": (hang_up, "SIGHUP"),
    "closed pipe": (close_the_pipe, "SIGTERM"),
    "SIGUSR1 to one rank": (lambda job: os.kill(job.ranks()[-1], signal.SIGUSR1), "SIGUSR1"),
    "SIGUSR1": (lambda job: job.process.send_signal(signal.SIGUSR1), "SIGUSR1"),
    "SIGKILL to the launcher": (lambda job: job.process.kill(), "SIGTERM"),  # its ranks notice
}
CASES = [(2, "Ctrl-C", True), (2, "SIGKILL to the launcher", False), (1, "closed pipe", True)]
"""Few, since each starts a job as a user does; the others repeat them with other signals."""

SLOW = [
    *((2, way, piped) for way in ("SIGTERM", "Ctrl-C", "SIGHUP", "SIGUSR1") for piped in (False, True)),
    *((1, way, piped) for way in ("SIGTERM", "Ctrl-C", "SIGHUP") for piped in (False, True)),
    (2, "closed pipe", True),
    (2, "SIGUSR1 to one rank", False),
]


@pytest.mark.parametrize(
    ("processes", "way", "piped"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW if case not in CASES)],
)
def test_the_job_saves_and_ends(flags: list[str], tmp_path: Path, processes: int, way: str, piped: bool) -> None:
    """A checkpoint, status 75, and a last line that says how to resume."""
    stop, name = WAYS[way]
    run = tmp_path / "run"
    launcher = torchrun(2) if processes == 2 else [sys.executable]
    job = Job([*launcher, str(ENTRY), *flags], tmp_path / "log", piped)
    try:
        job.wait_for_step(3, log=run / "train.log")
        ranks = job.ranks() if processes == 2 else []
        stop(job)
        status = job.process.wait(90)
        assert ended(ranks)
    finally:
        job.kill()
    own, shown = (path.read_text().strip().splitlines() for path in (run / "train.log", job.log))
    assert status == (STOPPED if "SIGKILL" not in way else -signal.SIGKILL)
    saved = latest.pointer(run)
    assert saved is not None
    assert int(saved) >= 3
    assert latest.damage(latest.directory(run, int(saved))) is None
    line = f"stopped by {name} after iteration {saved}: checkpoint in {run}; the same command resumes"
    assert own[-1] == line
    if not piped:
        assert (
            next(number for number, text in enumerate(shown) if parse(text).steps) <= 40
        )  # lines before the first step
    if not piped or way in ("Ctrl-C", "closed pipe"):  # else the reader has it
        assert shown[-1] == line


def test_files_save_and_stop(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks save at the same step; the files go when they are honoured; one that is left refuses a start."""
    run, script = tmp_path / "run", tmp_path / "seen-by-a-script"
    monkeypatch.setenv("MEAP_HEARTBEAT", str(script))

    def wait_for(true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not true():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    with ThreadPoolExecutor(1) as background:
        job = background.submit(launch, 2, flags)
        wait_for(lambda: job.done() or (run / "heartbeat").exists())
        assert run_files.state_of(run)[0] == run_files.TRAINING
        (run / "save").touch()
        wait_for(lambda: job.done() or not (run / "save").exists())
        first = int(latest.pointer(run) or 0)
        assert not job.done()
        (run / "stop").touch()
        ended = job.result()
    last = int(latest.pointer(run) or 0)
    assert 0 < first < last
    assert latest.iterations(run) == [first, last]
    assert ended.returncode == 0
    assert f"stopped by the file {run / 'stop'} after iteration {last}: checkpoint in {run}" in ended.output
    assert not (run / "stop").exists()
    assert script.read_text() == (run / "heartbeat").read_text()
    assert run_files.state_of(run)[0] == run_files.ENDED
    (run / "stop").touch()
    with pytest.raises(UsageError, match="asks this run to stop; remove it to train"):
        run_files.refuse_a_stop(str(run))


def test_a_file_that_cannot_be_removed_is_heeded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "save").mkdir()  # root can remove any file
    requests = run_files.Requests(str(tmp_path))
    assert requests.asked() == (True, False)
    assert requests.asked() == (False, False)  # a moment later
    monkeypatch.setattr(run_files, "_LOOK_S", 0.0)
    requests.remove()
    assert "save: cannot be removed" in capsys.readouterr().out
    assert requests.asked() == (False, False)


def test_a_second_signal_ends_it_at_once(flags: list[str], tmp_path: Path) -> None:
    """Even where the first one cannot be obeyed, because a rank hangs."""
    job = Job(torchrun(2, str(ENTRY), *flags), tmp_path / "log")
    try:
        job.wait_for_step(2)
        first, second = job.ranks()
        os.kill(second, signal.SIGSTOP)  # it answers no more: the first waits for it
        os.kill(first, signal.SIGTERM)
        time.sleep(10.5)
        assert not ended([first], 0)
        os.kill(first, signal.SIGTERM)
        assert ended([first], 10)
    finally:
        job.kill()
    assert latest.pointer(tmp_path / "run") is None


def kill_at_random(rng: random.Random, step: int, processes: int, flags: list[str], log: Path) -> None:
    """SIGKILL to all ranks of a job within the twelve steps after one; what they have started ends with them."""
    with open(log, "w") as output:
        ranks = start_ranks(processes, [str(ENTRY), *flags], output)
    try:
        wait_for_step(log, step + rng.randint(3, 12), lambda: all(rank.is_alive() for rank in ranks))
        time.sleep(rng.uniform(0, 0.3))
        pids = [pid for rank in ranks for pid in [rank.pid, *children(rank.pid)]]
    finally:
        for rank in ranks:
            rank.kill()
    assert ended(pids)


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
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

    def flags_of(name: str) -> list[str]:
        return [*common, "--save", str(tmp_path / name), "--load", str(tmp_path / name)]

    assert launch(processes, flags_of("whole")).returncode == 0
    for kill in range(kills):
        kill_at_random(rng, 12 * kill, processes, flags_of("killed"), tmp_path / f"{kill}.log")
    done = launch(processes, flags_of("killed"))
    assert done.returncode == 0, errors(done.output)
    whole, killed = (open_checkpoint(tmp_path / name) for name in ("whole", "killed"))
    assert whole.iteration == killed.iteration == steps
    assert whole.weights().keys() == killed.weights().keys()
    for name in whole.weights():
        assert torch.equal(whole.read(name), killed.read(name)), name
