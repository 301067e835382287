"""Runs that are killed, lose a worker, fill the disk or stop at a bad line: nothing looks finished, and they resume."""

import contextlib
import errno
import functools
import mmap
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from pickle import PickleBuffer

import numpy as np
import pytest

from megatron_meap.errors import UsageError
from megatron_meap.preprocessing import workers as preprocessing_workers
from megatron_meap.preprocessing.workers import WorkerPool, _Channel, _serve_until_closed
from tests.unit.preprocessing import (
    leftovers,
    make_tokenizer,
    outputs,
    run_job,
    sentencepiece_args,
    topics,
    write_jsonl,
)

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
FINISHED = (".idx", ".manifest.json")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def args(model):
    return sentencepiece_args(model)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Files that take the reference tokenizer some seconds altogether."""
    folder, texts = tmp_path_factory.mktemp("corpus"), topics()
    for number in range(12):
        write_jsonl(folder / f"{number:02d}.jsonl", texts[number:] * 2)
    return folder


@pytest.fixture(scope="module")
def long_job(tmp_path_factory):
    """A file that takes the reference tokenizer many seconds: no run is finished before its test interferes."""
    return write_jsonl(tmp_path_factory.mktemp("long") / "long.jsonl", topics() * 400)


def start(corpus: Path, prefix: Path, model: Path, *flags: str, **more) -> subprocess.Popen:
    """The tool in a separate process, slowed down by the reference tokenizer."""
    command = [sys.executable, str(TOOL), "--input", str(corpus), "--output-prefix", str(prefix), "--append-eod"]
    command += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model), "--workers", "2"]
    command += ["--encoder", "reference", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def workers(pid: int) -> list[int]:
    """The tool's workers at work: what imports start for a moment is a child too, but does not ignore Ctrl-C."""
    children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [child for child in children if ignored_signals(child) & 1 << (signal.SIGINT - 1)]


def ignored_signals(pid: int) -> int:
    """Their bits; none of a process that is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigIgn:"):
                return int(line.split()[1], 16)
    return 0


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.005)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_run_leaves_nothing_finished_and_can_be_resumed(corpus, model, args, tmp_path):
    """SIGKILL at random moments, again and again, each run resuming the one before, until one comes through."""
    run_job([corpus], tmp_path / "whole", args)
    expected, prefix = outputs(tmp_path / "whole_text_document"), tmp_path / "killed" / "out"
    generator, kills = random.Random(0), 0
    while kill_at(start(corpus, prefix, model, "--resume"), generator.random() * 0.2 * (1 + kills)):
        kills += 1
        if any(name.endswith(".idx") for name in leftovers(prefix.parent)):
            break  # killed after the last rename: finished, then, and whole
        assert not [name for name in leftovers(prefix.parent) if name.endswith(".json")]
    assert kills >= 2
    assert outputs(f"{prefix}_text_document") == expected


def kill_at(process: subprocess.Popen, seconds: float) -> bool:
    """SIGKILL the run that long after its workers have started; False if it finished before."""
    wait_for(lambda: process.poll() is not None or len(workers(process.pid)) == 2)
    time.sleep(seconds)
    left = workers(process.pid) if process.poll() is None else []
    process.kill()
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors
    wait_for(lambda: not any(map(is_running, left)))  # they notice that their parent is gone
    return process.returncode != 0


def test_a_dead_worker_ends_the_job_with_its_reason(long_job, model, tmp_path):
    process = start(long_job, tmp_path / "out" / "x", model)
    wait_for(lambda: len(workers(process.pid)) == 2)
    os.kill(workers(process.pid)[0], signal.SIGKILL)
    begun = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - begun < 10
    assert process.returncode == 2
    assert "was killed by SIGKILL" in errors
    assert "Traceback" not in errors
    assert not [name for name in leftovers(tmp_path / "out") if name.endswith((".bin", *FINISHED))]


def test_a_full_disk_is_one_line_and_leaves_nothing_finished(corpus, model, tmp_path):
    """A limit on file sizes stands in for a full disk: the same call fails."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = start(corpus / "00.jsonl", tmp_path / "out" / "x", model, preexec_fn=limit)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "cannot be written: File too large" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert leftovers(tmp_path / "out") == []


