"""The tool that shows what the model sees, and its one-line digest of the stream."""

import re
import subprocess
from pathlib import Path

import pytest

from tests import warm
from tests.conftest import Corpus
from tests.launch import MODEL, REPOSITORY, TRAINING, environment, run_ranks

TOOL = str(REPOSITORY / "tools" / "inspect_batches.py")


@pytest.fixture(scope="module")
def flags(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*MODEL, *TRAINING, *corpus.data_flags, "--data-cache-path", str(tmp_path_factory.mktemp("cache"))]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return warm.run(command, environment())


def digest(processes: int, *flags: str) -> str:
    return re.search(r"digest of samples .*", run_ranks(processes, TOOL, *flags))[0]


@pytest.mark.slow
def test_the_digest_is_the_same_for_four_ranks(flags: list[str]) -> None:
    assert digest(4, "--digest", "32:64", *flags) == digest(1, "--digest", "32:64", *flags)


def test_the_digest_is_the_same_for_every_layout(flags: list[str]) -> None:
    """1 and 2 data-parallel ranks, 0 and 2 data workers, tensor parallelism, and a later start."""
    one = digest(1, "--digest", "32:64", *flags)
    assert one.startswith("digest of samples 32 to 63: ")
    assert digest(2, "--digest", "32:64", *flags, "--num-workers", "2") == one
    assert digest(2, "--digest", "32:64", *flags, "--tensor-model-parallel-size", "2") == one
    assert digest(1, "--digest", "32:64", *flags, "--meap-mask-seed", "7") != one


def test_samples_are_shown(flags: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = run([TOOL, "--show", "0", "3", "--statistics", "50", "--html", str(page), *flags])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sample 0: 64 tokens, 9 masked (14.1%)" in done.stdout
    assert done.stdout.count("⟦") == 18
    assert "\033" not in done.stdout  # not a terminal
    assert "masks of 50 samples of 64 tokens: 9.0 a sample (from 9 to 9; int(0.15 x 64) = 9)" in done.stdout
    written = page.read_text()
    assert written.count('class="noised"') == 18 + 1  # and the legend
    assert "http" not in written  # self-contained


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--show", "100000000"], "--show 100000000: the training data has samples 0 to"),
        (["--digest", "5"], "--digest 5: expected FIRST:END"),
        pytest.param(["--digest", "0:3"], "--digest: 3 samples are not a multiple", marks=pytest.mark.slow),
        pytest.param(["--digest", "0:1000000"], "--digest: the run has 160 samples", marks=pytest.mark.slow),
    ],
)
def test_bad_input(flags: list[str], extra: list[str], message: str) -> None:
    done = run([TOOL, *extra, *flags])
    assert done.returncode == 2
    assert message in done.stderr.strip().splitlines()[-1]
