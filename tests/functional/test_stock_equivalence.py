"""Ratio 0 is next-token prediction: batch for batch and digit for digit Megatron's own GPT pipeline."""

from pathlib import Path

import torch

from tests import warm
from tests.conftest import Corpus
from tests.launch import MODEL, REPOSITORY, TRAINING, environment, parse


def run(target: Path, corpus: Corpus, *flags: str) -> tuple[list[torch.Tensor], dict[int, dict[str, float]]]:
    command = [
        str(REPOSITORY / "tests" / "stock.py"), str(target), *MODEL, *TRAINING, *corpus.data_flags,
        "--data-cache-path", str(target.parent / "cache"), "--train-iters", "6", "--eval-iters", "2", "--eval-interval",
        "3", *flags,
    ]  # fmt: skip
    done = warm.run(command, environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(target), parse(done.stdout).steps


def test_ratio_zero_is_the_stock_pipeline(corpus: Corpus, tmp_path: Path) -> None:
    stock_batches, stock = run(tmp_path / "stock.pt", corpus, "--meap-mask-ratio", "0")
    our_batches, ours = run(tmp_path / "ours.pt", corpus, "--meap-mask-ratio", "0")
    assert len(stock_batches) == len(our_batches) == 6 * 4 + (2 + 2 + 2) * 4  # training, and three evaluations
    assert all(torch.equal(a, b) for a, b in zip(stock_batches, our_batches, strict=True))
    assert sorted(ours) == list(range(1, 7))
    for step, values in stock.items():
        values.pop("elapsed time per iteration (ms)")
        assert {name: ours[step][name] for name in values} == values
    masked_batches, masked = run(tmp_path / "ours-masked.pt", corpus)
    assert not all(torch.equal(a, b) for a, b in zip(stock_batches, masked_batches, strict=True))
    assert masked[6]["lm loss"] != ours[6]["lm loss"]
