"""Additions to Megatron's log, and how `watch_training.py` shows them."""

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_meap.backend.megatron_patches import Step
from megatron_meap.commands import watch_training
from megatron_meap.errors import UsageError
from megatron_meap.inspection.training_log import read_log
from megatron_meap.meap.losses import bits_per_byte
from megatron_meap.trainer import after_step, log_line
from megatron_meap.trainer.log_line import FEWEST, LogLine, LogSettings, Spikes


@pytest.mark.parametrize("seed", range(5))
def test_a_spike_is_found_and_a_falling_loss_is_none(seed: int) -> None:
    random = np.random.default_rng(seed)
    losses = 2 + 8 * np.exp(-np.arange(4000) / 500) + random.normal(0, 0.05, 4000)
    at = int(random.integers(FEWEST, 4000))
    spikes = Spikes(7.0)
    found = [step for step, loss in enumerate(losses) if spikes.add(loss + 20 * (step == at)) is not None]
    assert found == [at]
    assert spikes.add(float("nan")) is None
    assert spikes.add(float(losses[-1])) is None  # neither affects what later losses are compared with


def test_a_spike_in_a_flat_loss_is_found() -> None:
    spikes = Spikes(7.0)
    assert all(spikes.add(1.0 + step * 1e-6) is None for step in range(FEWEST))
    assert spikes.add(1.05) is None
    assert spikes.add(1.5) is not None


@pytest.mark.parametrize(
    ("value", "peak"), [("h100", 989.0), ("0.5", 0.5), ("1e3", 1000.0), ("measured", None), (None, None)]
)
def test_a_peak_is_named_given_or_measured(value: str | None, peak: float | None) -> None:
    args = Namespace(meap_peak_tflops=value)
    LogSettings.of(args).check()
    assert LogSettings.of(args).peak() == peak
    assert bool(log_line.lines(args)) is (value is not None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"peak_tflops": value}, f"--meap-peak-tflops {value}: expected") for value in ("h1000", "0", "-1", "nan", "inf")]
    + [({"loss_spike": value}, "--meap-loss-spike") for value in (-1.0, float("nan"), float("inf"))],
)
def test_what_is_no_peak_and_no_limit_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LogSettings(**changes).check()


def test_bits_are_counted_where_there_is_text() -> None:
    """Against a sum by hand: token 1 has no bytes, labels outside of the vocabulary do not count, nor masked ones."""
    losses = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]])
    labels = torch.tensor([[0, 1, 2, -100, 2]])
    found = bits_per_byte(losses, torch.tensor([[1, 1, 1, 1, 0.0]]), labels, torch.tensor([3, 0, 5]))
    assert found.tolist() == pytest.approx([(1 + 4) / np.log(2), 3 + 5])


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> LogLine:
    args = Namespace(
        meap_peak_tflops="1", meap_loss_spike=7.0, seq_length=64, world_size=2, rank=1, consumed_train_samples=0,
        meap_mask_ratio=0.0, meap_random_share=0.0, meap_kept_share=0.0, micro_batch_size=4, data_parallel_size=2,
        step_batch_size_schedule=None, train_samples=None, train_iters=100, global_batch_size=8,
        iterations_to_skip=[80],
    )  # fmt: skip
    monkeypatch.setattr("megatron.training.training.num_floating_point_operations", lambda *args, **kwargs: 4e11)
    monkeypatch.setattr("megatron.training.utils.is_last_rank", lambda: True)
    monkeypatch.setattr(after_step, "write", lambda values, iteration: None)
    monkeypatch.setattr(log_line, "write", lambda values, iteration: None)
    return LogLine(args)


def step(iteration: int, loss: float = 2.0, skipped: bool = False) -> Step:
    return Step([], None, iteration, {"lm loss": torch.tensor(loss)}, skipped, 1024.0, {})


