"""Every command block of README and docs is run by a shell, as written and in order, in a clean checkout.

The shell, the recipes and the Slurm scripts are real. The programs that they start only report what they were asked
for, and each is then parsed by the real parser of that program.
"""

import argparse
import functools
import importlib
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from megatron_meap.flags import with_files
from megatron_meap.trainer import arguments
from tests.launch import MODEL, REPOSITORY, TRAINING

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL), 1)
]
OTHERS = {"pip", "lm_eval", "tensorboard", "xz", "nvidia-smi", "docker", "apptainer", "sky"}
"""Other projects' programs, whose flags are not parsed here."""
REPORTED = ("python", "torchrun", "make", "sbatch", *OTHERS)
REPORTER = """#!{python}
import json, os, sys
with open(os.environ["REPORT"], "a") as report:
    report.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git knows, an environment of reporters, and the files that the blocks take as given."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    names = listed.stdout.split() if listed.returncode == 0 else []
    for name in names or pytest.skip("the files of a clean checkout are those that git knows; this is no checkout"):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in REPORTED:
        (programs / name).write_text(REPORTER.format(python=sys.executable))
        (programs / name).chmod(0o755)
    (programs / "nvidia-smi").write_text("#!/bin/sh\nprintf 'GPU\\n%.0s' 1 2 3 4 5 6 7 8\n")
    (programs / "activate").write_text(f"PATH={programs}:$PATH\n")
    for name in ("runs/demo", "runs/20b/checkpoints", "checkpoints/llama", "data"):
        (folder / name).mkdir(parents=True)
    for name in ("tokenizer.model", "train_text_document.bin", "train_text_document.idx"):
        (folder / "runs" / "demo" / name).touch()
        (folder / "data" / name).touch()
    (folder / "checkpoints/llama/megatron_flags.txt").write_text(" ".join(MODEL))
    (folder / "runs/20b/checkpoints/branch_flags.txt").write_text("--train-iters 20000")
    return folder


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_runs_and_its_programs_take_its_flags(block: str, checkout: Path, monkeypatch, tmp_path: Path) -> None:
    block = re.sub(r'^FLAGS=".*', "", block, flags=re.MULTILINE)  # a reader's own
    run_and_parse(
        f"FLAGS='{' '.join(MODEL + TRAINING)}'\n{block}", {"GPUS_PER_NODE": "8"}, checkout, monkeypatch, tmp_path
    )


def test_the_task_for_spot_instances_trains_its_recipe(checkout: Path, monkeypatch, tmp_path: Path) -> None:
    task = yaml.safe_load((REPOSITORY / "examples/environments/sky.yaml").read_text())
    variables = {name: str(value) for name, value in task["envs"].items()} | {"SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    with pytest.raises(AssertionError, match="NAME is not set"):
        run_and_parse(task["run"], variables, checkout, monkeypatch, tmp_path)
    asked = run_and_parse(task["run"], variables | {"NAME": "first"}, checkout, monkeypatch, tmp_path)
    (command,) = [words for words in asked if words[0] == "torchrun"]
    assert "/bucket/first/checkpoints" in command
    assert "/bucket/data/train_text_document" in command


def run_and_parse(
    script: str, variables: dict[str, str], checkout: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> list[list[str]]:
    """Run a script in the checkout, and parse the commands that it has asked for, which are returned."""
    report = folder / "report"
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "REPORT": str(report), **variables}
    script = f"set -eu\nsource .venv/bin/activate\n{script}"
    done = subprocess.run(["bash", "-c", script], cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = [json.loads(line) for line in report.read_text().splitlines()]
    assert asked
    monkeypatch.chdir(checkout)
    for command in asked:
        with monkeypatch.context() as patches:
            parse(command, patches)
    return asked


class Parsed(Exception):
    """A program has parsed its flags; it goes no further."""


def parse(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a command line to the parser of its program."""
    program, *words = command
    if program == "torchrun" or (program == "python" and words[:1] == ["-u"]):
        words = words[next(place for place, word in enumerate(words) if word.endswith(".py")) :]
    if program == "make":
        makefile = Path("Makefile").read_text()
        for word in words:
            name, _, value = word.partition("=")
            assert f"$({name})" in makefile if value else re.search(rf"^{name}:", makefile, re.MULTILINE), word
    elif program == "sbatch":
        scripts = [word for word in words if word.endswith((".sbatch", ".sh"))]
        assert scripts
        assert all(Path(script).is_file() for script in scripts)
        if scripts[0].endswith("follow.sbatch"):
            parse_tool("tools/follow_run.py", words[words.index(scripts[0]) + 1 :], monkeypatch)
        elif scripts[0].endswith("preprocess.sbatch"):
            parse_tool("tools/preprocess_data.py", words[words.index(scripts[0]) + 1 :], monkeypatch)
    elif program not in OTHERS and words[0].endswith(".py"):
        assert Path(words[0]).is_file(), words[0]
        parse_tool(words[0], words[1:], monkeypatch)
    else:
        assert program in OTHERS or words[0] in ("-c", "-m"), command


def parse_tool(script: str, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it has parsed its flags: Megatron's and ours, or those of one of the tools."""
    monkeypatch.setattr(sys, "argv", [script, *flags])
    name = Path(script).stem
    if name == "pretrain_gpt_meap":
        known = [flag for flag in with_files(flags) if flag not in ("--dry-run", "--plan")]
        monkeypatch.setattr(sys, "argv", [script, *known])
        arguments.parse_flags()
        return
    parse_known = argparse.ArgumentParser.parse_known_args

    def only_parse(parser, *args, **kwargs):
        _, left = parse_known(parser, *args, **kwargs)
        assert not left or name in ("inspect_batches", "plan_run"), left  # what is left goes to the trainer's parser
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", only_parse)
    start = functools.partial(runpy.run_path, script, run_name="__main__")
    if Path(script).parent.name == "tools":
        start = importlib.import_module(f"megatron_meap.commands.{name}").main
    with pytest.raises(Parsed):
        start()


def links() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" not in target:
                yield page, target


def test_links_lead_somewhere() -> None:
    """To a file that is there and, in a page, to one of its headings."""
    for page, target in links():
        name, _, heading = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), f"{page.name}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, f"{page.name}: {target}"


def test_the_index_names_every_page() -> None:
    index = (REPOSITORY / "docs" / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"({page.name})" not in index and page.name != "README.md"] == []
