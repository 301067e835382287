"""The scores of one run over its training: a table that grows, one picture, TensorBoard and Weights & Biases."""

import csv
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_meap.errors import UsageError, one_line, refusing
from megatron_meap.evaluation.reporting import pictures
from megatron_meap.evaluation.reporting.results import ModelResults, headline
from megatron_meap.evaluation.reporting.statistics import Estimate
from megatron_meap.files import whole_file
from megatron_meap.meap.losses import BITS_PER_BYTE
from megatron_meap.trainer.log_names import WANDB_ID

COLUMNS = ["step", "tokens", "task", "metric", "value", "low", "high", "samples", "headline", "checkpoint"]
VALIDATION = "validation"
"""The task name of bits per byte."""


@dataclass(frozen=True)
class Score:
    """One figure of one checkpoint."""

    step: int
    tokens: int
    task: str
    metric: str
    value: Estimate
    headline: bool
    """Whether it represents the task, as in the picture."""
    checkpoint: str
    """Digest of the checkpoint."""


def scores_of(result: ModelResults, step: int, digest: str, bits: tuple[float, int] | None) -> list[Score]:
    """All figures of a checkpoint.

    Args:
        result: its answers to the tasks.
        step: its iteration.
        digest: its own.
        bits: bits per byte, and the number of samples.
    """
    tokens = result.model.tokens or 0
    found = [
        Score(step, tokens, task, metric, found_value, metric == headline(result, task), digest)
        for task in result.samples
        for metric in result.metrics(task)
        if (found_value := result.estimate(task, metric)) is not None
    ]
    if bits is not None:
        value, samples = bits
        found.append(
            Score(step, tokens, VALIDATION, BITS_PER_BYTE, Estimate(value, value, value, samples), True, digest)
        )
    return found


def read(table: Path) -> list[Score]:
    """The scores in a table; none if the file does not exist.

    Raises:
        UsageError: it is not such a table.
    """
    if not table.exists():
        return []
    kinds = OSError, csv.Error, KeyError, ValueError, TypeError
    with refusing(f"{table}: not a table of scores", *kinds, remedy="move it away"), open(table, newline="") as file:
        return [
            Score(
                int(row["step"]), int(row["tokens"]), row["task"], row["metric"],
                Estimate(float(row["value"]), float(row["low"]), float(row["high"]), int(row["samples"])),
                row["headline"] == "yes", row["checkpoint"],
            )
            for row in csv.DictReader(file)
        ]  # fmt: skip


def write(scores: list[Score], table: Path) -> None:
    """Write the table, whole or not at all."""
    with whole_file(table, "w") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        for one in sorted(scores, key=lambda each: each.step):
            numbers = (f"{number:.6g}" for number in (one.value.mean, one.value.low, one.value.high))
            shown = "yes" if one.headline else "no"
            rows.writerow(
                [one.step, one.tokens, one.task, one.metric, *numbers, one.value.samples, shown, one.checkpoint]
            )


def draw(scores: list[Score], run: str, picture: Path) -> None:
    """Draw every task's headline over the tokens of the training."""
    panels: dict[tuple[str, str], dict[str, list[tuple[float, Estimate]]]] = {}
    for one in sorted(scores, key=lambda each: each.step):
        if one.headline:
            points = panels.setdefault((one.task, one.metric), {run: []})
            points[run].append((one.tokens, one.value))
    if panels:
        figure = pictures.over_tokens([(task, metric, lines) for (task, metric), lines in panels.items()])
        figure.savefig(picture, dpi=pictures.DPI)


class Curves:
    """Writes scores to TensorBoard and W&B, at the step of their checkpoint."""

    def __init__(self, args: Namespace, run: Path, tensorboard: str | None, wandb: bool) -> None:
        """Open both.

        Args:
            args: of the run, from its checkpoint; they name the W&B project.
            run: the --save directory.
            tensorboard: directory of TensorBoard's files, or None.
            wandb: whether to log to W&B where the run does.

        Raises:
            UsageError: one of them is not installed, or W&B cannot be reached.
        """
        self._board = self._wandb = None
        if tensorboard is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UsageError("--tensorboard-dir: needs TensorBoard (pip install tensorboard)") from error
            self._board = SummaryWriter(tensorboard)
        if wandb and getattr(args, "wandb_project", None):
            self._wandb = _begin(args, run)

    def write(self, scores: list[Score]) -> None:
        """The scores of one checkpoint."""
        values: dict[str, Any] = {f"evaluation/{one.task}/{one.metric}": one.value.mean for one in scores}
        step = scores[0].step
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log(values | {"tokens": scores[0].tokens}, step)


def _begin(args: Namespace, run: Path) -> Any:
    """A W&B run of its own: two processes cannot write to the same one, and the training's steps are ahead of these."""
    try:
        import wandb
    except ImportError as error:
        raise UsageError("--no-wandb: give it, or install wandb: the run logs to it (pip install wandb)") from error
    id = f"{(run / WANDB_ID).read_text().strip()}-evaluation" if (run / WANDB_ID).is_file() else None
    try:
        return wandb.init(
            project=args.wandb_project, entity=getattr(args, "wandb_entity", None) or None, id=id, resume="allow",
            name=f"{args.wandb_exp_name} evaluation", dir=str(run), job_type="evaluation",
        )  # fmt: skip
    except wandb.Error as error:
        raise UsageError(f"--no-wandb: give it, or: {one_line(error)}; WANDB_MODE=offline keeps it here") from error
