"""Evaluate every checkpoint of a run as it is saved: one table and one picture over the tokens of its training.

    python tools/follow_run.py runs/demo/checkpoints --suite quick
    python tools/follow_run.py runs/demo/checkpoints --tasks meap_needle,hellaswag --every 1000 --once

RUN is the --save directory of the training; it may not exist yet. The table also has bits per byte of the validation
data. TensorBoard and W&B receive the scores at the step of the checkpoint, if the run itself writes there. The command
ends with the run, and the same command resumes where it stopped.
"""

import argparse
import fcntl
import json
import shutil
from pathlib import Path
from typing import IO, Any

from megatron_meap.commands import evaluate
from megatron_meap.errors import UsageError
from megatron_meap.files import whole_file
from megatron_meap.flags import Parser
from megatron_meap.records import read_json

TABLE, PICTURE, OPTIONS = "scores.csv", "scores.png", "options.json"


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="--save directory of the training")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the results (default: RUN/evaluation)")
    parser.add_argument("--name", help="name of the run in the plot (default: from its path)")
    parser.add_argument("--once", action="store_true", help="evaluate the existing checkpoints, and exit")
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="only checkpoints at multiples of N iterations (default: all)"
    )
    parser.add_argument(
        "--patience", type=float, default=60.0, metavar="MINUTES",
        help="exit if an unfinished run gives no sign of life for this long (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--valid-samples", type=int, default=64, metavar="N",
        help="samples of the validation data for bits per byte; 0 for none (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--tensorboard-dir", metavar="DIR", help="default: the run's own, if it has one")
    parser.add_argument("--no-wandb", action="store_true", help="do not log to W&B even if the run does")
    evaluate.add_flags(parser)
    flags = parser.parse_args()
    if flags.every < 1 or flags.valid_samples < 0 or flags.patience < 0:
        raise UsageError("--every must be 1 or more, --valid-samples and --patience 0 or more")
    if not (flags.suite or flags.tasks):
        raise UsageError("nothing to run: give --suite quick, --suite paper, or --tasks")
    flags.output = flags.output or flags.run / "evaluation"
    return flags


def main() -> None:
    """Follow."""
    flags = parse_flags()
    if flags.once and not flags.run.is_dir():
        raise UsageError(f"{flags.run}: no such directory; name the --save of a training")
    evaluate.prepare(flags)
    lock = _lock(flags.output)
    _same_options(flags)
    from megatron_meap.evaluation import following

    follower = Follower(flags)
    patience_s = 60 * flags.patience
    try:
        why = following.follow(
            flags.run, follower.done, follower.take, every=flags.every, once=flags.once, patience_s=patience_s
        )
    finally:
        follower.export.close()
    print(f"{why}; {len(follower.done)} checkpoints in {flags.output / TABLE} and {PICTURE}", flush=True)
    lock.close()


class Follower:
    """The scores so far, and how the next checkpoint is added."""

    def __init__(self, flags: argparse.Namespace) -> None:
        from megatron_meap.evaluation import following, models
        from megatron_meap.evaluation.reporting import scores

        self.flags = flags
        self.export = following.Exporter()
        self.name = flags.name or models.parse(str(flags.run.resolve()))[0]
        self.scores = scores.read(flags.output / TABLE)
        self.done = {one.step: one.checkpoint for one in self.scores}
        self._tasks: dict[str, Any] | None = None
        self._curves: Any = None

    def take(self, step: int, digest: str) -> None:
        """Export a checkpoint, evaluate it, and write the scores.

        Raises:
            UsageError: as `following.Exporter`, `evaluate.choose_tasks` and `models.load`.
        """
        from megatron_meap.checkpoint.reader import open_checkpoint
        from megatron_meap.evaluation import following, models
        from megatron_meap.evaluation.reporting import scores

        flags, directory = self.flags, self.flags.output / "model"
        with following.held(flags.run, step, flags.output) as checkpoint:
            print(f"iteration {step}: exporting", flush=True)
            samples = self.export(checkpoint, directory, flags.tokenizer, flags.valid_samples)
            args = open_checkpoint(checkpoint).args
        if isinstance(samples, str):
            print(f"note: no bits per byte: {samples}", flush=True)
        if self._curves is None:
            board = flags.tensorboard_dir or getattr(args, "tensorboard_dir", None)
            self._curves = scores.Curves(args, flags.run, board, not flags.no_wandb)
        model = models.Model(f"{step}", directory, f"{flags.run}@{step}", self.name, models.trained_tokens(args))
        result, bits = self._evaluate(model, samples)
        added = scores.scores_of(result, step, digest, bits)
        self.scores = [one for one in self.scores if one.step != step] + added
        self.done[step] = digest
        scores.write(self.scores, flags.output / TABLE)
        scores.draw(self.scores, self.name, flags.output / PICTURE)
        self._curves.write(added)
        shutil.rmtree(directory, ignore_errors=True)
        shown = ", ".join(f"{one.task} {one.metric} {one.value.mean:.3f}" for one in added if one.headline)
        print(f"iteration {step}: {shown}", flush=True)

    def _evaluate(self, model: Any, samples: Any) -> tuple[Any, tuple[float, int] | None]:
        """The results of the tasks, and the bits per byte with the number of samples."""
        from megatron_meap.evaluation import bits, models
        from megatron_meap.evaluation.reporting.results import ModelResults
        from megatron_meap.evaluation.run import add_tasks

        if self._tasks is None:  # all later checkpoints have the same context and tokenizer
            plan, self._tasks = evaluate.choose_tasks(self.flags, [model])
            evaluate.say_left_out(plan)
        machine = evaluate.machine_of(self.flags, None)
        loaded = models.load(model, machine.batch_size, machine.device, machine.dtype, machine.chat_template)
        result = ModelResults(model)
        add_tasks(result, list(self._tasks.values()), loaded, machine.chat_template)
        found = None if isinstance(samples, str) else bits.measure(loaded.model, loaded.tokenizer, samples)
        return result, None if found is None else (found, len(samples))


def _lock(output: Path) -> IO[str]:
    """Lock the folder until the file is closed, and remove what a killed command left.

    Raises:
        UsageError: another one is running.
    """
    file = open(output / ".lock", "w")  # noqa: SIM115 - stays open
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UsageError(f"--output {output}: another follow_run writes there; wait for it, or stop it") from error
    for left in output.glob(".held-*"):
        shutil.rmtree(left, ignore_errors=True)
    return file


def _same_options(flags: argparse.Namespace) -> None:
    """Refuse to add to a table with other options; the first call records its options there.

    Raises:
        UsageError: says what differs.
    """
    free = ("run", "output", "name", "once", "every", "patience", "tensorboard_dir", "no_wandb", "batch_size", "device")
    options = {name: value for name, value in vars(flags).items() if name not in free}
    path = flags.output / OPTIONS
    if not path.exists():
        with whole_file(path, "w") as file:
            json.dump(options, file, indent=1)
        return
    before = read_json(path, {}, "move it away, with the table beside it")
    if changed := [name for name in options if before.get(name) != options[name]]:
        there = ", ".join(f"{name} {before.get(name)} there, {options[name]} here" for name in changed)
        raise UsageError(f"--output {flags.output}: holds scores of other options: {there}; name another folder")
