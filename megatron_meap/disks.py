"""Jobs on several hosts: which of the files that rank 0 makes the other hosts see.

Checkpoints need a disk that all hosts share. Data caches do not: Megatron lets rank 0 build them and the other ranks
read them, which fails on hosts that do not share its disk (Megatron-LM #907); there, each host builds its own.
"""

import contextlib
import os
import socket
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_meap import compat, preflight
from megatron_meap.errors import UsageError
from megatron_meap.preprocessing.index import read_index


@dataclass(frozen=True)
class _View:
    """What a rank tells the others."""

    host: str
    loads_data: bool
    sees: list[bool]
    """Whether it sees what rank 0 writes to --save, and to the data cache."""


def prepare(args: Namespace, loads_data: bool, build: Callable[[], Any]) -> None:
    """Make the data caches on hosts that do not share rank 0's; nothing where they do. All ranks call it together.

    Args:
        args: the run's arguments.
        loads_data: whether this rank loads data.
        build: builds the datasets, and their caches with them.

    Raises:
        UsageError: on all ranks alike, for a host without the data, with other data, or without the --save directory.
    """
    if args.world_size == int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)):
        return  # one host
    views = _views(args, loads_data)
    blind = sorted({view.host for view in views if not view.sees[0]})
    if blind:
        raise UsageError(
            f"--save {args.save}: {', '.join(blind)} does not see what {views[0].host} writes there; checkpoints need "
            "a directory on a disk that all hosts share"
        )
    if args.mock_data or all(view.sees[1] for view in views):
        return
    tokens = _from_rank_zero(_tokens(args) if args.rank == 0 else None)
    problems = _gathered(_build_alone(tokens, build) if args.rank in _builders(views) else "")
    if any(problems):
        raise UsageError("; ".join(sorted(filter(None, problems))))


def _views(args: Namespace, loads_data: bool) -> list[_View]:
    """What each rank sees of files that rank 0 makes for this purpose, by rank."""
    directories = [args.save, None if args.mock_data else preflight.cache_directory(args)]
    with contextlib.ExitStack() as stack:
        marks = [
            stack.enter_context(tempfile.NamedTemporaryFile(dir=directory, prefix=".seen-by-all-")).name
            for directory in directories
            if args.rank == 0 and directory is not None
        ]
        marks = _from_rank_zero(marks)
        sees = [directory is None or Path(marks.pop(0)).exists() for directory in directories]
        host = f"{socket.gethostname()} (node {os.environ.get('GROUP_RANK', '?')})"
        return _gathered(_View(host, loads_data, sees))


def _builders(views: list[_View]) -> set[int]:
    """The first rank that loads data on each host with a disk of its own; rank 0 too, which would be next anyway."""
    first: dict[str, int] = {}
    for rank, view in enumerate(views):
        if view.loads_data and not view.sees[1]:
            first.setdefault(view.host, rank)
    return {0, *first.values()}


def _build_alone(tokens: dict[str, int], build: Callable[[], Any]) -> str:
    """Build the caches on this host, without the other ranks: what went wrong, or nothing.

    Args:
        tokens: how many there are in each dataset, on rank 0's disk.
        build: builds the datasets.
    """
    host = socket.gethostname()
    print(f"{host}: builds its own data caches, as the hosts do not share their directory", flush=True)
    try:
        for prefix, wanted in tokens.items():
            if (found := read_index(prefix).tokens) != wanted:
                return f"{prefix}: {found} tokens on {host}, {wanted} where rank 0 is; copy the same data to all hosts"
        with compat.outside_the_job():
            build()
    except (UsageError, OSError) as error:
        return f"on {host}: {error}"
    return ""


def _tokens(args: Namespace) -> dict[str, int]:
    return {prefix: read_index(prefix).tokens for prefix in preflight.data_prefixes(args)}


def _from_rank_zero(value: Any) -> Any:
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def _gathered(value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
