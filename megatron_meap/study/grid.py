"""The grid of a study: a TOML file of axes, their combinations (points), and the command line of each."""

import itertools
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_meap.errors import UsageError, refusing
from megatron_meap.records import misfit

BASELINE = "ntp"
"""The objective that the others are compared with."""
TUNED = ("weight_decay", "dropout")
"""Axes that are tuned separately for every objective, so that the baseline is always tuned as well."""


@dataclass(frozen=True, order=True)
class Point:
    """One run of a study."""

    model: str
    tokens: int
    """Unique tokens of the training text."""
    epochs: float
    """Passes over them, as counted for objectives without copies."""
    objective: str
    weight_decay: float
    dropout: float
    seed: int
    """For the choice of text, its order, the initial weights and the noise."""

    @property
    def name(self) -> str:
        """The run's folder."""
        return (
            f"{self.objective}-{self.model}-t{self.tokens}-e{self.epochs:g}-wd{self.weight_decay:g}"
            f"-do{self.dropout:g}-s{self.seed}"
        )

    @property
    def setting(self) -> tuple[float, ...]:
        """What was tuned."""
        return tuple(getattr(self, axis) for axis in TUNED)


_NUMBER = int | float
POINT = {
    "model": str, "tokens": int, "epochs": _NUMBER, "objective": str, "weight_decay": _NUMBER, "dropout": _NUMBER,
    "seed": int,
}  # fmt: skip
"""The axes, and the shape of a value of each (`records.misfit`)."""
AXES = tuple(POINT)
_COMMAND = {"launch?": str, "environment?": {str: str}, "flags": str, "seq_length": int, "batch": int}
_SHAPE = {
    "data": {
        "folder": str, "train": str, "valid": str, "vocabulary": int, "valid_documents": int, "valid_tokens": int,
        "planted?": {"passages": int, "length": int, "times": int, "pieces": int},
    },
    "training": {**_COMMAND, "evaluations": int, "save_interval?": int},
    "models": {str: str},
    "objectives": {str: {"flags": str, "passes?": int, "tuned_as?": str}},
    "stage": [{"name?": str, "question?": str, "tuned_by?": str}],
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """Points that together answer a question."""

    name: str
    question: str
    axes: dict[str, list[Any]]
    tuned_by: str | None
    """The stage whose results determine the `TUNED` axes of every objective."""

    def points(self, chosen: dict[str, tuple[float, ...]] | None = None) -> list[Point]:
        """All points, those of the first seed first, so that finished runs can be compared.

        Args:
            chosen: the tuned axes by objective, for a stage that is `tuned_by` another; an objective that is not in it
                has no points yet.
        """
        order = ("seed", "model", "tokens", "epochs", *TUNED, "objective")
        names = [axis for axis in order if axis in self.axes]
        found = []
        for values in itertools.product(*(self.axes[name] for name in names)):
            axes = dict(zip(names, values, strict=True))
            if self.tuned_by is not None:
                if axes["objective"] not in (chosen or {}):
                    continue
                axes |= dict(zip(TUNED, (chosen or {})[axes["objective"]], strict=True))
            found.append(Point(**axes))
        return found


@dataclass(frozen=True)
class Grid:
    """A study's file."""

    path: Path
    data: dict[str, Any]
    """`folder`: of its runs; `train`, `valid`: files of documents, below the folder of texts; `vocabulary`: pieces of
    the tokenizer, which is trained on `train`; `valid_documents`, `valid_tokens`: number of validation documents, and
    of tokens from the beginning of each; `planted` (optional): what `planting.plant` inserts into every sequence:
    number of `passages`, their `length`, how many `times` each occurs, number of different `pieces`."""
    training: dict[str, Any]
    """`launch`: the command that runs a Python file; `environment`; `flags`; `seq_length`; `batch`: samples per step;
    `evaluations` per run; `save_interval`: in steps, for runs that take longer than a machine is available."""
    models: dict[str, str]
    objectives: dict[str, dict[str, Any]]
    """`flags`; `passes`: times the samples of the others (2 for copies at equal data)."""
    stages: tuple[Stage, ...]

    def steps(self, point: Point) -> int:
        """Optimizer steps of a run: those of its epochs, rounded to whole intervals between evaluations."""
        every = self.training["evaluations"]
        steps = point.tokens * point.epochs / (self.training["seq_length"] * self.training["batch"])
        return max(1, round(steps / every)) * every

    def samples(self, point: Point) -> int:
        """Sequences that a run trains on, copies included."""
        return self.steps(point) * self.batch(point)

    def batch(self, point: Point) -> int:
        """Samples per step, copies included."""
        return self.training["batch"] * self.objectives[point.objective].get("passes", 1)

    def command(self, point: Point, folder: Path, train: Path, valid: Sequence[Path], tokenizer: Path) -> list[str]:
        """The command line of a run.

        Args:
            point: the run.
            folder: its own, for checkpoints.
            train: the prefix of its text.
            valid: the prefixes of the validation texts.
            tokenizer: the SentencePiece model.
        """
        steps, length = self.steps(point), self.training["seq_length"]
        flags = {
            "seq-length": length, "max-position-embeddings": length, "train-iters": steps,
            "global-batch-size": self.batch(point), "seed": point.seed, "weight-decay": point.weight_decay,
            "attention-dropout": point.dropout, "hidden-dropout": point.dropout,
            "tokenizer-type": "SentencePieceTokenizer", "tokenizer-model": tokenizer,
            "train-data-path": train, "eval-iters": 1,
            "eval-interval": steps // self.training["evaluations"],
        }  # fmt: skip
        if interval := self.training.get("save_interval"):
            flags |= {"save": folder / "checkpoints", "load": folder / "checkpoints", "save-interval": interval}
        return [
            *shlex.split(self.training.get("launch", "python")), "pretrain_gpt_meap.py",
            *shlex.split(self.models[point.model]), *shlex.split(self.training["flags"]),
            *itertools.chain.from_iterable((f"--{name}", str(value)) for name, value in flags.items()),
            "--valid-data-path", *map(str, valid), "--multiple-validation-sets", "--full-validation",
            *shlex.split(self.objectives[point.objective]["flags"]),
        ]  # fmt: skip


def read(path: Path) -> Grid:
    """Read a grid.

    Raises:
        UsageError: the file is missing or not such a grid; the line says where.
    """
    errors = OSError, tomllib.TOMLDecodeError, UnicodeDecodeError
    with refusing(f"{path}: cannot be read as TOML", *errors), open(path, "rb") as file:
        raw = tomllib.load(file)
    wanted = {"data", "training", "models", "objectives", "stage"}
    if raw.keys() != wanted:
        different = ", ".join(sorted(raw.keys() ^ wanted))
        raise UsageError(f"{path}: its tables must be {', '.join(sorted(wanted))}; missing or unknown: {different}")
    objectives = raw["objectives"]
    if isinstance(objectives, dict):
        objectives = {name: {"flags": each} if isinstance(each, str) else each for name, each in objectives.items()}
    if wrong := misfit(raw | {"objectives": objectives}, _SHAPE):
        raise UsageError(f"{path}: {wrong}")
    stages = tuple(_stages(path, raw["stage"], {"model": raw["models"], "objective": objectives}))
    return Grid(path, raw["data"], raw["training"], raw["models"], objectives, stages)


def _stages(path: Path, raw: list[dict[str, Any]], known: dict[str, dict[str, Any]]) -> Iterator[Stage]:
    before: list[str] = []
    for number, each in enumerate(raw, 1):
        values = dict(each)
        name, question, by = values.pop("name", f"#{number}"), values.pop("question", ""), values.pop("tuned_by", None)
        where = f"{path}: stage {name}"
        if by is not None and by not in before:
            raise UsageError(f"{where}: tuned_by {by}: no stage before it has this name")
        axes = set(AXES) - (set(TUNED) if by is not None else set())
        if values.keys() != axes:
            different = ", ".join(sorted(values.keys() ^ axes))
            raise UsageError(f"{where}: its axes must be {', '.join(sorted(axes))}; missing or unknown: {different}")
        if not all(isinstance(value, list) and value for value in values.values()):
            raise UsageError(f"{where}: every axis is a list of values, as seed = [1, 2, 3]")
        if wrong := misfit(values, {axis: [POINT[axis]] for axis in axes}):
            raise UsageError(f"{where}: {wrong}")
        for axis, names in known.items():
            for value in values[axis]:
                if value not in names:
                    raise UsageError(f"{where}: {axis} {value}: none of {', '.join(names)}")
        before.append(name)
        yield Stage(name, question, values, by)


def point_of(record: dict[str, Any]) -> Point:
    """The point of a recorded result."""
    return Point(**{axis: record[axis] for axis in AXES})
