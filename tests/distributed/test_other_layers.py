"""A run begun with Transformer Engine's layers is resumed with the local ones, and vice versa.

Over a stub of Transformer Engine's compiled part (`tests/te_stub`); skipped where its Python is not installed.
"""

from pathlib import Path

import pytest

from tests.conftest import Corpus
from tests.launch import MODEL, TRAINING, launch_many
from tests.te_stub.on_cpu import SITE

LAYERS = {"te": "transformer_engine", "local": "local"}
OPTIMIZERS = {
    "plain": [],
    "reshardable": ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"],
}


@pytest.mark.slow
@pytest.mark.skipif(not SITE.is_dir(), reason="Transformer Engine's Python is not installed (tests/te_stub/on_cpu.py)")
def test_each_kind_of_layers_resumes_the_other(corpus: Corpus, tmp_path: Path) -> None:
    """The optimizer's moments, steps and master weights go into their own parameters: the losses go on as they were.

    (Master weights of other parameters raise them by a tenth and more.)
    """
    common = [flag for flag in (*MODEL, *TRAINING) if flag != "--fp32"] + [*corpus.data_flags, "--bf16"]
    common += ["--data-cache-path", str(tmp_path / "cache"), "--train-iters", "8", "--save-interval", "4"]
    runs, resumed = {}, {}
    for layers in LAYERS:
        other = "local" if layers == "te" else "te"
        for name, optimizer in OPTIMIZERS.items():
            flags, folder = [*common, *optimizer, "--transformer-impl"], str(tmp_path / f"{layers}-{name}")
            runs[f"{layers}-{name}"] = [*flags, LAYERS[layers], "--save", folder]
            resumed[f"{layers}-{name}-resumed"] = [*flags, LAYERS[other], "--load", folder, "--ckpt-step", "4"]
    done = launch_many(1, runs | resumed, tmp_path, script="te_stub/run_many.py", warm=False)
    for name in runs:
        again = done[f"{name}-resumed"]
        assert "layers resume it" in again.output
        for step in (5, 6, 7, 8):
            assert again.steps[step]["lm loss"] == pytest.approx(done[name].steps[step]["lm loss"], abs=5e-4), name
