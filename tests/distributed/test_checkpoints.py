"""Checkpoints: another layout, a damaged file, a full disk, asynchronous saving, and deleting old ones."""

import contextlib
import json
import os
import shutil
import subprocess
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint import FileSystemReader

from megatron_meap.checkpoint import latest
from megatron_meap.errors import UsageError
from megatron_meap.trainer import resume
from tests.conftest import Corpus
from tests.launch import MODEL, TRAINING, Run, launch, launch_many
from tests.sft import prepare

CHAIN = {
    "tp2": "--tensor-model-parallel-size 2",
    "pp2": "--pipeline-model-parallel-size 2",
    "dp2": "",
    "one": "",
}
"""Layouts of a run that is stopped and resumed in the next one, every four steps."""


def common(corpus: Corpus, folder: Path) -> list[str]:
    return [*MODEL, *TRAINING, *corpus.data_flags, "--data-cache-path", str(folder / "cache"), "--train-iters", "16"]


@pytest.mark.parametrize(
    "optimizer",
    [pytest.param("", marks=pytest.mark.slow), "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"],
)
def test_resharding(corpus: Corpus, tmp_path: Path, optimizer: str) -> None:
    """A run that changes its layout at every stop logs what a run of one process logs, optimizer state included."""
    flags = [*common(corpus, tmp_path), *optimizer.split()]
    start = str(tmp_path / "start")
    chain = str(tmp_path / "chain")
    first = [*flags, "--load", start, "--finetune"]
    one = {
        "initial": [*flags, "--train-iters", "1", "--save", start, "--save-interval", "1"],
        "whole": first,
    }
    done = launch_many(1, one, tmp_path)
    two, last = {}, {}
    for number, (name, layout) in enumerate(CHAIN.items(), start=1):
        resumed = ["--load", chain, "--save", chain, "--save-interval", "4", "--exit-interval", str(4 * number)]
        begun = [*first, *resumed[2:]] if number == 1 else [*flags, *resumed]
        (last if name == "one" else two)[name] = [*begun, *layout.split()]
    done |= launch_many(2, two, tmp_path)
    done |= launch_many(1, last, tmp_path)
    seen: dict[int, float] = {}
    for name in CHAIN:
        steps = done[name].steps
        assert len(steps) == 4, name
        seen |= {step: values["lm loss"] for step, values in steps.items()}
    whole = done["whole"].steps
    assert sorted(seen) == sorted(whole)
    for step, values in whole.items():
        assert seen[step] == pytest.approx(values["lm loss"], abs=1e-4), step


@dataclass
class Saved:
    """Runs of one launch, each of which saved in the folder of its name."""

    folder: Path
    flags: list[str]
    """Of `run`: 6 steps, saved at every one."""
    runs: dict[str, Run]


