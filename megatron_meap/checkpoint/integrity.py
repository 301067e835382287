"""SHA-256 of a checkpoint's files: every rank hashes what it wrote, and a share of what is to be verified.

Megatron hashes the whole checkpoint on rank 0 while the others wait in a collective, at every save and on the training
loop's thread: the 920 GiB of a 70B model take it nine minutes, and a collective waits for ten. What is recorded, and
where (`integrity.json`), is Megatron's.
"""

import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import validation
from megatron.core.dist_checkpointing.core import CheckpointingException

from megatron_meap.errors import one_line
from megatron_meap.records import parsed

FILE = validation.INTEGRITY_FNAME
Hashes = dict[str, str]
"""SHA-256 by path, in the record by path below the directory; what follows UNREADABLE is why there is none."""

UNREADABLE = "!"
_MOST_THREADS = 8  # more gain nothing on the disks that checkpoints are on
_WRITTEN_BY = re.compile(r".*__(\d+)_\d+\.distcp")


def hash_files(paths: Sequence[Path]) -> Hashes:
    """Hash files, several at a time: hashing leaves Python's lock to others."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with ThreadPoolExecutor(min(_MOST_THREADS, max(1, cores))) as pool:
        return dict(zip(map(str, paths), pool.map(_hash, paths), strict=True))


def _hash(path: Path) -> str:
    try:
        return validation._compute_file_hash(str(path))
    except OSError as error:
        return f"{UNREADABLE}file missing or unreadable ({error.strerror or error})"


def damage(folder: Path, hash_files: Callable[[Sequence[Path]], Hashes] = hash_files) -> str | None:
    """What differs from the recorded hashes, in one line that names the files; None where nothing does.

    Args:
        folder: a checkpoint directory that has `integrity.json`.
        hash_files: does the work; a job shares it among its ranks.
    """
    try:
        recorded = parsed((folder / FILE).read_bytes(), {"files": {str: str}})
    except (OSError, ValueError) as error:
        return f"{FILE} is torn ({one_line(error)})"
    expected: Hashes = recorded["files"]
    if (algorithm := recorded.get("algorithm", validation._HASH_ALGORITHM)) != validation._HASH_ALGORITHM:
        return f"{FILE}: hashes of an unknown kind, {algorithm!r}"
    hashes = hash_files([folder / name for name in expected])
    found = {name: hashes[str(folder / name)] for name in expected}
    wrong = [_difference(name, expected[name], found[name]) for name in expected if found[name] != expected[name]]
    return "; ".join(wrong) or None


def _difference(name: str, expected: str, found: str) -> str:
    if found.startswith(UNREADABLE):
        return f"{name}: {found.removeprefix(UNREADABLE)}"
    return f"{name}: hash mismatch (expected {expected[:16]}..., got {found[:16]}...)"


def recorded_by_all_ranks(save: Callable) -> Callable:
    """Megatron's `dist_checkpointing.save`, whose `verify_integrity` is done by all ranks together.

    With an asynchronous save each rank's files are hashed by the process that writes them, and what is left for the
    training loop's thread is to gather the hashes.
    """

    @functools.wraps(save)
    def save_and_record(state: Any, folder: Any, *args: Any, verify_integrity: bool = False, **kwargs: Any) -> Any:
        request = save(state, folder, *args, verify_integrity=False, **kwargs)
        if not verify_integrity:
            return request
        if request is None:
            _record(folder, hash_files(_own_files(folder)))
            return None
        handed_over = Path(tempfile.mkdtemp(prefix="meap-hashes-")) / "hashes.json"
        ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        request.finalize_fns.append(functools.partial(_take_over, folder, handed_over))
        if request.async_fn is None:  # nothing to write on this rank
            return request
        return request._replace(async_fn=_WriteAndHash(request.async_fn, str(folder), handed_over, ranks))

    return save_and_record


class _WriteAndHash:
    """Runs in the process that saves in the background: writes this rank's files, then leaves their hashes."""

    def __init__(self, write: Callable, folder: str, handed_over: Path, ranks: tuple[int, int]) -> None:
        self.write, self.folder, self.handed_over, self.ranks = write, folder, handed_over, ranks

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.write(*args, **kwargs)
        rank, world_size = self.ranks
        written = [path for path in _files(self.folder) if _writer(path, world_size) == rank and _is_data(path)]
        self.handed_over.write_text(json.dumps(hash_files(written)))


def _take_over(folder: str, handed_over: Path) -> None:
    """Add the hashes that the saving process left to those of what this one wrote beside it, the metadata."""
    known = json.loads(handed_over.read_text()) if handed_over.exists() else {}
    handed_over.unlink(missing_ok=True)
    handed_over.parent.rmdir()
    _record(folder, known | hash_files([path for path in _own_files(folder) if str(path) not in known]))


def _record(folder: str, own: Hashes) -> None:
    """Gather the hashes of all ranks; rank 0 writes them. A file that cannot be read fails the save on every rank."""
    everyones: list[Hashes] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyones, own)
    hashes = {os.path.relpath(path, folder): each[path] for each in everyones for path in each}
    for name, found in hashes.items():
        if found.startswith(UNREADABLE):
            raise CheckpointingException(f"{folder}/{name}: {found.removeprefix(UNREADABLE)}")
    if torch.distributed.get_rank() == 0:
        manifest = {"algorithm": validation._HASH_ALGORITHM, "files": dict(sorted(hashes.items()))}
        with validation.maybe_msc.open(os.path.join(folder, FILE), "w") as file:
            json.dump(manifest, file, indent=2)


def _own_files(folder: str) -> list[Path]:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return [path for path in _files(folder) if _writer(path, world_size) == rank]


def _files(folder: str) -> list[Any]:
    every = validation.maybe_msc.Path(str(folder)).rglob("*")
    return sorted((path for path in every if path.is_file() and path.name != FILE), key=str)


def _is_data(path: Path) -> bool:
    return _WRITTEN_BY.fullmatch(path.name) is not None


def _writer(path: Path, world_size: int) -> int:
    """Rank that hashes a file: its writer, whose machine has it in memory still; rank 0 writes the metadata.

    A file that an interrupted save of a larger job left there is some rank's, too.
    """
    match = _WRITTEN_BY.fullmatch(path.name)
    return int(match[1]) % world_size if match else 0
