"""Run several trainings one after the other, some of them killed in mid-run: `kill_many.py RUNS.json`.

Every rank of every training is a process of its own, forked when Python and Megatron are imported already. RUNS.json
has for each name `ranks`, `flags` and `kill_at`: the step before whose checkpoint SIGKILL ends all ranks, or null.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    """Run them all; the first failure ends the launch."""
    from tests import run_many  # noqa: F401  # here, for the process that gathers a save's results imports this module

    for name, one in json.loads(Path(sys.argv[1]).read_text()).items():
        print(f"\n=== run {name}", flush=True)
        with socket.create_server(("localhost", 0)) as found:
            port = found.getsockname()[1]
        ranks = [_start(rank, port, **one) for rank in range(one["ranks"])]
        if not _end(ranks, killed=one["kill_at"] is not None):
            sys.exit(f"run {name} failed")


def _start(rank: int, port: int, *, ranks: int, flags: list[str], kill_at: int | None) -> int:
    """A process group with one rank of a training in it; its id."""
    if process := os.fork():
        return process
    os.setpgid(0, 0)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    sys.argv = ["pretrain_gpt_meap.py", *flags]
    from megatron_meap.backend import megatron_patches
    from megatron_meap.trainer import run

    def kill(_model: Any, _optimizer: Any, iteration: int) -> None:
        if iteration == kill_at:
            sys.stdout.flush()
            os.killpg(0, signal.SIGKILL)

    status = 1
    try:
        megatron_patches.after_each_step(kill)
        run.run()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _end(ranks: list[int], killed: bool) -> bool:
    """Wait for the ranks, and end what they leave; whether they ended as they should."""
    well, left = True, set(ranks)
    while left:
        process, status = os.wait()
        left.remove(process)
        if status != 0:
            well &= killed and status == signal.SIGKILL
            for other in left:
                os.kill(other, signal.SIGKILL)
    for group in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    return well


if __name__ == "__main__":
    main()
