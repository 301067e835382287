"""The shipped batch scripts on a real Slurm: checkpoint on the signal, requeue, resume, the same weights."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from megatron_meap.checkpoint.reader import open_checkpoint
from megatron_meap.preprocessing.index import read_index
from tests.conftest import Corpus
from tests.launch import MODEL, REPOSITORY, TRAINING, environment, parse
from tests.slurm.cluster import Cluster

RECIPE = "tests/slurm/recipe.sh"
SCRIPTS = "examples/slurm"
SMALL = ["--cpus-per-task=1", "--mem=0", "--gpus-per-node=0"]
"""Words for sbatch that fit a job into the test's cluster."""


class Jobs:
    """Submits the shipped scripts with a tiny recipe."""

    def __init__(self, cluster: Cluster, folder: Path, flags: list[str]) -> None:
        self.cluster = cluster
        self.folder = folder
        (folder / "flags").write_text("\n".join(flags))

    def submit(self, script: str, name: str, *words: str, array: str = "", **variables: str) -> int:
        """Submit a script; its checkpoints go to a directory of this name."""
        recipe = {
            **environment(), "GPUS_PER_NODE": "1", "LOGS": str(self.folder / "logs"),
            "FLAGS": str(self.folder / "flags"), "RUN": str(self.folder / name),
        }  # fmt: skip
        output = f"--output={self.folder}/{name}-%a.out"
        options = [*SMALL, output, *([f"--array={array}"] if array else [])]
        return self.cluster.submit(*options, f"{SCRIPTS}/{script}", *words, **(recipe | variables))

    def wait_for_step(self, number: int, step: int, after: str = "", seconds: float = 120) -> None:
        """Wait until a job has logged a step, after some text."""
        deadline = time.monotonic() + seconds
        while True:
            whole = self.cluster.output(self.cluster.job(number))
            output = whole.partition(after)[2] if after else whole
            if any(reached >= step for reached in parse(output).steps):
                return
            job = self.cluster.job(number)
            assert job["JobState"] in ("PENDING", "RUNNING"), self.cluster.output(job)
            assert time.monotonic() < deadline, f"{job}\n{self.cluster.output(job)}"
            time.sleep(0.2)

    def wait_for_text(self, number: int, text: str, seconds: float = 60) -> None:
        """Wait until a job has written something."""
        deadline = time.monotonic() + seconds
        while text not in (output := self.cluster.output(self.cluster.job(number))):
            assert time.monotonic() < deadline, output
            time.sleep(0.2)

    def signal_ranks(self, number: int, signal_number: int, rank: str = "") -> None:
        """Send a signal to the ranks of a job, or to one of them."""
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_text().split("\0")
                variables = (process / "environ").read_text().split("\0")
                meant = f"SLURM_JOB_ID={number}" in variables and (not rank or f"RANK={rank}" in variables)
                if meant and "pretrain_gpt_meap.py" in words and "torchrun" not in words[1]:
                    os.kill(int(process.name), signal_number)

    def wait_until_done(self, number: int, seconds: float = 200) -> str:
        """Wait for the end of a job that succeeds: its output."""
        job = self.cluster.wait_for(number, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", seconds=seconds)
        output = self.cluster.output(job)
        assert job["JobState"] == "COMPLETED", output
        return output

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """The weights of a run's last checkpoint."""
        checkpoint = open_checkpoint(self.folder / name / "checkpoints")
        return {key: checkpoint.read(key) for key in checkpoint.weights()}


@pytest.fixture
def jobs(cluster: Cluster, corpus: Corpus, tmp_path: Path) -> Jobs:
    flags = [
        *MODEL,
        *TRAINING,
        *corpus.data_flags,
        "--data-cache-path",
        str(tmp_path / "cache"),
        "--train-iters",
        "300",
        "--save-interval",
        "10000",
    ]
    return Jobs(cluster, tmp_path, flags)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_stopped_requeued_and_resumed(jobs: Jobs) -> None:
    """The signal before the time limit costs nothing: the weights are those of a job that was left alone."""
    stopped = jobs.submit("single_node.sbatch", "stopped", RECIPE)
    jobs.wait_for_step(stopped, 5)
    jobs.cluster.command("scancel", "--signal=USR1", "--batch", str(stopped))
    jobs.cluster.wait_for(stopped, "PENDING")
    whole = jobs.submit("single_node.sbatch", "whole", RECIPE)
    jobs.cluster.make_eligible(stopped)
    output = jobs.wait_until_done(stopped)
    assert "stopped by SIGUSR1 after iteration" in output
    assert "stopped by Slurm's signal; requeued" in output
    log = jobs.folder / "stopped" / "checkpoints" / "train.log"  # Megatron's own lines are there
    assert "successfully loaded checkpoint" in log.read_text()
    assert jobs.cluster.job(stopped)["Restarts"] == "1"
    ranks = [jobs.folder / "logs" / str(stopped) / f"restart-{number}" / "node-0" for number in (0, 1)]
    assert all(list(folder.glob("*/attempt_0/0/stdout.log")) for folder in ranks)
    jobs.wait_until_done(whole)
    assert_same(jobs.weights("stopped"), jobs.weights("whole"))


@pytest.mark.slow
def test_every_ratio_of_the_ablation(jobs: Jobs) -> None:
    """Two members of the job array: each with its ratio and its directory."""
    environment = {"RUNS": str(jobs.folder / "runs"), "RATIOS": "0 0.05 0.1 0.15 0.2"}
    number = jobs.submit("mask_ratios.sbatch", "ratios", RECIPE, "--train-iters", "3", array="0,3", **environment)
    outputs = {}
    for task in ("0", "3"):
        job = jobs.cluster.wait_for(f"{number}_{task}", "COMPLETED", "FAILED", seconds=200)
        outputs[task] = jobs.cluster.output(job)
        assert job["JobState"] == "COMPLETED", outputs[task]
    assert "lm loss masked inputs" not in outputs["0"]
    assert "lm loss masked inputs" in outputs["3"]
    for ratio in ("0", "0.15"):
        assert open_checkpoint(jobs.folder / "runs" / f"ratio-{ratio}" / "checkpoints").iteration == 3


@pytest.mark.slow
def test_a_failure_is_answered_by_a_restart(jobs: Jobs) -> None:
    """A rank that dies in mid-run: requeued, and after MAX_FAILURES of them in a row no more."""
    number = jobs.submit("single_node.sbatch", "failing", RECIPE, "--train-iters", "100000", MAX_FAILURES="1")
    for restart in ("0", "1"):
        jobs.wait_for_step(number, 2, f"restart-{restart}")
        jobs.signal_ranks(number, signal.SIGKILL)  # as the kernel does when memory runs out
        if restart == "0":
            jobs.cluster.wait_for(number, "PENDING")
            jobs.cluster.make_eligible(number)
    job = jobs.cluster.wait_for(number, "FAILED")
    assert job["Restarts"] == "1"
    assert "failed with status 1; requeued" in jobs.cluster.output(job)
    assert "failed more than MAX_FAILURES=1 times in a row" in jobs.cluster.output(job)


@pytest.mark.slow
def test_a_rank_that_hangs_is_answered_by_a_restart(jobs: Jobs) -> None:
    """One of two ranks hangs, and the other waits for it, ignoring signals: both are ended, and the job is requeued."""
    words = ["--train-iters", "100000"]
    number = jobs.submit("single_node.sbatch", "hung", RECIPE, *words, HANG_MINUTES="0.3", GPUS_PER_NODE="2")
    jobs.wait_for_step(number, 2)
    jobs.signal_ranks(number, signal.SIGSTOP, rank="1")
    jobs.wait_for_text(number, "no sign of life for HANG_MINUTES=0.3 minutes", seconds=120)
    jobs.cluster.wait_for(number, "PENDING", seconds=120)
    jobs.cluster.make_eligible(number)
    jobs.wait_for_step(number, 2, "restart 1", seconds=300)
    jobs.cluster.command("scancel", str(number))
    job = jobs.cluster.wait_for(number, "CANCELLED")
    assert "failed with status 137; requeued" in jobs.cluster.output(job)


@pytest.mark.slow
def test_a_cancelled_job_saves_and_is_not_requeued(jobs: Jobs) -> None:
    number = jobs.submit("single_node.sbatch", "cancelled", RECIPE, "--train-iters", "100000")
    jobs.wait_for_step(number, 2)
    jobs.cluster.command("scancel", str(number))
    job = jobs.cluster.wait_for(number, "CANCELLED")
    assert job["Restarts"] == "0"
    jobs.wait_for_text(number, "cancelled")
    assert open_checkpoint(jobs.folder / "cancelled" / "checkpoints").iteration >= 2


@pytest.mark.slow
def test_a_file_ends_the_job_and_another_job_evaluates_its_checkpoints(jobs: Jobs) -> None:
    words = ["--train-iters", "100000", "--seq-length", "256", "--max-position-embeddings", "256"]
    number = jobs.submit("single_node.sbatch", "filed", RECIPE, *words)
    jobs.wait_for_step(number, 2, seconds=400)
    saved = jobs.folder / "filed" / "checkpoints"
    (saved / "stop").touch()
    output = jobs.wait_until_done(number, 400)
    assert f"stopped by the file {saved / 'stop'}" in output
    assert f"job {number}: done" in output
    assert (jobs.folder / "logs" / str(number) / "restart-0" / "heartbeat").exists()
    tasks = [
        "--once",
        "--tasks",
        "meap_kv_logprob",
        "--kv-digits",
        "2",
        "--kv-pairs",
        "4",
        "--no-kv-instruction",
        "--samples",
        "2",
    ]
    output = jobs.wait_until_done(jobs.submit("follow.sbatch", "followed", str(saved), *tasks), 600)
    assert "1 checkpoints in" in output
    assert (saved / "evaluation" / "scores.csv").exists()


def test_preprocessing(jobs: Jobs, corpus: Corpus) -> None:
    text = jobs.folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in corpus.documents[:50]))
    number = jobs.submit(
        "preprocess.sbatch", "preprocess", "--input", str(text), "--output-prefix", str(jobs.folder / "made"),
        "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", corpus.tokenizer, "--append-eod",
    )  # fmt: skip
    jobs.wait_until_done(number)
    assert read_index(str(jobs.folder / "made_text_document")).tokens > 1000


