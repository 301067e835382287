from collections.abc import Iterator

import pytest

from tests.slurm.cluster import LOOPBACK, Cluster, running


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Slurm cluster of one node on this machine's loopback."""
    with running(tmp_path_factory.mktemp("slurm"), [LOOPBACK]) as cluster:
        yield cluster
