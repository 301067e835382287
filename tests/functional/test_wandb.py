"""One run on Weights & Biases per training, however often it is resumed; none for refused runs."""

import os
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
from megatron.training import global_vars

from megatron_meap.errors import UsageError
from megatron_meap.trainer import wandb_run
from megatron_meap.trainer.log_names import WANDB_ID
from tests.conftest import Corpus
from tests.functional.test_record import flags_of
from tests.launch import MODEL, TRAINING, launch
from tests.sft import prepare


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, str | None]]:
    """Id and kind of resumption of every run that a W&B in the place of the real one was asked for."""
    runs: list[tuple[str | None, str | None]] = []

    class Error(Exception):
        pass

    def init(**settings: object) -> None:
        if settings["project"] == "no key":
            assert not sys.stdin.isatty(), "W&B asks for the key"
            raise Error("No API key configured.\nUse `wandb login` to log in.")
        runs.append((os.environ.get("WANDB_RUN_ID"), os.environ.get("WANDB_RESUME")))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=Error, __spec__=object()))
    monkeypatch.setattr(global_vars, "_GLOBAL_WANDB_WRITER", None)
    return runs


def begin(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    args = Namespace(
        wandb_project="any", wandb_exp_name="any", wandb_save_dir=None, wandb_entity=None, rank=1, world_size=2,
        save=str(folder), load=str(folder), finetune=False, meap_overwrite_checkpoints=False,
    )  # fmt: skip
    vars(args).update(changes)
    with monkeypatch.context() as start:  # a process of its own
        for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
            start.setenv(name, "")
            start.delenv(name)
        start.setattr(global_vars, "_GLOBAL_WANDB_WRITER", None)
        start.setattr(global_vars, "_GLOBAL_TENSORBOARD_WRITER", None)
        wandb_run.begin(args)
        assert bool(global_vars.get_tensorboard_writer()) == (args.rank == 1)  # without one Megatron logs nothing


def test_a_resumed_training_continues_its_run(begun: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        begin(tmp_path / "one", monkeypatch)
    begin(tmp_path / "two", monkeypatch, load=str(tmp_path / "one"))
    begin(tmp_path / "one", monkeypatch, load=None, meap_overwrite_checkpoints=True)
    begin(tmp_path / "one", monkeypatch, meap_overwrite_checkpoints=True)  # the same command, requeued
    first, again, branch, anew, requeued = begun
    assert first == again
    assert anew == requeued
    assert len({first[0], branch[0], anew[0]}) == 3
    assert {resume for _, resume in begun} == {"allow"}
    begin(tmp_path / "one", monkeypatch, rank=0)
    assert len(begun) == 5


def test_only_a_training_begins_a_run(
    begun: list, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that is refused, or that only looks at the data, does."""
    prepare(*flags_of(corpus, tmp_path, "--wandb-project", "any"))
    assert begun == []
    with pytest.raises(UsageError, match="--wandb-project: needs a directory"):
        wandb_run.check(Namespace(wandb_project="any", wandb_save_dir=None, save=None))
    monkeypatch.setattr("importlib.util.find_spec", dict.fromkeys(["wandb"]).__getitem__)
    with pytest.raises(UsageError, match="--wandb-project: needs the package wandb"):
        wandb_run.check(Namespace(wandb_project="any", wandb_save_dir=None, save=str(tmp_path)))


def test_what_wandb_refuses_is_one_line(begun: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal too, where it would ask for a key and the other ranks would wait for it."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(UsageError, match=r"--wandb-project: No API key configured. Use .*in; WANDB_MODE=offline"):
        begin(tmp_path, monkeypatch, wandb_project="no key")


@pytest.mark.slow
def test_wandb_itself_offline(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directories that it keeps for two starts of a training have the same id in their names."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "run"
    flags = [
        *MODEL,
        *TRAINING,
        *corpus.data_flags,
        "--data-cache-path",
        str(tmp_path / "cache"),
        "--wandb-project",
        "p",
    ]
    flags += ["--wandb-exp-name", "e", "--save", str(folder), "--load", str(folder), "--save-interval", "2"]
    for exit_at in ("2", "4"):
        done = launch(2, [*flags, "--exit-interval", exit_at])
        assert done.returncode == 0, done.output[-3000:]
    id = (folder / WANDB_ID).read_text()
    names = [path.name for path in (folder / "wandb/wandb").glob("offline-run-*")]
    assert len(names) == 2
    assert all(name.endswith(f"-{id}") for name in names)
    kept = [path.read_bytes() for path in (folder / "wandb/wandb").glob("offline-run-*/*.wandb")]
    assert all(b"learning-rate" in each and b"tokens/s" in each for each in kept)  # Megatron's values and ours
