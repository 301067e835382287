"""SHA-256 of a checkpoint's files: every rank hashes what it wrote, and a share of what has to be verified.

Megatron hashes the whole checkpoint on rank 0 while the others wait in a collective, at every save and on the thread of
the training loop: the 920 GiB of a 70B model take nine minutes, and a collective times out after ten. The record
(`integrity.json`) is Megatron's.
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
"""SHA-256 by path (in the record, relative to the directory); a value that begins with UNREADABLE is an error."""

UNREADABLE = "!"
_MOST_THREADS = 8  # more do not help on the disks that checkpoints are on
_WRITTEN_BY = re.compile(r".*__(\d+)_\d+\.distcp")


def hash_files(paths: Sequence[Path]) -> Hashes:
    """Hash several files at a time: hashing releases Python's lock."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with ThreadPoolExecutor(min(_MOST_THREADS, max(1, cores))) as pool:
        return dict(zip(map(str, paths), pool.map(_hash, paths), strict=True))


def _hash(path: Path) -> str:
    try:
        return validation._compute_file_hash(str(path))
    except OSError as error:
        return f"{UNREADABLE}file missing or unreadable ({error.strerror or error})"


def damage(folder: Path, hash_files: Callable[[Sequence[Path]], Hashes] = hash_files) -> str | None:
    """What differs from the recorded hashes, in one line that names the files; None if nothing does.

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
    """Megatron's `dist_checkpointing.save`, with `verify_integrity` done by all ranks together.

    In an asynchronous save each rank's files are hashed by the process that writes them; the thread of the training
    loop only gathers the hashes.
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
    """Runs in the process that saves in the background: writes this rank's files, then stores their hashes."""

    def __init__(self, write: Callable, folder: str, handed_over: Path, ranks: tuple[int, int]) -> None:
        self.write, self.folder, self.handed_over, self.ranks = write, folder, handed_over, ranks

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.write(*args, **kwargs)
        rank, world_size = self.ranks
        written = [path for path in _files(self.folder) if _writer(path, world_size) == rank and _is_data(path)]
        self.handed_over.write_text(json.dumps(hash_files(written)))


def _take_over(folder: str, handed_over: Path) -> None:
    """Combine the hashes from the saving process with those of the metadata, which this process wrote."""
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
    """Rank that hashes a file: its writer, whose machine still has it in memory; rank 0 writes the metadata.

    A file left by an interrupted save of a larger job is also assigned to a rank.
    """
    match = _WRITTEN_BY.fullmatch(path.name)
    return int(match[1]) % world_size if match else 0
