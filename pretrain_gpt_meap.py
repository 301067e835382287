"""Pretrain a GPT-style model with MEAP on Megatron's trainer, from one laptop to many nodes.

    torchrun --nproc_per_node 2 pretrain_gpt_meap.py --meap-mask-ratio 0.15 <Megatron's own flags>

Flags: `--help`; this project's own stand in the group MEAP. Without a GPU the CPU trains, with no further flag.
"""

import sys

from megatron_meap.backend import device
from megatron_meap.errors import run


def main() -> None:
    """Choose the device, then hand over to Megatron's trainer; or show what it would do."""
    if "--dry-run" in sys.argv:
        device.prepare_to_look()
        from megatron_meap.inspection import dry_run

        return dry_run.run()
    device.prepare()  # before anything imports Megatron
    from megatron_meap.trainer import run

    run.run()


if __name__ == "__main__":
    run(main)
