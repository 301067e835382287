"""What a training run did, read from Megatron's own log: its history, a progress line while it runs, its curves."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_meap.errors import UsageError
from megatron_meap.meap.losses import CLEAN_LOSS, MASKED_LOSS
from megatron_meap.trainer.probe_task import PROBE

_STEP = re.compile(r"\] iteration +(?P<step>\d+)/ *(?P<total>\d+) \|(?P<values>.*)")
_VALUE = re.compile(r" ([^|:]+): +([-+.\deE]+|nan|inf) \|")
_VALIDATION = re.compile(
    r"validation(?P<name>-\S+)? loss at iteration (?P<step>\d+) (?:on validation set )?\| lm loss value: (?P<loss>\S+)"
)
_PROBE = re.compile(
    rf"{PROBE} at iteration (?P<step>\d+) \|.* accuracy: (?P<accuracy>\S+) % \(chance (?P<chance>\S+) %\)"
)
_BAD_STEP = re.compile(r"error: (?P<found>step \d+: found .*?); ")
_ARGUMENT = re.compile(r"^ +(?P<name>seq_length|train_samples) \.+ (?P<value>\d+)$")


@dataclass
class Step:
    """One logged training step."""

    step: int
    total: int
    values: dict[str, float]
    """By Megatron's names: `lm loss`, `learning rate`, `grad norm`, `elapsed time per iteration (ms)`, ..."""


@dataclass
class History:
    """A training run, from the start of its log to the end; a resumed run overwrites the steps it repeats."""

    steps: dict[int, Step] = field(default_factory=dict)
    validation_sets: dict[str, dict[int, float]] = field(default_factory=dict)
    """Validation loss by step, in nats per token, of each validation set; one alone has no name."""
    retrieval: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Accuracy of the retrieval probe by step, and that of chance, in percent."""
    seq_length: int | None = None
    """Tokens per sample."""
    train_samples: int | None = None
    """Samples of the whole run, where it is counted in samples."""

    bad_steps: list[str] = field(default_factory=list)
    """What ended a start of the run: steps with a loss or gradients that are not finite."""

    def add(self, line: str) -> Step | None:
        """Take in one line of the log; the step it reports, where it reports one."""
        if match := _STEP.search(line):
            values = {name.strip(): float(value) for name, value in _VALUE.findall(match["values"])}
            step = Step(int(match["step"]), int(match["total"]), values)
            self.steps[step.step] = step
            return step
        if match := _VALIDATION.search(line):
            name = (match["name"] or "").removeprefix("-")
            self.validation_sets.setdefault(name, {})[int(match["step"])] = float(match["loss"])
        elif match := _PROBE.search(line):
            self.retrieval[int(match["step"])] = float(match["accuracy"]), float(match["chance"])
        elif match := _BAD_STEP.match(line):
            self.bad_steps.append(match["found"])
        elif match := _ARGUMENT.match(line):
            setattr(self, match["name"], int(match["value"]))
        return None

    @property
    def validation(self) -> dict[int, float]:
        """Validation loss by step; that of the first set, where there are several."""
        return next(iter(self.validation_sets.values()), {})

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one logged quantity; steps that did not report it are left out."""
        steps = [step for step in sorted(self.steps) if name in self.steps[step].values]
        return steps, [self.steps[step].values[name] for step in steps]


def read_log(path: Path) -> History:
    """Read a whole log.

    Raises:
        UsageError: the file cannot be read or holds no training step.
    """
    history = History()
    try:
        with open(path, errors="replace") as file:
            for line in file:
                history.add(line)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    if not history.steps:
        raise UsageError(f"{path}: holds no training step of Megatron's; name the file its output went to")
    return history


def progress_line(history: History, step: Step) -> str:
    """One readable line: percent, losses, tokens per second and the time that is left."""
    values = step.values
    seconds = values.get("elapsed time per iteration (ms)", 0.0) / 1000
    parts = [f"{100 * step.step / step.total:3.0f}%", f"step {step.step}/{step.total}"]
    if "lm loss" in values:
        loss = f"loss {values['lm loss']:.3f}"
        if MASKED_LOSS in values:
            loss += f" (masked inputs {values[MASKED_LOSS]:.3f}, clean {values[CLEAN_LOSS]:.3f})"
        parts.append(loss)
    for name, losses in history.validation_sets.items():
        parts.append(f"validation{' ' * bool(name)}{name} {list(losses.values())[-1]:.3f}")
    if history.retrieval:
        accuracy, chance = list(history.retrieval.values())[-1]
        parts.append(f"retrieval {accuracy:.0f}% (chance {chance:.0f}%)")
    if seconds and history.seq_length:
        parts.append(f"{values['global batch size'] * history.seq_length / seconds:,.0f} tokens/s")
    if seconds:
        left = round(_steps_left(history, step) * seconds)
        parts.append(f"ETA {left // 3600:d}:{left // 60 % 60:02d}:{left % 60:02d}")
    return " | ".join(parts)


def _steps_left(history: History, step: Step) -> float:
    """Steps of this one's batch size until the end: a schedule may make the later ones larger."""
    if history.train_samples is None:
        return step.total - step.step
    values = step.values
    return max(0.0, history.train_samples - values["consumed samples"]) / values["global batch size"]


def follow(path: Path, done: Iterator[bool], history: History | None = None, start: int = 0) -> Iterator[str]:
    """Progress lines of a log that is still being written.

    Args:
        path: the log; it may not exist yet.
        done: asked before every look at the file; when it says True what is left is read and the iteration ends.
        history: also takes in everything read.
        start: position in the file to begin at, in bytes.
    """
    history = history if history is not None else History()
    position, rest = start, ""
    for finished in done:
        if path.exists():
            with open(path, errors="replace") as file:
                file.seek(position)
                text = rest + file.read()
                position = file.tell()
            *lines, rest = text.split("\n")
            before = len(history.bad_steps)
            steps = [step for step in map(history.add, lines) if step is not None]
            if steps:
                yield progress_line(history, steps[-1])
            yield from history.bad_steps[before:]
        if finished:
            return
        time.sleep(0.5)


def plot(history: History, path: Path, unigram: float | None = None) -> None:
    """Draw the loss curves as a picture: masked and clean inputs, validation, and the unigram entropy as a floor.

    Args:
        history: the run.
        path: file to write; its suffix is the format.
        unigram: entropy of the corpus' token distribution in nats, what a model without context can reach.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:] not in formats:
        raise UsageError(f"{path}: no picture has that ending; use one of .{', .'.join(sorted(formats))}")
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, label, color in (
        (MASKED_LOSS, "training, own input masked", "tab:red"),
        (CLEAN_LOSS, "training, own input clean", "tab:blue"),
    ):
        steps, values = history.curve(name)
        axes.plot(steps, values, color=color, label=label, linewidth=1.2)
    if not history.curve(CLEAN_LOSS)[0]:
        axes.plot(*history.curve("lm loss"), color="tab:blue", label="training", linewidth=1.2)
    for number, (name, losses) in enumerate(history.validation_sets.items()):
        label = f"validation{' ' * bool(name)}{name} (clean inputs)"
        points = sorted(losses.items())
        axes.plot(*zip(*points, strict=True), "o-", color="black", alpha=0.4**number, markersize=4, label=label)
    if unigram is not None:
        axes.axhline(unigram, color="gray", linestyle="--", linewidth=1, label="unigram entropy of the corpus")
    axes.set(xlabel="optimiser step", ylabel="loss (nats per token)", title="MEAP pretraining")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
