"""A training run, read from Megatron's own log: its history, and a progress line while it runs."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_meap.errors import UsageError, refusing
from megatron_meap.meap.losses import BITS_PER_BYTE, CLEAN_LOSS, MASKED_LOSS
from megatron_meap.trainer.log_names import MFU, SKIPPED, SPIKE
from megatron_meap.trainer.probe_task import PROBE

_STEP = re.compile(r"\] iteration +(?P<step>\d+)/ *(?P<total>\d+) \|(?P<values>.*)")
_VALUE = re.compile(r" ([^|:]+): +([-+.\deE]+|nan|inf) \|")
_VALIDATION = re.compile(
    r"validation(?P<name>-\S+)? loss at iteration (?P<step>\d+) (?:on validation set )?\| lm loss value: (?P<loss>\S+)"
)
_PROBE = re.compile(
    rf"{PROBE} at iteration (?P<step>\d+) \|.* accuracy: (?P<accuracy>\S+) % \(chance (?P<chance>\S+) %\)"
)
_NOTICE = re.compile(
    rf"error: (?P<bad>step \d+: found .*?); | (?P<said>(?:{SPIKE}|{SKIPPED}) at iteration (?P<step>\d+)) \|.*"
)
_TIME_LEFT = re.compile(r" ETA: (\S+) \|")
_BITS_PER_BYTE = re.compile(rf"{BITS_PER_BYTE} value: (\S+)")
_ARGUMENT = re.compile(r"^ +(?P<name>seq_length|train_samples) \.+ (?P<value>\d+)$")


@dataclass
class Step:
    """One logged training step."""

    step: int
    total: int
    values: dict[str, float]
    """By their names in the log: `lm loss`, `learning rate`, `grad norm`, `elapsed time per iteration (ms)`, ..."""
    time_left: str | None = None
    """As the log itself says."""


@dataclass
class History:
    """A training run from the start of its log to the end; a resumed run overwrites the steps that it repeats."""

    steps: dict[int, Step] = field(default_factory=dict)
    validation_sets: dict[str, dict[int, float]] = field(default_factory=dict)
    """Validation loss by step, in nats per token, of each validation set; a single one has no name."""
    retrieval: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Accuracy of the retrieval probe by step, and that of chance, in percent."""
    seq_length: int | None = None
    """Tokens per sample."""
    train_samples: int | None = None
    """Samples of the whole run, if its length is given in samples."""

    bits_per_byte: dict[str, dict[int, float]] = field(default_factory=dict)
    """Of each validation set by step, as `validation_sets`."""

    notices: list[str] = field(default_factory=list)
    """Loss spikes, skipped steps, and losses or gradients that were not finite and ended the run."""
    marked: set[int] = field(default_factory=set)
    """The steps of spikes and of skipped steps."""

    def add(self, line: str) -> Step | None:
        """Process one line of the log; returns the step that it reports, if any."""
        if match := _STEP.search(line):
            values = {name.strip(): float(value) for name, value in _VALUE.findall(match["values"])}
            left = _TIME_LEFT.search(line)
            step = Step(int(match["step"]), int(match["total"]), values, left and left[1])
            self.steps[step.step] = step
            return step
        if match := _VALIDATION.search(line):
            name = (match["name"] or "").removeprefix("-")
            self.validation_sets.setdefault(name, {})[int(match["step"])] = float(match["loss"])
            if bits := _BITS_PER_BYTE.search(line):
                self.bits_per_byte.setdefault(name, {})[int(match["step"])] = float(bits[1])
        elif match := _PROBE.search(line):
            self.retrieval[int(match["step"])] = float(match["accuracy"]), float(match["chance"])
        elif match := _NOTICE.match(line):
            self.notices.append(match["bad"] or line.strip(" |"))
            self.marked |= {int(match["step"])} if match["step"] else set()
        elif match := _ARGUMENT.match(line):
            setattr(self, match["name"], int(match["value"]))
        return None

    @property
    def validation(self) -> dict[int, float]:
        """Validation loss by step; that of the first set, if there are several."""
        return next(iter(self.validation_sets.values()), {})

    def tokens(self, step: int) -> float:
        """Tokens consumed up to a step; estimated from the nearest step that was logged."""
        nearest = self.steps[min(self.steps, key=lambda each: abs(each - step))]
        return nearest.values["consumed samples"] * (self.seq_length or 0) * step / nearest.step

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
    with refusing(f"{path}: cannot be read", OSError), open(path, errors="replace") as file:
        for line in file:
            history.add(line)
    if not history.steps:
        raise UsageError(f"{path}: holds no training step of Megatron's; name the file its output went to")
    return history


