"""Jobs on several hosts, which are network namespaces: layouts across hosts, a host cut off, disks not shared."""

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_meap.checkpoint import latest
from tests.conftest import Corpus
from tests.hosts.multihost import MultiHostJob
from tests.launch import ENTRY, MODEL, TRAINING
from tests.network import Network, network_or_skip
from tests.sft import conversations, write_jsonl

RUN_MANY = Path(__file__).parent.parent / "run_many.py"
LOST_HOST_S = 12
"""More than a rank takes to start later than the other where two files of tests share two cores."""
LAYOUTS = {
    "DP": ["--use-distributed-optimizer"],
    "TP": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "PP": ["--pipeline-model-parallel-size", "2"],
}
STEPS = 10


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with network_or_skip(2) as network:
        yield network


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


@pytest.fixture
def flags(corpus: Corpus, cache: Path) -> list[str]:
    common = ["--data-cache-path", str(cache), "--meap-lost-host-seconds", str(LOST_HOST_S)]
    return [*MODEL, *TRAINING, *corpus.data_flags, *common]


@pytest.mark.slow
def test_layouts_across_hosts(network: Network, flags: list[str], tmp_path: Path, cache: Path) -> None:
    """Data, tensor and pipeline parallelism between hosts, over torchrun's c10d rendezvous: the same losses."""
    initial = str(tmp_path / "initial")
    runs = {"initial": [*flags, "--train-iters", "1", "--save", initial, "--save-interval", "1"]}
    start = ["--train-iters", str(STEPS), "--load", initial, "--finetune"]
    runs |= {name: [*flags, *start, *layout] for name, layout in LAYOUTS.items()}
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    job = MultiHostJob(network, RUN_MANY, [str(tmp_path / "runs.json")], tmp_path / "logs", rendezvous="c10d")
    assert job.wait(200) == [0, 0], job.output()[-8000:]
    losses = [float(loss) for loss in re.findall(r" iteration +\d+/.*? lm loss: (\S+)", job.output())]
    assert len(losses) == 1 + STEPS * len(LAYOUTS)
    data_parallel, *others = (losses[1 + STEPS * n : 1 + STEPS * (n + 1)] for n in range(len(LAYOUTS)))
    assert data_parallel[-1] < data_parallel[0]
    for other in others:
        assert other == pytest.approx(data_parallel, abs=1e-4)
    assert "builds its own data caches" not in job.output()  # the disk is shared: once, by rank 0
    assert list(cache.glob("*-train-document_index.npy"))


def test_a_host_cut_off_and_back(network: Network, flags: list[str], tmp_path: Path, cache: Path) -> None:
    """The job ends in time and says why; once the host is back, the same command resumes as if nothing had happened.

    The second host has a data cache of its own.
    """
    save = ["--save", str(tmp_path / "run"), "--load", str(tmp_path / "run"), "--save-interval", "10"]
    whole = [*flags, *save, "--train-iters", "100000"]
    job = MultiHostJob(network, ENTRY, whole, tmp_path / "first", private=cache)
    try:
        job.wait_for_step(14)
        network.hosts[1].link("down")
        statuses = job.wait(LOST_HOST_S + 30)
    finally:
        network.hosts[1].link("up")
        job.kill()
    assert statuses == [1, 1]
    for log, other in zip(job.logs, reversed(network.hosts), strict=True):
        lost = [line for line in log.read_text().splitlines() if line.startswith("error: rank")]
        assert len(lost) == 1
        assert re.search(rf"lost another rank \(.*{other.address}.*(timed out|unreachable)\)", lost[0]), lost
    assert job.output().count("builds its own data caches") == 2
    saved = int(latest.pointer(tmp_path / "run") or 0)
    assert saved >= 10
    before = job.run().steps
    end = ["--exit-interval", str(saved + STEPS)]
    again = MultiHostJob(network, ENTRY, [*whole, *end], tmp_path / "second", private=cache)
    assert again.wait(120) == [0, 0], again.output()[-8000:]
    after = again.run().steps
    assert min(after) == saved + 1
    # Megatron logs the second step after a start as the mean of the first two
    repeated = sorted((before.keys() & after.keys()) - {saved + 2})
    assert len(repeated) >= 2
    assert [after[step]["lm loss"] for step in repeated] == [before[step]["lm loss"] for step in repeated]


@pytest.mark.slow
def test_fine_tuning_on_hosts_with_disks_of_their_own(
    network: Network, flags: list[str], corpus: Corpus, tmp_path: Path, cache: Path
) -> None:
    """Each host tokenizes the conversations once; without them on one of them nothing starts."""
    other = tmp_path / "other"
    other.mkdir()
    path = write_jsonl(other / "train.jsonl", conversations(corpus.documents, 40, longest=12))
    place = flags.index("--data-path")
    flags = [*flags[:place], *flags[place + 4 :], "--meap-sft", "--meap-sft-template", "vicuna"]
    flags += ["--train-data-path", str(path), "--seq-length", "256", "--max-position-embeddings", "256"]
    job = MultiHostJob(network, ENTRY, [*flags, "--train-iters", "3"], tmp_path / "first", private=cache)
    assert job.wait(100) == [0, 0], job.output()[-8000:]
    assert job.output().count("builds its own data caches") == 2
    assert len(job.run().steps) == 3
    job = MultiHostJob(network, ENTRY, [*flags, "--data-cache-path", str(other)], tmp_path / "second", private=other)
    assert job.wait(100) == [1, 1]
    lines = {line for line in job.output().splitlines() if line.startswith("error:")}
    assert lines == {
        f"error: on {socket.gethostname()}: --train-data-path {path}: nothing there; give a file, a glob or a folder"
    }


@pytest.mark.slow
def test_a_save_directory_that_is_not_shared(network: Network, flags: list[str], tmp_path: Path) -> None:
    save = tmp_path / "run"
    save.mkdir()
    job = MultiHostJob(
        network, ENTRY, [*flags, "--save", str(save), "--save-interval", "5"], tmp_path / "logs", private=save
    )
    assert job.wait(100) == [1, 1]
    lines = [line for line in job.output().splitlines() if line.startswith("error: --save")]
    assert lines
    assert "does not see what" in lines[0]
    assert list(save.iterdir()) == [save / ".lock"]
