"""Evaluation that follows a run: every checkpoint once, in order, as soon as it is complete."""

import contextlib
import hashlib
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from megatron_meap.checkpoint import latest
from megatron_meap.checkpoint.reader import open_checkpoint
from megatron_meap.cluster import run_files
from megatron_meap.errors import UsageError
from megatron_meap.files import link_or_copy

LOOK_S = 10.0
"""Seconds between looks for a new checkpoint."""


class GoneError(UsageError):
    """A checkpoint that can no longer be read, or not at the moment."""


def complete(run: Path) -> dict[int, str]:
    """Iterations of the complete checkpoints in a --save directory, ascending, with a digest of each.

    A new checkpoint of the same iteration has another digest; one without recorded hashes has an empty one.
    """
    newest = latest.newest_saved(run)
    steps = [] if newest is None else [step for step in latest.iterations(run) if step <= newest]
    return {step: _digest(latest.directory(run, step)) for step in steps}


def _digest(checkpoint: Path) -> str:
    try:
        return hashlib.sha256((checkpoint / latest.HASHES).read_bytes()).hexdigest()[:12]
    except OSError:
        return ""


@contextlib.contextmanager
def held(run: Path, step: int, beside: Path) -> Iterator[Path]:
    """A checkpoint under another name, so that its files stay while they are read, even if the run deletes its own.

    Args:
        run: the --save directory.
        step: iteration of a complete checkpoint.
        beside: a folder on the same disk, for hard links; on another disk the files are copied.

    Raises:
        GoneError: it no longer exists.
    """
    source = latest.directory(run, step)
    with tempfile.TemporaryDirectory(prefix=".held-", dir=beside) as folder:
        target = Path(folder) / source.name
        try:
            shutil.copytree(source, target, copy_function=link_or_copy)
        except OSError as error:
            raise GoneError(f"{source}: no longer there") from error
        yield target


class Exporter:
    """Exports checkpoints in a process of its own, which runs Megatron on the CPU whatever this machine has."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def __call__(self, checkpoint: Path, directory: Path, tokenizer: str | None, samples: int) -> Any:
        """Export to a Hugging Face directory; returns samples of the validation data, or why there are none.

        Raises:
            GoneError: it is damaged, or being rewritten.
            UsageError: it cannot be exported.
        """
        return self._pool.submit(_export, checkpoint, directory, tokenizer, samples).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


def _export(checkpoint: Path, directory: Path, tokenizer: str | None, samples: int) -> Any:
    from megatron_meap.evaluation import models

    models.prepare_export()
    if (wrong := latest.damage(checkpoint)) is not None:
        raise GoneError(f"damaged, or rewritten while it was being read: {wrong}")
    models.export_here(str(checkpoint), str(directory), None, tokenizer)
    if samples == 0:
        return "--valid-samples 0"
    from megatron_meap.evaluation.bits import validation_samples

    try:
        found = validation_samples(open_checkpoint(checkpoint).args, samples)
    except UsageError as error:
        return str(error)
    return "the run has no validation data" if found is None else found


def follow(
    run: Path, done: dict[int, str], take: Callable[[int, str], None], *, every: int, once: bool, patience_s: float
) -> str:
    """Take every checkpoint of a run, until the run has ended.

    Args:
        run: the --save directory; it may not exist yet.
        done: iterations already taken, and their digests; `take` adds to it.
        take: called with a checkpoint's iteration and digest. If it fails because the checkpoint is gone, a note is
            printed and the checkpoint is skipped until it is replaced.
        every: take only multiples of this.
        once: end when no checkpoint is left.
        patience_s: seconds without a sign of life after which an unfinished run counts as ended.

    Returns:
        Why it ended, in a few words.
    """
    lost: dict[int, str] = {}
    begun = time.time()
    while True:
        state = run_files.state_of(run)  # read first, so that a checkpoint saved just before the end is not missed
        there = {step: digest for step, digest in _look(run).items() if step % every == 0}
        waiting = [step for step in there if there[step] not in (done.get(step), lost.get(step))]
        if waiting:
            step = waiting[0]
            try:
                take(step, there[step])
            except UsageError as error:
                if not isinstance(error, GoneError) and step in _look(run):
                    raise
                print(f"note: iteration {step} is left out: {error}", flush=True)
                lost[step] = there[step]
            continue
        if once:
            return "no more checkpoints there (--once)"
        if state is not None and state[0] == run_files.FINISHED:
            return "the run is finished"
        quiet = time.time() - max(begun, _sign_of_life(run))
        if quiet > patience_s:
            return f"the run has given no sign of life for {quiet / 60:.0f} minutes (--patience)"
        time.sleep(LOOK_S)


def _look(run: Path) -> dict[int, str]:
    return complete(run) if run.is_dir() else {}


def _sign_of_life(run: Path) -> float:
    """When the run last wrote its heartbeat or a checkpoint."""
    files = [run / run_files.HEARTBEAT, run / latest.POINTER]
    return max((path.stat().st_mtime for path in files if path.exists()), default=0.0)
