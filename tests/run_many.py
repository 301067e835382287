"""Run several trainings one after the other in the same ranks: `run_many.py RUNS.json`, launched by tests/launch.py."""

import contextlib
import gc
import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Run them all; the first failure ends the launch with its traceback.

    What is heavy is imported here, not above: Megatron's first save starts a process that imports this module again.
    """
    from megatron_meap.backend import device

    device.prepare()
    import torch

    from megatron_meap.trainer import run

    for name, flags in json.loads(Path(sys.argv[1]).read_text()).items():
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # the heading after all that the training before has said
        if os.environ["RANK"] == "0":
            print(f"\n=== run {name}", flush=True)
        if torch.distributed.is_initialized():
            forget()
        sys.argv = ["pretrain_gpt_meap.py", *flags]
        with contextlib.suppress(SystemExit):  # how --exit-interval ends a training; the status tells in the log
            run.run()
        sys.stdout.flush()


def forget() -> None:
    """End the process groups of a training, and what Megatron knows of it, in all ranks.

    Each of gloo's groups has a thread that wakes up a hundred times a second: of many trainings they are a thousand.
    """
    import torch
    from megatron.training.training import destroy_global_state

    from tests.launch import free_port

    port = [free_port()]
    torch.distributed.broadcast_object_list(port)
    # The next store is another one: a rank that is early would find the old one, which is about to go.
    os.environ["MASTER_PORT"] = str(port[0])
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    torch.distributed.barrier()
    destroy_global_state()
    torch.distributed.destroy_process_group()
    gc.collect()


if __name__ == "__main__":
    main()
