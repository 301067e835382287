"""`--help` of every program; every flag of this project is shown, documented and declared once."""

import dataclasses
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_meap import cli
from megatron_meap.errors import UsageError
from megatron_meap.flags import Parser
from megatron_meap.trainer.arguments import GROUPS
from tests.launch import ENTRY, REPOSITORY

SCRIPTS = sorted(path for folder in ("tools", "benchmarks", "examples") for path in (REPOSITORY / folder).rglob("*.py"))
MEGATRONS = (cli.PRETRAIN, "inspect-batches", "plan-run")
"""Subcommands whose flags are the trainer's."""

RUNNABLE = [path for path in SCRIPTS if '__name__ == "__main__"' in path.read_text()]


def own_flags() -> list[str]:
    """This project's flags, from the dataclasses."""
    settings = [each for _, _, *group in GROUPS for each in group]
    return [
        each.flag_of(field.name) for each in settings for field in dataclasses.fields(each) if "help" in field.metadata
    ]


def printed(call, capsys: pytest.CaptureFixture) -> str:
    """What a command prints before it ends well."""
    with pytest.raises(SystemExit) as ended:
        call()
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("script", RUNNABLE, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_scripts_explain_themselves(script: Path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.syspath_prepend(str(script.parent))
    assert "usage" in printed(lambda: runpy.run_path(str(script), run_name="__main__"), capsys)


@pytest.mark.parametrize(("script", "missing"), [("tools/check_data.py", "megatron_meap"), (ENTRY.name, "torch")])
def test_a_python_without_our_packages_is_said(script: str, missing: str):
    """As where the environment is not active."""
    command = [sys.executable, "-S", "-E", script, "--data", "x"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {sys.executable} has no {missing}: `source .venv/bin/activate`")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", [name for name in cli.subcommands() if name != cli.PRETRAIN])
def test_subcommands_explain_themselves(name: str, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["megatron-meap", name, "--help"])
    assert "usage" in printed(cli.main, capsys)


@pytest.mark.parametrize("name", [name for name in cli.subcommands() if name not in MEGATRONS])
def test_tools_refuse_a_flag_in_one_line(name: str, monkeypatch, capsys):
    """A mistyped flag is reported before the flag that is missing because of it."""
    monkeypatch.setattr(sys, "argv", ["megatron-meap", name, "--outptu=x"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert len(said) == 1
    assert said[0].startswith("error: --outptu: no such flag")


def test_a_mistyped_flag_is_put_right():
    parser = Parser("any")
    parser.add_argument("--vocab-size", required=True)
    for words, line in {
        ("--vocabsize=3",): "--vocabsize: no such flag; did you mean --vocab-size?; --vocab-size: missing; --help",
        (): "--vocab-size: missing; --help lists the flags",
        ("--vocab", "3", "--vocabsize"): "--vocabsize: no such flag; did you mean --vocab-size?$",
    }.items():
        with pytest.raises(UsageError, match="^" + line.replace("?;", r"\?;").replace("?$", r"\?$")):
            parser.parse_args(words)


def test_the_command_lists_its_subcommands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["megatron-meap"])
    cli.main()
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("pretrain", "preprocess-data", "evaluate"))
    monkeypatch.setattr(sys, "argv", ["megatron-meap", "check_data", "--help"])  # as tools/check_data.py is called
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    monkeypatch.setattr(sys, "argv", ["megatron-meap", "preproces"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()


def test_training_shows_our_flags_first_and_megatrons_on_request():
    short, whole = (
        subprocess.run([sys.executable, ENTRY, word], capture_output=True, text=True, check=True).stdout
        for word in ("--help", "--help-all")
    )
    for flag in own_flags():
        assert f"{flag} " in short or f"{flag}\n" in short or f"{flag}," in short, flag
    assert "--tensor-model-parallel-size" not in short
    assert "--tensor-model-parallel-size" in whole
    assert "--moe-paged-stash-buffer-size-factor-cuda" in whole
    assert whole.index("--meap-mask-ratio") < whole.index("--tensor-model-parallel-size")


def test_every_flag_is_documented_and_declared_once():
    flags = own_flags()
    assert len(flags) == len(set(flags))
    docs = " ".join(path.read_text() for path in [*(REPOSITORY / "docs").glob("*.md"), REPOSITORY / "README.md"])
    named = set(re.findall(r"--[a-z0-9-]+", docs.replace("--[no-]", "--").replace("--no-meap", "--meap")))
    assert set(flags) <= named
