"""Run several trainings one after the other, some of them killed in mid-run: `kill_many.py RUNS.json`.

Every rank of every training is a process of its own, forked when Python and Megatron are imported already. RUNS.json
has for each name `ranks`, `flags` and `kill_at`: the step before whose checkpoint SIGKILL ends all ranks, or null.
"""

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from tests import run_many  # puts the CPU in the accelerator's place

from megatron_meap.backend import megatron_patches  # isort: skip  # after that


def main() -> None:
    """Run them all; the first failure ends the launch."""
    for name, one in json.loads(Path(sys.argv[1]).read_text()).items():
        print(f"\n=== run {name}", flush=True)
        with socket.create_server(("localhost", 0)) as found:
            port = found.getsockname()[1]
        ranks = {_start(rank, port, **one) for rank in range(one["ranks"])}
        failed = False
        while ranks:
            process, status = os.wait()
            ranks.remove(process)
            if status != 0:
                failed |= status != signal.SIGKILL or one["kill_at"] is None
                for other in ranks:
                    os.kill(other, signal.SIGKILL)
        if failed:
            sys.exit(f"run {name} failed")


def _start(rank: int, port: int, *, ranks: int, flags: list[str], kill_at: int | None) -> int:
    """A process that is one rank of a training; its id."""
    if process := os.fork():
        return process
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    sys.argv = ["pretrain_gpt_meap.py", *flags]

    def kill(_model: Any, _optimizer: Any, iteration: int) -> None:
        if iteration == kill_at:
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    status = 1
    try:
        megatron_patches.after_each_step(kill)
        run_many.run.run()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
