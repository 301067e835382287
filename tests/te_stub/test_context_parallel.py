"""Transformer Engine's Python over the stub in bf16: context parallelism, which fp32 lacks; and official weights."""

from pathlib import Path

import pytest

from tests.conftest import Corpus
from tests.launch import MODEL, TRAINING, Run, launch_many
from tests.te_stub.on_cpu import SITE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SITE / "transformer_engine").is_dir(), reason=f"Transformer Engine's Python is not in {SITE} (on_cpu.py)"
    ),
]

LOCAL, TE = "--transformer-impl local", "--transformer-impl transformer_engine"
KINDS = ("all_gather", "a2a")
VALUES = ("lm loss", "lm loss masked inputs", "lm loss clean inputs", "grad norm")


@pytest.fixture(scope="module")
def runs(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Three steps of each from one seed; not from a warm start: Megatron looks for the engine as it is imported."""
    folder: Path = tmp_path_factory.mktemp("te-context")
    common = [*MODEL, *corpus.data_flags, "--data-cache-path", str(folder / "cache")]
    common += [*(flag for flag in TRAINING if flag != "--fp32"), "--train-iters", "3"]
    whole = {"one": f"{TE} --bf16"}
    whole |= {kind: f"{TE} --bf16 --context-parallel-size 2 --cp-comm-type {kind}" for kind in KINDS}
    whole |= {
        f"official-{name}": f"{kind} --fp32 --meap-official-init" for name, kind in (("local", LOCAL), ("te", TE))
    }
    flags = {name: [*common, *own.split()] for name, own in whole.items()}
    return launch_many(2, flags, folder, script="te_stub/run_many.py", warm=False)


def _follows(run: Run, other: Run, tolerance: float) -> None:
    assert len(run.steps) == 3, run.output[-2000:]
    for value in VALUES:
        assert run.losses(value) == pytest.approx(other.losses(value), abs=tolerance), value


@pytest.mark.parametrize("kind", KINDS)
def test_context_parallel_follows_whole_sequences(runs: dict[str, Run], kind: str) -> None:
    _follows(runs[kind], runs["one"], 0.02)


def test_official_weights_are_those_of_the_local_layers(runs: dict[str, Run]) -> None:
    _follows(runs["official-te"], runs["official-local"], 1e-4)
