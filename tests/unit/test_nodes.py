"""The check of a node's GPUs; that of the network between nodes is tested with nodes (tests/slurm/test_nodes.py)."""

from pathlib import Path

import pytest

from megatron_meap.cluster.nodes import Node, check_gpus
from megatron_meap.errors import UsageError

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
