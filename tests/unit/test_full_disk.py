"""A disk that fills up outside of saving: one line, preceded by the error; a failing log does not end the run."""

import errno
import os
import sys
from argparse import Namespace
from collections import namedtuple
from pathlib import Path

import pytest
from megatron.training import global_vars

from megatron_meap.errors import UsageError
from megatron_meap.trainer import output, run


@pytest.fixture(autouse=True)
def own_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `Output.install` replaces comes back."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_log_that_cannot_be_written_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / output.LOG).symlink_to("/dev/full")
    said = output.Output().install()
    said.open_log(str(tmp_path), "=== heading")
    said.quiet = False
    print("iteration 1")
    print("iteration 2")
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        "warning: train.log in --save lacks lines from here on (No space left on device); the training continues",
        "iteration 1",
        "iteration 2",
    ]


def no_space(name: str | None) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([name] if name else []))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (no_space("/scratch/cache/index.npy"), "/scratch/cache/index.npy: the disk is full; free some space"),
        (no_space(None), "--tensorboard-dir {folder}/board: the disk is full; free some space"),
        (OSError("4096 requested and 0 written"), "--tensorboard-dir {folder}/board: the disk is full"),
    ],
)
def test_a_full_disk_is_one_line_that_names_it(
    error: OSError, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """By the file; or, where the error does not tell (TensorBoard, NumPy), by the directory that has no room."""
    board, save = tmp_path / "board", tmp_path / "run"
    for each in (board, save):
        each.mkdir()
    args = Namespace(tensorboard_dir=str(board), save=str(save), data_cache_path=None)
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0 if path == str(board) else 2**40))

    def fail(*_: object) -> None:
        try:
            raise error
        except OSError as first:
            raise RuntimeError("the writer's thread failed") from first

    monkeypatch.setattr(run, "_run", fail)
    with pytest.raises(UsageError) as raised:
        run.run()
    assert str(raised.value).startswith(said.format(folder=tmp_path))
    assert "\n" not in str(raised.value)
    shown = capsys.readouterr().err
    assert "the writer's thread failed" in shown
    assert str(error) in shown


def test_other_errors_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("our own bug")

    monkeypatch.setattr(run, "_run", fail)
    with pytest.raises(RuntimeError, match="our own bug"):
        run.run()