@pytest.mark.parametrize("full", ["report", "journal"])
def test_a_disk_that_gets_full_beside_the_dataset(full, args, tmp_path, monkeypatch):
    """At the report of bad lines, or at the journal: one line, no traceback after it, and what is finished is kept."""
    texts = ["a"] * 3
    paths = [write_jsonl(tmp_path / f"{number}.jsonl", texts) for number in range(30)]
    if full == "report":
        for path in paths:
            path.write_text(path.read_text() + "oops\n" * 30)
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
            try:
                run_job(paths, tmp_path / "out" / "x", args, skip_bad_lines=True)
            except UsageError as error:
                (tmp_path / "said").write_text(str(error))
                status = 0
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    said = (tmp_path / "said").read_text()
    assert "x: cannot be written: File too large" in said
    assert said.endswith("(finished input files are kept: continue with --resume)")
    made = run_job(paths, tmp_path / "out" / "x", args, skip_bad_lines=True, resume=True)[0]
    assert made["documents"] == 90
    assert (made["skipped_lines"] > 0) == (full == "report")


def test_no_room_for_the_journal_at_all(args, tmp_path, monkeypatch):
    from megatron_meap.preprocessing.journal import Journal

    def full(journal, entry):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Journal, "_append", full)
    with pytest.raises(UsageError, match=r"x\.journal\.partial: cannot be written: the disk is full"):
        run_job([write_jsonl(tmp_path / "a.jsonl", ["a"])], tmp_path / "out" / "x", args)
    assert leftovers(tmp_path / "out") == []


def test_a_journal_cut_off_within_a_line_goes_on_after_the_line_before(args, tmp_path):
    """More than once: the next data must not be written after the remains of an interrupted run."""
    paths, folder = spoiled(tmp_path), tmp_path / "out"
    for path in paths[2:]:  # each the one at which the next run stops
        path.write_text(path.read_text().removesuffix("oops\n") + "oops\n")
        with pytest.raises(UsageError, match="not JSON"):
            run_job(paths, folder / "x", args, resume=True)
        with open(folder / "x.journal.partial", "ab") as journal:
            journal.write(b'{"files": [')
        path.write_text(path.read_text().removesuffix("oops\n"))
    made = run_job(paths, folder / "x", args, resume=True)[0]
    assert made["documents"] == 80


def test_a_worker_ends_quietly_when_its_parent_is_gone():
    """As after SIGTERM, in the middle of a block: the parent is gone."""
    ours, theirs = multiprocessing.Pipe()
    shared = mmap.mmap(-1, 4096)
    waiting, go = os.pipe()
    served = _Channel(theirs, shared), ours, functools.partial(os.read, waiting)
    process = multiprocessing.get_context("fork").Process(target=_serve_until_closed, args=served)
    process.start()
    theirs.close()
    _Channel(ours, shared).send(1)
    ours.close()
    os.write(go, b"x")
    process.join(10)
    assert process.exitcode == 0


def test_more_workers_than_the_system_allows():
    """Wherever the limit is met, in a pipe or in the process: one line, and those that were started end."""
    before, (soft, hard) = multiprocessing.active_children(), resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = os.open(os.devnull, os.O_RDONLY)  # takes the lowest free number
    os.close(opened)
    for more in range(3, 8):
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + more, hard))
        try:
            with pytest.raises(
                UsageError, match=r"--workers 99: only [0-9]+ could be started: Too many open files; use"
            ):
                WorkerPool(_echo, 99)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert multiprocessing.active_children() == before


def test_buffers_of_any_size_arrive(monkeypatch):
    """Through the memory that is shared, through the pipe where they have no room in it, and both in one message."""
    monkeypatch.setattr(preprocessing_workers, "_SHARED_BYTES", 3 * mmap.PAGESIZE)
    sizes = [0, 1, mmap.PAGESIZE, 3 * mmap.PAGESIZE, 3 * mmap.PAGESIZE + 1, 1 << 20]
    draw = random.Random(0)
    tasks = [
        (number, [PickleBuffer(draw.randbytes(draw.choice(sizes))) for _ in range(draw.randrange(4))])
        for number in range(60)
    ]
    with WorkerPool(_echo, 2) as pool:
        for (number, sent), (at, (found, arrays)) in zip(tasks, pool.map(enumerate(tasks)), strict=True):
            assert number == at == found
            assert [bytes(buffer) for buffer in sent] == [array.tobytes() for array in arrays]


