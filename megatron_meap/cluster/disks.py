"""Jobs on several hosts: which files of rank 0 the other hosts can see.

Checkpoints need a disk that all hosts share. Data caches do not: Megatron lets rank 0 build them and the other ranks
read them, which fails on hosts that do not share its disk (Megatron-LM #907); such hosts build their own here.
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

from megatron_meap.backend import megatron_patches
from megatron_meap.errors import UsageError


@dataclass(frozen=True)
class Caches:
    """Files that are built from the data before training, once on each disk."""

    directory: Callable[[], Path]
    """Where they are; called on rank 0, the only one that is sure to have the data."""
    facts: Callable[[], dict[str, str]]
    """What must be the same on every host: a description of each dataset, by its name."""
    build: Callable[[], Any]
    """Builds those that are missing."""


@dataclass(frozen=True)
class _View:
    """What a rank reports to the others."""

    host: str
    loads_data: bool
    sees: list[bool]
    """Whether it sees what rank 0 writes to --save, and to the data cache."""


def prepare(args: Namespace, loads_data: bool, caches: Caches | None) -> None:
    """Build the data caches on hosts that do not share rank 0's. All ranks call it together.

    Args:
        args: the run's arguments.
        loads_data: whether this rank loads data.
        caches: None if the data needs none.

    Raises:
        UsageError: on all ranks: a host has no data, other data, or does not see the --save directory.
    """
    if args.world_size == int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)):
        return  # one host
    views = _views(args, loads_data, caches)
    blind = sorted({view.host for view in views if not view.sees[0]})
    if blind:
        raise UsageError(
            f"--save {args.save}: {', '.join(blind)} does not see what {views[0].host} writes there; checkpoints need "
            "a directory on a disk that all hosts share"
        )
    if caches is None or all(view.sees[1] for view in views):
        return
    facts = _from_rank_zero(caches.facts() if args.rank == 0 else None)
    problems = _gathered(_build_alone(caches, facts) if args.rank in _builders(views) else "")
    if any(problems):
        raise UsageError("; ".join(sorted(filter(None, problems))))


def _views(args: Namespace, loads_data: bool, caches: Caches | None) -> list[_View]:
    """Which test files of rank 0 each rank sees, by rank."""
    with contextlib.ExitStack() as stack:

        def mark(directory: str | Path) -> str:
            return stack.enter_context(tempfile.NamedTemporaryFile(dir=directory, prefix=".seen-by-all-")).name

        marks: tuple[str | None, ...] = ()
        if args.rank == 0:
            marks = args.save and mark(args.save), mark(caches.directory()) if caches else None
        marks = _from_rank_zero(marks)
        sees = [made is None or Path(made).exists() for made in marks]
        host = f"{socket.gethostname()} (node {os.environ.get('GROUP_RANK', '?')})"
        return _gathered(_View(host, loads_data, sees))


def _builders(views: list[_View]) -> set[int]:
    """The first rank that loads data on each host with a separate disk, and rank 0, which would be next anyway."""
    first: dict[str, int] = {}
    for rank, view in enumerate(views):
        if view.loads_data and not view.sees[1]:
            first.setdefault(view.host, rank)
    return {0, *first.values()}


def _build_alone(caches: Caches, expected: dict[str, str]) -> str:
    """Build the caches on this host, without the other ranks; returns what went wrong, or an empty string.

    Args:
        caches: to build.
        expected: their facts on rank 0's host.
    """
    host = socket.gethostname()
    print(f"{host}: builds its own data caches, as the hosts do not share their directory", flush=True)
    try:
        for name, found in caches.facts().items():
            if found != expected[name]:
                return f"{name}: {found} on {host}, {expected[name]} where rank 0 is; copy the same data to all hosts"
        with megatron_patches.outside_the_job():
            caches.build()
    except (UsageError, OSError) as error:
        return f"on {host}: {error}"
    return ""


def _from_rank_zero(value: Any) -> Any:
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def _gathered(value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
