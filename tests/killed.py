"""A training that SIGKILL ends: `killed.py STEP FLAGS...`, after that step and before its checkpoint, every rank."""

import os
import signal
import sys
from typing import Any


def main() -> None:
    """Train; whoever gets beyond the step has not been killed, and fails."""
    from megatron_meap.backend import device

    device.prepare()
    import torch

    from megatron_meap.backend import megatron_patches
    from megatron_meap.trainer import run

    os.setpgid(0, 0)  # with it goes the process that gathers the results of a save
    step = int(sys.argv.pop(1))

    def kill(_model: Any, _optimizer: Any, iteration: int) -> None:
        if iteration == step:
            torch.distributed.barrier()
            sys.stdout.flush()
            os.killpg(0, signal.SIGKILL)

    megatron_patches.after_each_step(kill)
    run.run()
    sys.exit(f"step {step} was never reached")


if __name__ == "__main__":
    main()