def _echo(task):
    number, buffers = task
    return number, [np.frombuffer(buffer, np.uint8) for buffer in buffers]


def test_interrupted_by_ctrl_c(long_job, model, tmp_path):
    process = start(long_job, tmp_path / "out" / "x", model)
    wait_for(lambda: len(workers(process.pid)) == 2)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted"
    assert not [name for name in leftovers(tmp_path / "out") if name.endswith((".bin", *FINISHED))]


def spoiled(tmp_path: Path) -> list[Path]:
    """Four files, the third with a bad line at its end."""
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", [f"file {n}, line {line}" for line in range(20)]) for n in range(4)]
    with open(paths[2], "a") as file:
        file.write("oops\n")
    return paths


def test_resuming_after_a_bad_line_was_mended(args, tmp_path):
    paths, folder = spoiled(tmp_path), tmp_path / "out"
    with pytest.raises(
        UsageError, match=r"2\.jsonl:21: not JSON.*\(finished input files are kept: continue with --resume\)"
    ):
        run_job(paths, folder / "x", args)
    assert leftovers(folder)
    assert all(name.endswith(".partial") for name in leftovers(folder))
    paths[2].write_text(paths[2].read_text().replace("oops", '{"text": "mended"}'))
    made = run_job(paths, folder / "x", args, resume=True)[0]
    run_job(paths, tmp_path / "whole", args)
    assert outputs(folder / "x_text_document") == outputs(tmp_path / "whole_text_document")
    assert (made["documents"], made["text_bytes"]) == (
        81,
        sum(len(f"file {n}, line {m}") for n in range(4) for m in range(20)) + 6,
    )
    assert not [name for name in leftovers(folder) if name.endswith(".partial")]


def test_resuming_with_bad_lines_skipped(args, tmp_path):
    paths, folder = spoiled(tmp_path), tmp_path / "out"
    with pytest.raises(UsageError):
        run_job(paths, folder / "x", args)
    made = run_job(paths, folder / "x", args, resume=True, skip_bad_lines=True)[0]
    assert (made["documents"], made["skipped_lines"]) == (80, 1)


def test_resuming_another_job_is_refused(args, tmp_path):
    paths, folder = spoiled(tmp_path), tmp_path / "out"
    with pytest.raises(UsageError):
        run_job(paths, folder / "x", args)
    with pytest.raises(UsageError, match="the earlier run had another flags"):
        run_job(paths, folder / "x", args, resume=True, prepend_bos=True)
    with pytest.raises(UsageError, match=r"0\.jsonl is not what the earlier run read"):
        run_job(paths[1:], folder / "x", args, resume=True)
    write_jsonl(paths[1], ["changed"])
    with pytest.raises(UsageError, match=r"1\.jsonl is not what the earlier run read"):
        run_job(paths, folder / "x", args, resume=True)


def test_resuming_damaged_remains_is_refused(args, tmp_path):
    paths, folder = spoiled(tmp_path), tmp_path / "out"
    with pytest.raises(UsageError):
        run_job(paths, folder / "x", args)
    remains = folder / "x_text_document.bin.partial"
    data = bytearray(remains.read_bytes())
    data[10] ^= 1
    remains.write_bytes(data)
    with pytest.raises(UsageError, match=r"not what the earlier run wrote; start without --resume$"):
        run_job(paths, folder / "x", args, resume=True)
    remains.rename(folder / "x_text_document.bin")  # as a run leaves it that is killed while it gives out the names
    with pytest.raises(UsageError, match=r"\.bin\.partial: no longer there; start without --resume$"):
        run_job(paths, folder / "x", args, resume=True, overwrite=True)


def test_two_runs_with_one_prefix_are_kept_apart(corpus, model, args, tmp_path):
    process = start(corpus, tmp_path / "x", model)
    wait_for(lambda: (tmp_path / "x.journal.partial").exists() or process.poll() is not None)
    with pytest.raises(UsageError, match="another run is writing there"):
        run_job([corpus], tmp_path / "x", args)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
