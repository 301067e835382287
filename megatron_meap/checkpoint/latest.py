"""Which checkpoint of a directory a run starts from: the newest that is complete and undamaged.

Megatron writes `latest_checkpointed_iteration.txt` after a save has finished, and with `--verify-integrity` (our
default) a SHA-256 of every file beside it. Here both are read *before* Megatron loads: a torn or corrupted checkpoint
is reported, and the newest intact one is used instead, or the start is refused.
"""

import contextlib
import errno
import re
import shutil
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_meap.errors import UsageError, causes, refuse
from megatron_meap.files import whole_file
from megatron_meap.flags import Settings, flag

POINTER = "latest_checkpointed_iteration.txt"
HASHES = "integrity.json"
"""In the directory of an iteration: Megatron's record of its files' hashes (`integrity.FILE`)."""
HashFiles = Callable[[Sequence[Path]], dict[str, str]]
"""From files to their SHA-256, by path."""

_DOOMED = ".pruned-"
_DIRECTORY = re.compile(r"iter_(\d{7,})")


_FAILING = ("raise_all", "return_all", "return_unexpected")
"""Of `--dist-ckpt-strictness`: Megatron's checkpoints hold what its trainer does not ask for, or it is given a pair."""


@dataclass(frozen=True)
class CheckpointSettings(Settings):
    """Which checkpoints are kept, and which a run may start from."""

    allow_changed_settings: bool = flag(
        False,
        "start even if masks, data, what the model computes, or other settings that determine the run differ from the "
        "checkpoint's (default: refused; docs/training.md lists them)",
    )
    refuse_damaged_checkpoint: bool = flag(
        False, "refuse to start if the newest checkpoint is damaged (default: warn and use the newest intact one)"
    )
    overwrite_checkpoints: bool = flag(
        False, "start from scratch even if --save holds checkpoints, and replace them one by one (default: refused)"
    )
    keep_last: int | None = flag(
        None,
        "keep only the last N checkpoints, and those at multiples of --meap-keep-every (default: keep all)",
        metavar="N",
    )
    keep_every: int | None = flag(
        None, "with --meap-keep-last: never delete the checkpoints at multiples of this", metavar="ITERATIONS"
    )

    def check(self, args: Namespace) -> None:
        """Refuse what contradicts itself or Megatron's own flags.

        Raises:
            UsageError: names the flag.
        """
        if self.keep_every is not None and self.keep_last is None:
            raise UsageError("--meap-keep-every: needs --meap-keep-last, without which all checkpoints are kept")
        if (strict := getattr(args, "dist_ckpt_strictness", None)) in _FAILING:
            raise UsageError(
                f"--dist-ckpt-strictness {strict}: megatron-core 0.19 fails; use raise_unexpected or log_all"
            )
        if self.keep_last is None:
            return
        flag, retained = "--meap-keep-last", args.save_retain_interval is not None
        refuse(
            (self.keep_last < 1, f"{flag} {self.keep_last}: must be at least 1"),
            (args.save is None, f"{flag}: there is no --save whose checkpoints to keep; name one, or drop the flag"),
            (retained, f"{flag}: contradicts --save-retain-interval; use --meap-keep-every instead"),
        )


@dataclass(frozen=True)
class Choice:
    """The checkpoint to start from."""

    iteration: int
    """Its iteration; 0 for a `release` checkpoint."""

    path: Path

    warning: str | None = None
    """Why it is not the newest one, in one line."""


def iterations(folder: Path) -> list[int]:
    """Iterations with a directory in a checkpoint folder, complete or not, ascending."""
    found = (iteration_of(entry) for entry in folder.iterdir() if entry.is_dir())
    return sorted(iteration for iteration in found if iteration is not None)


def iteration_of(path: Path) -> int | None:
    """The iteration of a directory, by its name; None for another name."""
    match = _DIRECTORY.fullmatch(path.name)
    return int(match[1]) if match else None


def directory(folder: Path, iteration: int) -> Path:
    """Directory of one iteration, as Megatron names it."""
    return folder / f"iter_{iteration:07d}"


def pointer(folder: Path) -> str | None:
    """The content of the pointer file: an iteration or `release`; None if it is missing or torn."""
    try:
        text = (folder / POINTER).read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    return text if re.fullmatch(r"release|[0-9]{1,15}", text) else None


def damage(path: Path, hash_files: HashFiles | None = None) -> str | None:
    """What is wrong with a checkpoint directory, in a few words that name the file; None if no fault is found.

    Of a checkpoint without recorded hashes (saved without `--verify-integrity`) only the presence of its parts is
    checked.

    Args:
        path: the directory.
        hash_files: hashes its files, as `integrity.hash_files` does in this process (the default).
    """
    from megatron_meap.checkpoint import integrity

    if not path.is_dir():
        return "the directory is missing"
    if (path / integrity.FILE).exists():
        return integrity.damage(path, hash_files or integrity.hash_files)
    if any(path.glob("mp_rank_*")):  # the legacy format, which records nothing
        return None
    missing = [name for name in ("metadata.json", ".metadata") if not (path / name).exists()]
    return f"{missing[0]} is missing" if missing and not is_from_fsdp(path) else None


