"""Communication of ranks before their process group exists: rank 0 checks things for all, and the others help."""

import contextlib
import itertools
import json
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from megatron_meap.checkpoint import integrity
from megatron_meap.errors import JobError, UsageError, one_line

_PATIENCE = timedelta(days=1)  # rank 0 may have much to read, and reports when it fails
_UNTIL_READ = timedelta(seconds=30)
_numbers = itertools.count()  # every meeting of a process has its own keys
HashFiles = Callable[[Sequence[Path]], integrity.Hashes]


def check_environment() -> None:
    """Refuse variables of a job that no launcher sets so.

    Raises:
        UsageError: names the variable.
    """
    found = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 0}
    for name, least in found.items():
        value = os.environ.get(name, str(least))
        if not value.isdecimal() or int(value) < least:
            raise UsageError(f"{name}={value}: must be a number, at least {least}; torchrun sets it")
        found[name] = int(value)
    if found["RANK"] >= found["WORLD_SIZE"]:
        raise UsageError(f"RANK={found['RANK']}: must be below WORLD_SIZE={found['WORLD_SIZE']}; torchrun sets both")


def on_rank_zero(
    args: Namespace, look: Callable[[HashFiles], dict[str, Any]]
) -> tuple[dict[str, Any], torch.distributed.Store | None]:
    """Let rank 0 check something, and give all ranks the result.

    Args:
        args: `rank`, `world_size` and `distributed_timeout_minutes`.
        look: called on rank 0 with a function that hashes files, for which all ranks share the work.

    Returns:
        What `look` returned, on all ranks, and the store over which they met, for `init_process_group`; None if they
        need none or have one.

    Raises:
        UsageError: on every rank, if `look` raised it.
        JobError: a rank did not connect.
    """
    number = next(_numbers)
    if args.world_size == 1:
        return look(integrity.hash_files), None
    timeout, new = timedelta(minutes=args.distributed_timeout_minutes), None
    if torch.distributed.is_initialized():
        store = torch.distributed.distributed_c10d._get_default_store()
    else:
        store = new = _meet(args, timeout)
    store.set_timeout(_PATIENCE)
    table = _Table(torch.distributed.PrefixStore(f"meap_meeting_{number}", store), args.rank, args.world_size)
    result = table.lead(look) if args.rank == 0 else table.follow()
    store.set_timeout(timeout)
    if "error" in result:
        raise UsageError(result["error"])
    return result, new


def _meet(args: Namespace, timeout: timedelta) -> torch.distributed.Store:
    """The store of all ranks, once all are connected."""
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UsageError(f"{', '.join(missing)}: not set, but WORLD_SIZE={args.world_size} is; start with torchrun")
    try:
        return next(torch.distributed.rendezvous("env://", args.rank, args.world_size, timeout=timeout))[0]
    except torch.distributed.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise JobError(
            f"rank {args.rank} of {args.world_size}: not all ranks reached {where} within "
            f"--distributed-timeout-minutes {args.distributed_timeout_minutes} ({one_line(error)}); are all hosts "
            "started, with the same address, and can they reach it?"
        ) from error


class _Table:
    """A meeting: rank 0 posts one message after the other, each a request for hashes, the last the result."""

    def __init__(self, store: torch.distributed.Store, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.messages = 0

    def lead(self, look: Callable[[HashFiles], dict[str, Any]]) -> dict[str, Any]:
        """Rank 0."""
        try:
            result = look(self._hash_together)
        except UsageError as error:
            result = {"error": str(error)}
        said = json.dumps({"result": result})
        self.store.set(str(self.messages), said)
        if "error" in result:  # rank 0 will exit, and with it the store, unless torchrun has one
            read = [f"read/{rank}" for rank in range(1, self.world_size)]
            with contextlib.suppress(torch.distributed.DistError):
                self.store.wait(read, _UNTIL_READ)
        return json.loads(said)["result"]  # the same types as on the other ranks

    def follow(self) -> dict[str, Any]:
        """Every other rank: hash what rank 0 asks for until it has the result."""
        while True:
            message = json.loads(self.store.get(str(self.messages)))
            if "result" in message:
                if "error" in message["result"]:
                    self.store.set(f"read/{self.rank}", "")
                return message["result"]
            own = self._share([Path(path) for path in message["hash"]])
            self.store.set(f"{self.messages}/{self.rank}", json.dumps(integrity.hash_files(own)))
            self.messages += 1

    def _hash_together(self, paths: Sequence[Path]) -> integrity.Hashes:
        self.store.set(str(self.messages), json.dumps({"hash": [str(path) for path in paths]}))
        hashes = integrity.hash_files(self._share(paths))
        for rank in range(1, self.world_size):
            hashes |= json.loads(self.store.get(f"{self.messages}/{rank}"))
        self.messages += 1
        return hashes

    def _share(self, paths: Sequence[Path]) -> list[Path]:
        """This rank's share of the files: large ones are next to each other, and so are spread over the ranks."""
        return list(paths[self.rank :: self.world_size])