REFUSED: dict[str, tuple[list[str], dict[str, str], str]] = {
    "no recipe": (["single_node.sbatch"], {}, "error: recipe '': no such file"),
    "no checkout": (["single_node.sbatch", RECIPE], {"CHECKOUT": "/nowhere"}, "error: CHECKOUT='/nowhere': no"),
    "no GPUs": (["single_node.sbatch", RECIPE], {"GPUS_PER_NODE": ""}, "error: GPUS_PER_NODE is not set"),
    "GPUs missing": (
        ["single_node.sbatch", RECIPE], {"MEAP_DEVICE": "cuda", "GPUS_PER_NODE": "8"},
        "error: node node1: nvidia-smi does not run",
    ),
    "no RUNS": (["mask_ratios.sbatch", RECIPE], {}, "error: RUNS is not set"),
    "no flags": (["preprocess.sbatch"], {}, "error: no flags; usage: sbatch"),
    "no run": (["follow.sbatch"], {}, "error: no run; usage: sbatch"),
    "broken SETUP": (["single_node.sbatch", RECIPE], {"SETUP": "false"}, "error: SETUP='false' fails on node"),
}  # fmt: skip


def test_refused_with_one_line(jobs: Jobs) -> None:
    """Before anything is started: what a site or a user has not set, and a node without its GPUs."""
    if shutil.which("nvidia-smi"):
        del REFUSED["GPUs missing"]
    numbers = {
        case: jobs.submit(words[0], case.replace(" ", "-"), *words[1:], **variables, array="0")
        for case, (words, variables, _) in REFUSED.items()
    }
    for case, number in numbers.items():
        job = jobs.cluster.wait_for(f"{number}_0", "FAILED")
        errors = [line for line in jobs.cluster.output(job).splitlines() if line.startswith("error:")]
        assert errors, jobs.cluster.output(job)
        assert errors[0].startswith(REFUSED[case][2]), errors
        assert job["Restarts"] == "0"


@pytest.mark.parametrize("script", ["single_node", "multi_node", "mask_ratios", "preprocess", "follow"])
def test_outside_slurm(script: str) -> None:
    """One line says that the script is to be submitted; no Slurm is needed for that."""
    for variables in ({}, {"CHECKOUT": str(REPOSITORY)}):
        path = f"{SCRIPTS}/{script}.sbatch"
        environment = {"PATH": os.environ["PATH"], **variables}
        done = subprocess.run(["bash", path, RECIPE], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("error: ")
        assert f"sbatch {path}" in done.stderr