def is_from_fsdp(path: Path) -> bool:
    """Whether a checkpoint is in PyTorch's own format, as runs of FSDP save: without Megatron's `metadata.json`."""
    if (path / "metadata.json").exists() or not (path / ".metadata").exists():
        return False
    from torch.distributed.checkpoint import FileSystemReader

    with contextlib.suppress(Exception):  # unpickling a damaged file can raise almost anything
        return "args" in FileSystemReader(path).read_metadata().state_dict_metadata
    return False


def choose(folder: Path, step: int | None, refuse_damaged: bool, hash_files: HashFiles | None = None) -> Choice | None:
    """The checkpoint to load from a folder, or None if the folder holds none.

    Args:
        folder: what `--load` names.
        step: the iteration asked for by `--ckpt-step`; it is used or refused, never replaced by another.
        refuse_damaged: refuse to start if the newest checkpoint is damaged, instead of using an older one.
        hash_files: as in `damage`.

    Raises:
        UsageError: no checkpoint of the folder can be used.
    """
    if not folder.is_dir():
        return None
    newest = pointer(folder)
    if newest == "release":
        if wrong := damage(folder / "release", hash_files):
            raise UsageError(f"checkpoint {folder / 'release'} is damaged: {wrong}; copy or convert it again")
        return Choice(0, folder / "release")
    if step is not None:
        if wrong := damage(directory(folder, step), hash_files):
            raise UsageError(f"--ckpt-step {step}: {directory(folder, step)} cannot be used: {wrong}")
        return Choice(step, directory(folder, step))
    saved = iterations(folder)
    torn_pointer = newest is None and (folder / POINTER).exists()
    if newest is None and not torn_pointer:
        return None
    if newest is not None:
        saved = [iteration for iteration in saved if iteration <= int(newest)]
        if int(newest) not in saved:
            saved.append(int(newest))
    problems = [f"{folder / POINTER} is torn"] if torn_pointer else []
    for iteration in reversed(saved):
        path = directory(folder, iteration)
        wrong = damage(path, hash_files)
        if wrong is None:
            warning = f"{'; '.join(problems)}; starting from iteration {iteration} instead" if problems else None
            return Choice(iteration, path, warning)
        problems.append(f"checkpoint {path} is damaged: {wrong}")
        if refuse_damaged:
            raise UsageError(
                f"--load: {problems[-1]}; drop --meap-refuse-damaged-checkpoint to start from an older one"
            )
    raise UsageError(
        f"--load {folder}: no usable checkpoint: {'; '.join(problems)}; start from scratch with another --save"
    )


def newest_saved(folder: Path) -> int | None:
    """The newest iteration with a complete checkpoint in a folder; None if there is none."""
    last = pointer(folder)
    return int(last) if last is not None and last.isdigit() else None


def full_disk(folder: Path, error: BaseException) -> str | None:
    """A message if an error was caused by saving to a full disk, with what is left; None if that cannot be told.

    It must have been raised while saving. Megatron writes in worker processes and may lose the reason of their failure:
    if the causes do not say "no space left", a checkpoint must have been begun, and less space be left than one needs.
    """
    chain = list(causes(error))
    certain = any(isinstance(each, OSError) and each.errno in (errno.ENOSPC, errno.EDQUOT) for each in chain)
    if not _raised_while_saving(chain):
        return None
    complete = pointer(folder)
    try:
        saved = iterations(folder)
        begun = [each for each in saved if not (complete or "").isdigit() or each > int(complete or 0)]
        sizes = [sum(file.stat().st_size for file in directory(folder, each).iterdir()) for each in saved]
        if not certain and (not begun or shutil.disk_usage(folder).free > max(sizes)):
            return None
    except OSError:
        return None
    kept = f"the last complete checkpoint is that of iteration {complete}" if complete else "no checkpoint is complete"
    what = f"{directory(folder, begun[-1])} could not be completed" if begun else "a checkpoint could not be written"
    return f"the disk is full: {what}, {kept}"


def _raised_while_saving(chain: list[BaseException]) -> bool:
    """Whether one of these passed through Megatron's functions that write a checkpoint or wait for one."""
    frames = (frame for each in chain for frame in traceback.extract_tb(each.__traceback__))
    return any(frame.name in ("save_checkpoint", "maybe_finalize_async_save") for frame in frames)


def set_pointer(folder: Path, iteration: int) -> None:
    """Let the pointer name this iteration; the file is replaced atomically."""
    with whole_file(folder / POINTER, "w") as file:
        file.write(str(iteration))


def prune(folder: Path, keep_last: int, keep_every: int | None) -> list[int]:
    """Delete old checkpoints: all but the last `keep_last` complete ones and those at multiples of `keep_every`.

    Anything newer than the pointer (a save in progress, or a torn one) is kept.

    Returns:
        The iterations deleted.
    """
    newest = pointer(folder)
    if newest is None or newest == "release":
        return []
    for left in folder.glob(f"{_DOOMED}*"):  # by one that was killed
        shutil.rmtree(left, ignore_errors=True)
    complete = [iteration for iteration in iterations(folder) if iteration <= int(newest)]
    old = [each for each in complete[:-keep_last] if not (keep_every and each % keep_every == 0)]
    for iteration in old:
        doomed = folder / f"{_DOOMED}{iteration}"
        with contextlib.suppress(OSError):
            directory(folder, iteration).rename(doomed)  # so that it is never seen half deleted
        shutil.rmtree(doomed, ignore_errors=True)
    return old
