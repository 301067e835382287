"""A branch of a stable run: its schedule, its data and its checkpoint are those of a run that decays from the start."""

import random
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_meap.checkpoint.reader import open_checkpoint
from megatron_meap.errors import UsageError
from megatron_meap.flags import with_files
from megatron_meap.trainer.branch import FLAGS, Branch
from tests.conftest import Corpus
from tests.launch import MODEL, TRAINING, launch_many
from tests.sft import prepare

AT, DECAY, PLANNED = 4, 4, 12
END = AT + DECAY


@pytest.fixture(scope="module")
def flags(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a run over so little data that it is read several times: a shorter run would read it in another order."""
    folder = tmp_path_factory.mktemp("branch")
    draw = random.Random(0)
    builder = IndexedDatasetBuilder(str(folder / "data.bin"), dtype=np.uint16)
    for _ in range(20):
        builder.add_document(torch.tensor([draw.randrange(4, 500) for _ in range(99)] + [2]), [100])
    builder.finalize(str(folder / "data.idx"))
    data = ["--data-path", str(folder / "data"), "--split", "100,0,0", "--data-cache-path", str(folder / "cache")]
    tokenizer = corpus.data_flags[: corpus.data_flags.index("--data-path")]
    schedule = ["--lr-decay-style", "constant", "--lr-warmup-iters", "2", "--min-lr", "1e-5"]
    return [*MODEL, *TRAINING, *tokenizer, *data, "--num-workers", "0", *schedule, "--train-iters", str(PLANNED)]


def test_a_branch_is_a_run_that_decays_from_the_start(flags: list[str], tmp_path: Path) -> None:
    stable, branch, whole = (tmp_path / name for name in ("stable", "branch", "whole"))
    decays = f"--train-iters {END} --lr-decay-style WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters {DECAY}"
    data = ["--meap-data-samples", str(8 * PLANNED)]
    done = launch_many(
        1,
        {
            "stable": [*flags, "--exit-interval", "6", "--save", str(stable), "--save-interval", str(AT)],
            "whole": [*flags, *decays.split(), *data, "--save", str(whole), "--save-interval", str(END)],
        },
        tmp_path,
    )
    Branch(stable, AT, DECAY, branch).make()
    resumed = with_files([*flags, "--save-interval", str(END), f"@{branch / FLAGS}"])
    with pytest.raises(UsageError, match=r"was trained with other settings: epochs of the training data"):
        prepare(*(each for each in resumed if each not in data), "--dry-run")  # which locks nothing
    shutil.rmtree(stable)  # the branch has what it needs
    done |= launch_many(1, {"branch": resumed}, tmp_path)
    ours, theirs = done["branch"].steps, done["whole"].steps
    assert sorted(ours) == list(range(AT + 1, END + 1))
    for step in range(AT + 1, AT + 5):
        for value in ("lm loss", "lm loss masked inputs", "grad norm"):
            assert ours[step][value] == theirs[step][value], (step, value)
    rates = [ours[step]["learning rate"] for step in sorted(ours)]
    assert rates == [theirs[step]["learning rate"] for step in sorted(ours)]
    assert rates == pytest.approx([1e-3 - (1e-3 - 1e-5) * passed / DECAY for passed in range(1, DECAY + 1)], rel=1e-4)
    ends = [open_checkpoint(folder) for folder in (branch, whole)]
    assert [end.iteration for end in ends] == [END, END]
    for name in ends[0].weights():
        assert torch.equal(ends[0].read(name), ends[1].read(name)), name
    with pytest.raises(UsageError, match="holds a run already"):
        Branch(whole, END, DECAY, branch).make()


def run_of(**changes: object) -> Namespace:
    """Arguments in the checkpoint of a stable run of 100 steps."""
    given = {
        "global_batch_size": 8, "train_iters": 100, "train_samples": None, "meap_data_samples": None, "lr": 1e-3,
        "min_lr": 1e-5, "lr_decay_style": "constant", "lr_decay_iters": 100, "lr_warmup_iters": 10,
        "lr_warmup_fraction": None, "lr_wsd_decay_iters": None, "step_batch_size_schedule": None,
    }  # fmt: skip
    return Namespace(**(given | changes))


WSD = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 20}


@pytest.mark.parametrize(
    ("step", "decay", "changes", "message"),
    [
        (50, 10, {"lr_decay_style": "cosine"}, "--lr-decay-style cosine: the learning rate of the run was never"),
        (9, 10, {}, "--at 9: the warm-up lasts until step 10"),
        (9, 10, {"lr_warmup_fraction": 0.1, "lr_warmup_iters": 0}, "--at 9: the warm-up lasts until step 10"),
        (81, 10, WSD, "--at 81: the run itself decays from step 80 on"),
        (95, 10, {}, "--decay 10: the branch would end at step 105, but the data .* is laid out for 100"),
        (50, 10, {"step_batch_size_schedule": "0:8"}, "--step-batch-size-schedule: a branch needs a run of one batch"),
    ],
)
def test_where_nothing_can_branch_off(step: int, decay: int, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Branch(Path("stable"), step, decay, Path("branch"))._flags(run_of(**changes), step)


def test_flags_of_a_run_in_samples() -> None:
    """And of one whose data was laid out for more than it read."""
    changes = {"train_iters": 50, "train_samples": 400, "lr_decay_samples": 400, "lr_warmup_samples": 80, **WSD}
    args = run_of(**changes, lr_wsd_decay_samples=80, meap_data_samples=800)
    flags = Branch(Path("stable"), 40, 10, Path("branch"), "cosine", 2e-6)._flags(args, 40)
    assert flags == [
        "--train-samples 400",
        "--lr-decay-style WSD --lr-wsd-decay-style cosine --min-lr 2e-06",
        "--lr-decay-samples 400 --lr-wsd-decay-samples 80",
        "--override-opt_param-scheduler",
        "--meap-data-samples 800",
        "--load branch --save branch",
    ]
    with pytest.raises(UsageError, match=r"--min-lr 0.1: must lie between 0 and the stable run's --lr 0.001"):
        Branch(Path("stable"), 40, 10, Path("branch"), min_lr=0.1)._flags(args, 40)
