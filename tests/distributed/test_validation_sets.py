"""Several whole validation sets have the same means in every layout, and these are the right ones."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_meap.huggingface import megatron_model
from tests.conftest import Corpus
from tests.launch import MODEL, TRAINING, Run, launch_many

LENGTHS = (64 * 3 + 1, 64 * 8 + 30)
"""Tokens of the sets' only documents: 3 samples, 8 and a rest, which does not count."""
LAYOUTS = {
    "dp2": "",
    "tp2": "--tensor-model-parallel-size 2 --sequence-parallel",
    "pp2": "--pipeline-model-parallel-size 2",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for number, length in enumerate(LENGTHS):
        builder = IndexedDatasetBuilder(str(folder / f"{number}.bin"), dtype=DType.optimal_dtype(512))
        builder.add_document(torch.from_numpy(tokens(number)), [length])
        builder.finalize(str(folder / f"{number}.idx"))
    return folder


def tokens(number: int) -> np.ndarray:
    """Of a set's document."""
    return np.random.default_rng(number).integers(10, 500, LENGTHS[number])


@pytest.fixture(scope="module")
def runs(corpus: Corpus, folder: Path) -> dict[str, Run]:
    place = corpus.data_flags.index("--data-path")
    data = [*corpus.data_flags[:place], *corpus.data_flags[place + 4 :], "--train-data-path", corpus.prefix]
    data += ["--valid-data-path", *(str(folder / str(number)) for number in range(len(LENGTHS)))]
    data += ["--multiple-validation-sets", "--full-validation", "--data-cache-path", str(folder / "cache")]
    common = [*MODEL, *TRAINING, *data, "--train-iters", "1", "--eval-interval", "1"]
    initial = str(folder / "initial")
    evaluated = [*common, "--load", initial, "--finetune", "--skip-train"]
    done = launch_many(1, {"initial": [*common, "--save", initial, "--save-interval", "1"], "one": evaluated}, folder)
    two = {name: [*evaluated, *flags.split()] for name, flags in LAYOUTS.items()}
    return done | launch_many(2, two, folder)


@pytest.fixture(scope="module")
def right(runs: dict[str, Run], folder: Path) -> list[float]:
    """The means, from the checkpoint and the sets' tokens alone."""
    means = []
    with megatron_model.one_process():
        model, _ = megatron_model.load(folder / "initial" / "iter_0000001", torch.float32)
        for number, length in enumerate(LENGTHS):
            ids = torch.from_numpy(tokens(number)[: (length - 1) // 64 * 64 + 1])
            inputs, labels = ids[:-1].reshape(-1, 64), ids[1:].reshape(-1, 64)
            found = megatron_model.logits(model, inputs).transpose(1, 2)
            means.append(torch.nn.functional.cross_entropy(found.float(), labels).item())
    return means


@pytest.mark.parametrize("name", ["one", *LAYOUTS])
def test_every_layout_has_the_right_means(runs: dict[str, Run], right: list[float], name: str) -> None:
    found = re.findall(r"validation-(\d) loss .*?lm loss value: (\S+)", runs[name].output)
    assert [(int(number), float(loss)) for number, loss in found] == [
        (number, pytest.approx(mean, abs=2e-5)) for number, mean in enumerate(right)
    ]
