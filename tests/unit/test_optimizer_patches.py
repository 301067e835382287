"""Loading of optimizers: groups of another class or learning rate, and an error that only looks like a full disk."""

import errno
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from megatron.training import training

from megatron_meap.backend import optimizer_patches
from megatron_meap.checkpoint import latest

SCHEDULE = {"max_lr": 1e-3, "min_lr": 1e-4}


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> Namespace:
    flags = Namespace(use_checkpoint_opt_param_scheduler=False)
    monkeypatch.setattr("megatron.training.get_args", lambda: flags)
    return flags


def groups(**changes: object) -> list[dict]:
    """Two groups as Megatron makes them, with and without weight decay."""
    common = {"betas": (0.9, 0.95), "eps": 1e-8, "lr": 5e-4, **SCHEDULE, **changes}
    return [{**common, "params": [0, 1], "wd_mult": 1.0}, {**common, "params": [2], "wd_mult": 0.0}]


def test_another_learning_rate_finds_its_groups(flags: Namespace) -> None:
    current = groups(max_lr=2e-3)
    adopted = optimizer_patches.adopt_groups(current, groups()[::-1])
    assert [(group["wd_mult"], group["max_lr"], group["params"]) for group in adopted] == [
        (0.0, 2e-3, [2]),
        (1.0, 2e-3, [0, 1]),
    ]
    flags.use_checkpoint_opt_param_scheduler = True
    adopted = optimizer_patches.adopt_groups(current, groups())
    assert {group["max_lr"] for group in (*adopted, *current)} == {1e-3}


def test_groups_of_another_class_of_optimizer(flags: Namespace) -> None:
    """Keys that the saved group lacks keep this run's values; Adam's settings are those of the flags."""
    adopted = optimizer_patches.adopt_groups(groups(bias_correction=True, betas=(0.9, 0.99)), groups(foreach=None))
    assert all(group["bias_correction"] and group["betas"] == (0.9, 0.99) for group in adopted)


def test_steps_move_between_groups_and_parameters() -> None:
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    saved = {"state": {0: {}}, "param_groups": [{"step": 7}, {"step": 7}]}  # Transformer Engine's
    optimizer_patches._convert_steps(adam, saved)
    assert saved["state"]["common_step"] == 7
    assert saved["param_groups"] == [{}, {}]
    optimizer_patches._convert_steps(object(), saved)  # and back
    assert saved == {"state": {0: {}}, "param_groups": [{"step": 7}, {"step": 7}]}


def save_checkpoint(error: BaseException) -> None:
    raise error


def test_the_disk_is_full_only_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An incomplete checkpoint and little space are not enough: the error must come from saving."""
    (tmp_path / "iter_0000002").mkdir()
    (tmp_path / "iter_0000002" / "part").write_bytes(bytes(100))

    def said(error: BaseException, function=save_checkpoint) -> str | None:
        try:
            function(error)
        except type(error) as raised:
            return latest.full_disk(tmp_path, raised)
        return None

    def elsewhere(error: BaseException) -> None:
        raise error

    assert said(OSError(errno.ENOSPC, "No space left on device")) is not None
    assert said(ValueError("a bug")) is None  # there is space
    monkeypatch.setattr(latest.shutil, "disk_usage", lambda _: Namespace(free=0))
    assert said(RuntimeError("a worker failed")) is not None
    assert said(RuntimeError("a bug in the data"), elsewhere) is None
    assert training.save_checkpoint.__name__ == "save_checkpoint"  # by which it is known
