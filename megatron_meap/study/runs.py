"""Running the points of a study, several at once; finished runs are kept, others are resumed later."""

import contextlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import megatron_meap
from megatron_meap.errors import JobError, UsageError, refusing
from megatron_meap.files import whole_file
from megatron_meap.inspection.training_log import History, read_log
from megatron_meap.records import parsed, read_json
from megatron_meap.study.grid import POINT, Grid, Point, point_of
from megatron_meap.study.texts import Texts

RESULT = "result.json"
AGAIN = "again.json"
"""The result of a run that was repeated from its recorded command."""
NUMBERS = ("validation", "train_loss", "retrieval", "planted", "copying")
"""What a repeated run must reproduce, digit for digit on the same kind of machine."""
_SHAPE = POINT | {
    "steps": int,
    "validation": {str: int | float},
    "cpu_seconds": int | float,
    **dict.fromkeys(("machine", "command", "texts?"), str),
    "environment": {str: str},
    "planted?": {str: int | float},
    "copying?": {str: int | float},
}
"""The part of a result that is read."""


def finished(folder: Path, name: str = RESULT) -> dict[Point, dict[str, Any]]:
    """The results of the runs below a folder; with `AGAIN`, of the repeated ones."""
    remedy = "remove it to run this again"
    return by_point(read_json(path, _SHAPE, remedy) for path in sorted(folder.glob(f"*/{name}")))


def read_results(path: Path) -> dict[Point, dict[str, Any]]:
    """The results in a file of JSON lines; none if the file does not exist.

    Raises:
        UsageError: a line that is not a result.
    """
    if not path.exists():
        return {}
    with refusing(f"{path}: holds a line that is not the result of a run", ValueError, remedy="make the file again"):
        return by_point(parsed(line, _SHAPE) for line in path.read_bytes().splitlines())


def write_results(path: Path, results: dict[Point, dict[str, Any]]) -> None:
    """All results as JSON lines, in the order of their points."""
    with whole_file(path, "w") as file:
        for point in sorted(results):
            file.write(json.dumps(results[point]) + "\n")


def by_point(records: Any) -> dict[Point, dict[str, Any]]:
    """Results by their points."""
    return {point_of(record): record for record in records}


