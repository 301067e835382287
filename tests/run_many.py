"""Run several trainings one after the other in the same ranks: `run_many.py RUNS.json`, launched by tests/launch.py."""

import contextlib
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
    from megatron.training.training import destroy_global_state

    from megatron_meap.trainer import run

    for name, flags in json.loads(Path(sys.argv[1]).read_text()).items():
        if os.environ["RANK"] == "0":
            print(f"\n=== run {name}", flush=True)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # the heading before any rank's output
        sys.argv = ["pretrain_gpt_meap.py", *flags]
        with contextlib.suppress(SystemExit):  # how --exit-interval ends a training; the status tells in the log
            run.run()
        sys.stdout.flush()
        torch.distributed.barrier()
        destroy_global_state()


if __name__ == "__main__":
    main()
