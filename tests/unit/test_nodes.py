"""The check of a node's GPUs; that of the network between nodes is tested with nodes (tests/slurm/test_nodes.py)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_meap.backend import device
from megatron_meap.cluster.nodes import Node, check_gpus, check_pytorch
from megatron_meap.errors import UsageError
from tests.launch import REPOSITORY, environment

NODE = Node("node7", "10.0.0.7")


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the driver's tool, on a node with seven GPUs."""
    tool = tmp_path / "nvidia-smi"
    lines = "\n".join(f"GPU {number}: NVIDIA H100 (UUID: GPU-{number})" for number in range(7))
    tool.write_text(f"#!/bin/sh\ncat <<END\n{lines}\nEND\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tool


def test_gpus(nvidia_smi: Path) -> None:
    check_gpus(NODE, 7)
    with pytest.raises(UsageError, match=r"^node node7: has 7 GPUs, 8 wanted; "):
        check_gpus(NODE, 8)


def test_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    check_gpus(NODE, 0)
    with pytest.raises(UsageError, match=r"^node node7: nvidia-smi does not run \(.*\), 8 GPUs wanted"):
        check_gpus(NODE, 8)


CANNOT_USE = {
    "a driver that is too old": (
        "def init(): raise RuntimeError('The NVIDIA driver is too old (found version 1). Update')\n"
        "torch.cuda.init = init",
        "cannot use a GPU (The NVIDIA driver is too old (found version 1))",
    ),
    "a PyTorch for CPUs": ("torch.backends.cuda.is_built = lambda: False", "is built without CUDA"),
}


@pytest.mark.parametrize("case", CANNOT_USE)
def test_gpus_that_pytorch_cannot_use(case: str) -> None:
    """The driver lists them, which says nothing yet; asked to, nothing trains on the CPU instead."""
    breaking, reason = CANNOT_USE[case]
    program = f"import torch\n{breaking}\nfrom megatron_meap import errors\n"
    asked = {
        "from megatron_meap.cluster.nodes import *; errors.run(lambda: check_pytorch(Node('a', 'b'), 8))": "node a: ",
        "from megatron_meap import pretrain; errors.run(pretrain.main)": "MEAP_DEVICE=cuda: on ",
    }
    for question, beginning in asked.items():
        done = subprocess.run(
            [sys.executable, "-c", program + question], capture_output=True, text=True, cwd=REPOSITORY,
            env=environment() | {"MEAP_DEVICE": "cuda"}, timeout=100,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith(f"error: {beginning}")
        assert reason in done.stderr


def test_fewer_gpus_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    check_pytorch(NODE, 0)
    monkeypatch.setattr(device, "gpu_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    check_pytorch(NODE, 7)
    with pytest.raises(UsageError, match=r"^node node7: PyTorch sees 7 GPUs, 8 wanted"):
        check_pytorch(NODE, 8)