@pytest.fixture(scope="module")
def saved(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("saved")
    flags = [*common(corpus, folder), "--train-iters", "6", "--save-interval", "1"]
    more = {
        "run": [],
        "asynchronous": ["--async-save", "--save-interval", "2", "--meap-keep-last", "2"],
        "left_out": ["--train-iters", "4", "--iterations-to-skip", "4", "--save-interval", "2"],
        "old_format": ["--train-iters", "1", "--ckpt-format", "torch", "--no-save-rng"],
        "pruned": ["--train-iters", "9", "--meap-keep-last", "2", "--meap-keep-every", "4"],
    }
    runs = {name: [*flags, "--save", str(folder / name), *own] for name, own in more.items()}
    runs["evaluated"] = [*flags, "--skip-train", "--split", "8,2,0", "--eval-iters", "1"]
    return Saved(folder, flags, launch_many(1, runs, folder))


def test_a_run_without_steps_evaluates(saved: Saved) -> None:
    assert "validation loss at iteration 0 on validation set | lm loss value" in saved.runs["evaluated"].output


@pytest.mark.parametrize(
    "damage",
    [
        "flipped",
        "torn pointer",
        pytest.param("truncated", marks=pytest.mark.slow),
        pytest.param("missing", marks=pytest.mark.slow),
        pytest.param("no integrity record", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(saved: Saved, tmp_path: Path, damage: str) -> None:
    """It is named, and the run continues from the newest intact one with the same losses."""
    copy = tmp_path / "run"
    shutil.copytree(saved.folder / "run", copy)
    newest = copy / "iter_0000006"
    shard = newest / "__0_0.distcp"
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        os.truncate(shard, shard.stat().st_size // 2)
    elif damage == "flipped":
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    elif damage == "torn pointer":
        (copy / latest.POINTER).write_text("")
        shutil.rmtree(newest)
    else:  # as if the machine had stopped in the middle of saving
        (newest / "integrity.json").unlink()
        (newest / "metadata.json").unlink()
    resumed = launch(1, [*saved.flags, "--load", str(copy), "--save", str(copy)])
    assert resumed.returncode == 0, resumed.output[-3000:]
    warning = next(line for line in resumed.output.splitlines() if line.startswith("warning:"))
    assert "starting from iteration 5 instead" in warning
    assert ("latest_checkpointed" if damage == "torn pointer" else "iter_0000006 is damaged") in warning
    assert list(resumed.steps) == [6]
    assert resumed.losses() == saved.runs["run"].losses()[5:]
    assert latest.pointer(copy) == "6"
    assert latest.damage(newest) is None


def test_the_learning_rate_changes_on_purpose(saved: Saved, tmp_path: Path) -> None:
    """One of two flags says whose schedule counts; without them nothing starts."""
    whole = saved.runs["run"]
    flags = [*saved.flags, "--load", str(saved.folder / "run"), "--ckpt-step", "3", "--lr", "2e-3"]
    with pytest.raises(UsageError, match=r"--lr 0.001 there, 0.002 here; add --override-opt_param-scheduler"):
        prepare(*flags)
    runs = {
        "own": [*flags, "--override-opt_param-scheduler"],
        "other": [*flags, "--use-checkpoint-opt_param-scheduler"],
    }
    done = launch_many(1, runs, tmp_path)
    for name, factor in (("own", 2), ("other", 1)):
        whose = "this run's" if name == "own" else "the checkpoint's"
        assert f"has another schedule: --lr 0.001 there, 0.002 here; {whose} is taken" in done[name].output
        for step in (5, 6):
            share = (whole.steps[step]["learning rate"] - 1e-4) / 9e-4  # of the way from the least to the largest
            expected = 1e-4 + share * (factor * 1e-3 - 1e-4)
            assert done[name].steps[step]["learning rate"] == pytest.approx(expected, rel=1e-4)
    assert done["other"].steps[6]["lm loss"] == whole.steps[6]["lm loss"]
    assert done["own"].steps[6]["lm loss"] != whole.steps[6]["lm loss"]


def test_old_checkpoints_are_pruned(saved: Saved) -> None:
    assert latest.iterations(saved.folder / "pruned") == [4, 8, 9]


def test_what_is_learned_before_a_last_step_without_data_is_saved(saved: Saved) -> None:
    assert latest.iterations(saved.folder / "left_out") == [2, 4]
    assert "skipped step at iteration 4 | its data is left out" in saved.runs["left_out"].output


def test_a_run_that_resumes_from_the_old_format_is_compared_too(saved: Saved) -> None:
    folder = str(saved.folder / "old_format")
    flags = [*saved.flags, "--ckpt-format", "torch", "--load", folder]
    for more, words in (
        (["--no-load-rng", "--meap-mask-ratio", "0.3"], "--meap-mask-ratio 0.15 there, 0.3 here"),
        ([], "no state of random generators .*add --no-load-rng"),
        (["--no-load-rng", "--use-distributed-optimizer"], "drop --use-distributed-optimizer"),
    ):
        with pytest.raises(UsageError, match=words):
            prepare(*flags, *more, "--dry-run")
    here = prepare(*flags, "--override-opt_param-scheduler", "--no-load-rng", "--dry-run")
    there = Namespace(tensor_model_parallel_size=2, pipeline_model_parallel_size=1)
    with pytest.raises(UsageError, match="--tensor-model-parallel-size 2 there, 1 here"):
        resume._refuse_what_the_old_format_cannot(Path(folder), there, here)
    for file in Path(folder).glob("iter_*/mp_rank_00/*.pt"):
        os.truncate(file, 1000)
    with pytest.raises(UsageError, match=r"model_optim_rng\.pt is damaged"):
        prepare(*flags, "--dry-run")


def test_asynchronous_saving(saved: Saved, corpus: Corpus) -> None:
    """The same checkpoints, complete and verified before the pointer moves, and as many as are kept."""
    run, folder = saved.runs["asynchronous"], saved.folder / "asynchronous"
    assert run.losses() == saved.runs["run"].losses()
    assert "Disabling --async-save" not in run.output
    assert run.output.count("scheduled an async checkpoint save") == 3
    assert latest.pointer(folder) == "6"
    assert latest.iterations(folder) == [4, 6]
    for iteration in (4, 6):
        path = latest.directory(folder, iteration)
        assert latest.damage(path) is None
        assert "tokenizer/tokenizer.model" in json.loads((path / "integrity.json").read_text())["files"]
        assert (path / "tokenizer/tokenizer.model").read_bytes() == Path(corpus.tokenizer).read_bytes()
        assert_same_tensors(path, latest.directory(saved.folder / "run", iteration))


def assert_same_tensors(*checkpoints: Path) -> None:
    """Weights and optimizer state of two checkpoints are equal, every bit."""
    found: list[dict[str, Any]] = []
    for checkpoint in checkpoints:
        reader = FileSystemReader(checkpoint)
        stored = reader.read_metadata().state_dict_metadata.items()
        tensors = {
            key: torch.empty(each.size, dtype=each.properties.dtype) for key, each in stored if hasattr(each, "size")
        }
        torch.distributed.checkpoint.load(tensors, storage_reader=reader, no_dist=True)
        found.append(tensors)
    assert len(found[0]) > 10
    assert all(torch.equal(found[0][key], other) for key, other in found[1].items())


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A small separate file system that is soon full."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root, and a machine that lets it")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_previous_checkpoint(corpus: Corpus, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "6m") as disk:
        done = launch(1, [*common(corpus, tmp_path), "--save", str(disk / "run"), "--save-interval", "1"])
        assert done.returncode != 0
        said = next(line for line in done.output.splitlines() if line.startswith("error: --save"))
        kept = latest.pointer(disk / "run")
        assert kept is not None
        assert "the disk is full" in said
        assert f"the last complete checkpoint is that of iteration {kept}" in said
        assert latest.damage(latest.directory(disk / "run", int(kept))) is None


@pytest.mark.slow
@pytest.mark.parametrize("what", ["data-cache-path", "tensorboard-dir"])
def test_a_disk_that_gets_full_outside_of_saving_is_named(corpus: Corpus, tmp_path: Path, what: str) -> None:
    """In one line, behind the error itself."""
    with small_disk(tmp_path / "disk", "16k") as disk:
        done = launch(1, [*common(corpus, tmp_path), f"--{what}", str(disk / "there"), "--log-interval", "1"])
        said = [line for line in done.output.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2
        assert len(said) == 1
        assert f"{disk}/there" in said[0]
        assert "the disk is full; free some space" in said[0]
        assert "Traceback" in done.output


def test_every_rank_hashes_what_it_wrote(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And, at a start, its share of what is verified: rank 0 alone would keep the others waiting for minutes."""
    log = tmp_path / "log"
    monkeypatch.setenv("HASH_LOG", str(log))
    flags = [*common(corpus, tmp_path), "--use-distributed-optimizer", "--train-iters", "4", "--save-interval", "1"]
    runs = {}
    for kind in ("sync", "async"):
        folder = str(tmp_path / kind)
        runs[kind] = [*flags, "--save", folder, *(["--async-save"] if kind == "async" else [])]
        runs[f"{kind}-resumed"] = [*flags, "--load", folder]
    launch_many(2, runs, tmp_path, script="hash_log.py")
    hashed: dict[Path, list[tuple[str, str]]] = {}
    for line in log.read_text().splitlines():
        rank, process, path = line.split(maxsplit=2)
        hashed.setdefault(Path(path), []).append((rank, process))
    for kind, saver in (("sync", "trainer"), ("async", "saver")):
        assert latest.damage(latest.directory(tmp_path / kind, 2)) is None
        newest = latest.directory(tmp_path / kind, 4)
        files = [path for path in newest.rglob("*") if path.is_file() and path.name != "integrity.json"]
        verified = []
        for path in files:
            data = path.suffix == ".distcp"
            written, *read = hashed[path]
            assert written == (path.name.removeprefix("__")[0] if data else "0", saver if data else "trainer"), path
            assert len(read) == 1, path  # when it was loaded
            verified += read
        assert set(verified) == {("0", "trainer"), ("1", "trainer")}
        assert len([path for path in files if path.name.startswith("__1_")]) > 0
    for iteration in (1, 4):  # the last one by a plan that was made for another
        assert_same_tensors(*(latest.directory(tmp_path / kind, iteration) for kind in ("sync", "async")))
