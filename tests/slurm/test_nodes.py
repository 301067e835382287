"""The multi-node script on a Slurm whose nodes are network namespaces; the check of the nodes before a launch."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_meap.checkpoint.reader import open_checkpoint
from tests.conftest import Corpus
from tests.launch import MODEL, REPOSITORY, TRAINING, environment
from tests.network import INTERFACE, Host, Network, network_or_skip
from tests.slurm.cluster import Cluster, running
from tests.slurm.test_jobs import RECIPE, Jobs

PORT = 23456


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with network_or_skip(2) as network:
        yield network


@pytest.fixture(scope="module")
def two_nodes(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("two-nodes"), network.hosts) as cluster:
        yield cluster


@pytest.mark.slow
def test_a_job_on_two_nodes(two_nodes: Cluster, corpus: Corpus, tmp_path: Path) -> None:
    """Tensor parallel between the nodes; stopped by the signal, requeued and resumed."""
    flags = [
        *MODEL, *TRAINING, *corpus.data_flags, "--data-cache-path", str(tmp_path / "cache"), "--train-iters", "300",
        "--save-interval", "10000", "--tensor-model-parallel-size", "2",
    ]  # fmt: skip
    jobs = Jobs(two_nodes, tmp_path, flags)
    number = jobs.submit("multi_node.sbatch", "both", RECIPE, INTERFACE=INTERFACE)
    jobs.wait_for_step(number, 5)
    two_nodes.command("scancel", "--signal=USR1", "--batch", str(number))
    two_nodes.wait_for(number, "PENDING")
    two_nodes.make_eligible(number)
    output = jobs.wait_until_done(number)
    assert "stopped by SIGUSR1 after iteration" in output
    log = tmp_path / "both" / "checkpoints" / "train.log"  # Megatron's own lines are there
    assert "successfully loaded checkpoint" in log.read_text()
    assert open_checkpoint(tmp_path / "both" / "checkpoints").iteration == 300
    for restart in (0, 1):
        for node in (0, 1):
            assert list((tmp_path / "logs" / str(number) / f"restart-{restart}" / f"node-{node}").rglob("stdout.log"))


def check(host: Host, index: int, nodes: list[str], seconds: float) -> subprocess.Popen[str]:
    """The check of one node."""
    words = ["tools/check_nodes.py", "--index", str(index), "--port", str(PORT), "--seconds", str(seconds), *nodes]
    return subprocess.Popen(
        host.command(sys.executable, *words), cwd=REPOSITORY, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_nodes_that_cannot_reach_each_other(network: Network) -> None:
    """Both say which node, which port and why; once the link is back both pass."""
    nodes = [f"{host.name}={host.address}" for host in network.hosts]

    def check_all(seconds: float) -> list[tuple[int, str]]:
        started = [check(host, index, nodes, seconds) for index, host in enumerate(network.hosts)]
        errors = [process.communicate(timeout=60)[1] for process in started]
        return [(process.returncode, error) for process, error in zip(started, errors, strict=True)]

    network.hosts[1].link("down")
    try:
        refused = check_all(2)
    finally:
        network.hosts[1].link("up")
    for (status, error), host, other in zip(refused, network.hosts, reversed(network.hosts), strict=True):
        assert status == 2
        assert len(error.splitlines()) == 1
        assert f"node {host.name} cannot reach {other.name} ({other.address}: " in error
        assert f"on port {PORT}" in error
    assert check_all(30) == [(0, ""), (0, "")]


def test_a_port_that_is_taken(network: Network) -> None:
    host = network.hosts[0]
    listener = f"import socket, time; s = socket.create_server(('', {PORT})); print(1, flush=True); time.sleep(60)"
    taken = subprocess.Popen(host.command(sys.executable, "-c", listener), stdout=subprocess.PIPE)
    try:
        assert taken.stdout is not None
        taken.stdout.readline()
        process = check(host, 0, [f"{host.name}={host.address}"], 2)
        _, error = process.communicate(timeout=60)
    finally:
        taken.kill()
        taken.wait()
    assert process.returncode == 2
    assert error == f"error: node node1: cannot listen on port {PORT} (Address already in use)\n"