class Runner:
    """Runs points of a grid, each in a folder of its own.

    Args:
        grid: the study.
        texts: what the runs read.
        folder: of all runs.
        slots: one for each run at a time, with environment variables of its own (such as its GPU).
        say: takes a line for the terminal.
    """

    def __init__(
        self,
        grid: Grid,
        texts: Texts,
        folder: Path,
        slots: Sequence[dict[str, str]],
        say: Callable[[str], None] = print,
    ) -> None:
        self._grid, self._texts, self._folder, self._say = grid, texts, folder, say
        self._free: SimpleQueue[dict[str, str]] = SimpleQueue()
        for slot in slots:
            self._free.put(slot)
        self._slots = len(slots)
        self._running: set[int] = set()  # their process ids
        self._stopping = threading.Event()

    def run(self, points: Sequence[Point]) -> None:
        """Run what has no result yet.

        Raises:
            JobError: some runs failed or did not finish; the others have their results.
        """
        done = finished(self._folder)
        todo = [point for point in points if point not in done]
        self._say(f"{len(points)} runs, {len(points) - len(todo)} of them done")
        self._texts.make(todo)
        with ThreadPoolExecutor(self._slots) as pool:
            try:
                outcomes = list(pool.map(self._one, todo))
            except BaseException:  # before the pool waits for the running ones
                self.stop()
                raise
        if failed := [point.name for point, fine in zip(todo, outcomes, strict=True) if not fine]:
            raise JobError(f"{len(failed)} of {len(todo)} runs have no result yet, the first of them {failed[0]}")

    def stop(self) -> None:
        """End the running ones; the next start resumes them."""
        self._stopping.set()
        for pid in list(self._running):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def again(self, record: dict[str, Any]) -> None:
        """Repeat a run from its recorded command, in the same folder.

        Raises:
            UsageError: the command reads its text elsewhere.
            JobError: it failed.
        """
        point, command = point_of(record), shlex.split(record["command"])
        if str(self._texts.train(point)) not in command:
            read = command[command.index("--train-data-path") + 1] if "--train-data-path" in command else "no text"
            raise UsageError(
                f"--runs {self._folder.parent}: the recorded command of {point.name} reads {read}; work where that is"
            )
        self._texts.make([point])
        if not self._train(point, command, AGAIN):
            raise JobError(f"{point.name}: could not be repeated")

    def _one(self, point: Point) -> bool:
        """Run a point; returns whether it has a result."""
        if self._stopping.is_set():
            return False
        folder, texts = self._folder / point.name, self._texts
        command = self._grid.command(point, folder, texts.train(point), texts.valid, texts.tokenizer)
        return self._train(point, command, RESULT)

    def _train(self, point: Point, command: list[str], result: str) -> bool:
        """Run a command in a free slot and write its result; returns whether it finished."""
        folder = self._folder / point.name
        folder.mkdir(parents=True, exist_ok=True)
        own, slot = self._grid.training.get("environment", {}), self._free.get()
        log = folder / f"{Path(result).stem}.log"
        resumes = "save_interval" in self._grid.training
        begun = time.monotonic()
        try:
            with open(log, "a" if resumes else "w") as output:
                process = subprocess.Popen(
                    [sys.executable, *command[1:]] if command[0] == "python" else command,
                    env={**os.environ, **own, **slot}, stdout=output, stderr=subprocess.STDOUT,
                )  # fmt: skip
                self._running.add(process.pid)
                if self._stopping.is_set():  # since the question above
                    process.terminate()
                _, status, usage = os.wait4(process.pid, 0)  # for the processor time of only this run
                process.returncode = os.waitstatus_to_exitcode(status)
                self._running.discard(process.pid)
        finally:
            self._free.put(slot)
        history = read_log(log) if process.returncode == 0 else History()
        steps = self._grid.steps(point)
        if steps not in history.validation:
            why = f"status {process.returncode}" if process.returncode else "stopped before its end"
            self._say(f"{point.name}: no result yet ({why}); see {log}")
            return False
        cost = {"seconds": round(time.monotonic() - begun, 1), "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1)}
        record = (
            asdict(point)
            | _facts(self._grid, point, history)
            | cost
            | {"command": shlex.join(command), "texts": self._texts.digest(point), **_made_by()}
        )
        with whole_file(folder / result, "w") as file:
            file.write(json.dumps(record | {"environment": own}))
        self._say(f"{point.name}: {history.validation[steps]:.4f} in {cost['seconds']:.0f} s")
        return True


def _facts(grid: Grid, point: Point, history: History) -> dict[str, Any]:
    """Results from the log of a run, in nats per token."""
    last = history.steps[max(history.steps)].values
    return {
        "steps": grid.steps(point),
        "trained_tokens": grid.samples(point) * grid.training["seq_length"],
        "validation": {str(step): loss for step, loss in sorted(history.validation.items())},
        "train_loss": last.get("lm loss clean samples", last.get("lm loss")),
        "retrieval": {str(step): accuracy for step, (accuracy, _) in sorted(history.retrieval.items())},
        **_copying(grid, history),
    }


def _copying(grid: Grid, history: History) -> dict[str, dict[str, float]]:
    """By step, in nats: the loss of text with planted passages, and how much less a repeated piece costs in it than in
    text where the order of the pieces is random."""
    if (planted := grid.data.get("planted")) is None:
        return {}
    _, as_trained, reordered = history.validation_sets.values()
    copies = planted["passages"] * (planted["length"] - 1) * (planted["times"] - 1)  # of a sequence's pieces
    tokens_per_copy = grid.training["seq_length"] / copies
    return {
        "planted": {str(step): loss for step, loss in sorted(as_trained.items())},
        "copying": {str(step): (reordered[step] - loss) * tokens_per_copy for step, loss in sorted(as_trained.items())},
    }


def _made_by() -> dict[str, str]:
    """Which code ran, on what kind of machine."""
    versions = {name: version(name) for name in ("torch", "megatron-core")}
    return {"megatron-meap": megatron_meap.__version__, **versions, "machine": _processor()}


def _processor() -> str:
    """The model of this machine's processor."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