def progress_line(history: History, step: Step) -> str:
    """One readable line: percent, losses, tokens per second and the time left."""
    values = step.values
    seconds = values.get("elapsed time per iteration (ms)", 0.0) / 1000
    parts = [f"{100 * step.step / step.total:3.0f}%", f"step {step.step}/{step.total}"]
    if "lm loss" in values:
        loss = f"loss {values['lm loss']:.3f}"
        if MASKED_LOSS in values:
            loss += f" (masked inputs {values[MASKED_LOSS]:.3f}, clean {values[CLEAN_LOSS]:.3f})"
        parts.append(loss)
    for name, losses in history.validation_sets.items():
        bits = list(history.bits_per_byte.get(name, {}).values())[-1:]
        parts.append(f"validation{' ' * bool(name)}{name} {list(losses.values())[-1]:.3f}")
        parts[-1] += "".join(f" ({each:.3f} bits per byte)" for each in bits)
    if history.retrieval:
        accuracy, chance = list(history.retrieval.values())[-1]
        parts.append(f"retrieval {accuracy:.0f}% (chance {chance:.0f}%)")
    if seconds and history.seq_length:
        parts.append(f"{values['global batch size'] * history.seq_length / seconds:,.0f} tokens/s")
    if MFU in values:
        parts.append(f"MFU {values[MFU]:.1f}%")
    if seconds:
        parts.append(f"ETA {step.time_left or _time(_steps_left(history, step) * seconds)}")
    return " | ".join(parts)


def _time(seconds: float) -> str:
    left = round(seconds)
    return f"{left // 3600:d}:{left // 60 % 60:02d}:{left % 60:02d}"


def _steps_left(history: History, step: Step) -> float:
    """Steps until the end, at this step's batch size: a schedule may make later batches larger."""
    if history.train_samples is None:
        return step.total - step.step
    values = step.values
    return max(0.0, history.train_samples - values["consumed samples"]) / values["global batch size"]


class Reader:
    """Reads a log that is still being written, into `history`."""

    def __init__(self, path: Path, history: History | None = None, start: int = 0) -> None:
        """`start` is a position in the file, in bytes; the file may not exist yet."""
        self.path = path
        self.history = history if history is not None else History()
        self._position, self._rest = start, ""

    def news(self) -> Iterator[str]:
        """What is new since the last call: a progress line, and notices."""
        if not self.path.exists():
            return
        with open(self.path, errors="replace") as file:
            file.seek(self._position)
            text = self._rest + file.read()
            self._position = file.tell()
        *lines, self._rest = text.split("\n")
        before = len(self.history.notices)
        steps = [step for step in map(self.history.add, lines) if step is not None]
        if steps:
            yield progress_line(self.history, steps[-1])
        yield from self.history.notices[before:]


def follow(readers: dict[str, Reader], done: Iterator[bool]) -> Iterator[str]:
    """News from logs that are still being written, each preceded by the name of its run.

    Args:
        readers: by the names of the runs; an empty name is not written.
        done: evaluated before every look; when it is True, the rest is read and the iteration ends.
    """
    for finished in done:
        for name, reader in readers.items():
            yield from (f"{name}: {line}" if name else line for line in reader.news())
        if finished:
            return
        time.sleep(0.5)
