"""`tools/inspect_checkpoint.py`: the record of a checkpoint, differences between two, and incomplete files."""

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_meap.checkpoint.reader import Checkpoint
from megatron_meap.commands.inspect_checkpoint import main
from megatron_meap.errors import UsageError
from megatron_meap.inspection import checkpoints
from megatron_meap.trainer import carried
from tests.conftest import Corpus
from tests.functional.test_record import flags_of
from tests.sft import prepare, save


@pytest.fixture(scope="module")
def folder(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of runs that differ in free settings, in settings with a warning or a refusal, and in the model."""
    folder = tmp_path_factory.mktemp("inspect")
    changes = {
        "one": [],
        "free": ["--micro-batch-size", "1", "--log-interval", "7"],
        "warned": ["--clip-grad", "2.0"],
        "refused": ["--seed", "5", "--meap-mask-seed", "1234", "--clip-grad", "2.0"],
        "model": ["--ffn-hidden-size", "96"],
    }
    for name, extra in changes.items():
        args = prepare(*flags_of(corpus, folder / name, *extra))
        save(args, folder / name / "run")
        carried.write(folder / name / "run/iter_0000002", carried.collect(args))
    return folder


@pytest.fixture
def tool(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Its exit status and what it prints."""
    monkeypatch.setenv("MEAP_DEVICE", "cpu")

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["inspect_checkpoint.py", *words])
        status = 0
        try:
            main()
        except SystemExit as ended:
            status = int(ended.code or 0)
        return status, capsys.readouterr().out

    return call


def test_the_record_is_shown(folder: Path, tool, corpus: Corpus) -> None:
    status, said = tool(str(folder / "one/run"))
    assert status == 0
    assert "iter_0000002: iteration 0, 151,872 parameters" in said
    assert f"carries the tokenizer {folder / 'one/run/iter_0000002/tokenizer/tokenizer.model'}" in said
    refused, warned = said.split("\nwarning")
    for line in (r"--seed +1234", r"--meap-mask-ratio +0.15", r"the blend's weights +0.9, 0.1", r"--split +90,10,0"):
        assert re.search(line, refused), line
    assert re.search(r"--clip-grad +1.0", warned)
    assert not re.search(r"--seed +1234", warned)
    assert "--micro-batch-size" not in said


@pytest.mark.parametrize(
    ("other", "status", "lines"),
    [
        ("free", 0, ["no setting that determines a run differs"]),
        ("warned", 0, ["warning: --clip-grad 2.0 there, 1.0 here"]),
        (
            "refused",
            1,
            [
                "refused, unless --meap-allow-changed-settings: --seed 5 there, 1234 here",
                "warning: --clip-grad 2.0 there, 1.0 here",
            ],
        ),
        ("model", 1, ["another model: ffn_hidden_size 96 there, 160 here"]),
    ],
)
def test_two_are_compared(folder: Path, tool, other: str, status: int, lines: list[str]) -> None:
    found, said = tool(str(folder / "one/run"), "--compare", str(folder / other / "run"))
    assert found == status
    assert said.splitlines()[2:] == lines


def test_schedules_are_compared(folder: Path, tool, monkeypatch: pytest.MonkeyPatch) -> None:
    read = checkpoints.open_checkpoint

    def with_schedule(path: str, iteration: int | None = None) -> Checkpoint:
        steps = 240 if "free" in path else 160
        return replace(read(path, iteration), scheduler={"lr_decay_steps": steps, "num_steps": 8 * steps})

    monkeypatch.setattr(checkpoints, "open_checkpoint", with_schedule)
    status, said = tool(str(folder / "one/run"), "--compare", str(folder / "free/run"))
    assert status == 1
    assert said.splitlines()[2:] == ["another schedule: decay of the learning rate (samples) 240 there, 160 here"]


def test_damaged_files_are_named(folder: Path, tool, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder / "one/run", copy)
    hashes = len([path for path in (copy / "iter_0000002").glob("*") if path.is_file()]) - 1
    status, said = tool(str(copy), "--verify")
    assert status == 0
    assert re.search(rf"iter_0000002: {hashes} files, [\d.]+ MB, all as they were saved", said)
    shard = next((copy / "iter_0000002").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UsageError, match=rf"damaged: {shard.name}: hash mismatch"):
        tool(str(copy), "--ckpt-step", "2", "--verify")