def megatrons(iteration: int) -> str:
    return (
        f" [2026-01-01 00:00:00.0] iteration {iteration:8d}/     100 | consumed samples: {8 * iteration:12d} | elapsed "
        f"time per iteration (ms): 500.0 | learning rate: 1.0E-04 | global batch size:     8 | lm loss: 2.0E+00 |"
    )


def write_run(log: LogLine, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A log of a run with a spike, a skipped step and a validation."""
    now = 0.0
    monkeypatch.setattr(log_line.time, "monotonic", lambda: now)
    lines = ["  seq_length ...................... 64"]
    for iteration in range(1, 100):
        now, log.args.consumed_train_samples = 2.0 * iteration, 8 * iteration
        lines.append(log.rewrite(megatrons(iteration), step(iteration)))
        log.see(step(iteration, 9.0 if iteration == 60 else 2.0, skipped=iteration in (70, 80)))
        lines += capsys.readouterr().out.splitlines()
    lines.append(
        " validation loss at iteration 90 | lm loss value: 2.1E+00 | lm loss PPL: 8.0 | bits per byte value: 1.25 | "
    )
    path.parent.mkdir()
    path.write_text("\n".join(lines) + "\n")


def test_the_log_is_understood(log: LogLine, tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "one" / "train.log"
    write_run(log, path, monkeypatch, capsys)
    history = read_log(path)
    values = history.steps[99].values
    assert (values["tokens/s"], values["tokens/s/rank"]) == (1024.0, 512.0)
    assert (values["model TFLOP/s/rank"], values["MFU (%)"]) == (0.4, 40.0)
    assert history.steps[50].time_left == "0:01:40"  # two seconds a step, whatever the steps themselves take
    assert history.marked == {60, 70, 80}
    monkeypatch.setattr(sys, "argv", ["watch_training.py", str(path), "--once"])
    watch_training.main()
    progress, *notices = capsys.readouterr().out.splitlines()
    assert "validation 2.100 (1.250 bits per byte) | 1,024 tokens/s | MFU 40.0% | ETA 0:00:02" in progress
    assert notices == [
        "loss spike at iteration 60 | lm loss: 9.000000E+00 | mean before: 2.000000E+00 | "
        "standard deviations above it: 700.0",
        "skipped step at iteration 70 | gradients that are not finite, nothing learned | loss scale: 1024.0",
        "skipped step at iteration 80 | its data is left out (--iterations-to-skip)",
    ]


def test_a_loss_that_is_no_number_is_in_the_line(log: LogLine) -> None:
    """Megatron leaves it out, and goes on with `--no-check-for-nan-in-loss-and-grad`."""
    line = megatrons(3).replace(" lm loss: 2.0E+00 |", "")
    assert " lm loss: NAN |" in log.rewrite(line, step(3, float("nan")))
    assert "NAN" not in log.rewrite(line, step(3, skipped=True))
    assert "NAN" not in log.rewrite(megatrons(3), step(3))


def test_several_runs_are_one_picture(log: LogLine, tmp_path: Path, monkeypatch, capsys) -> None:
    write_run(log, tmp_path / "one" / "train.log", monkeypatch, capsys)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "out.txt").write_text(megatrons(3) + "\n")  # Megatron's own: no length, no bits per byte
    first, second = str(tmp_path / "one"), str(tmp_path / "two" / "out.txt")
    for names in ([first, second], [f"A={first}", f"B={second}"], [first]):
        picture = tmp_path / "picture.png"
        monkeypatch.setattr(sys, "argv", ["watch_training.py", *names, "--plot", str(picture)])
        watch_training.main()
        assert picture.read_bytes().startswith(b"\x89PNG")
        picture.unlink()
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["watch_training.py", first, f"B={second}", "--once"])
    watch_training.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["one", "one", "one", "one", "B"]
    monkeypatch.setattr(sys, "argv", ["watch_training.py", first, f"one={second}"])
    with pytest.raises(UsageError, match="two runs have the same name"):
        watch_training.main()
