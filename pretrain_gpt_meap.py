"""Pretrain a GPT-style model with MEAP on Megatron's trainer, from one laptop to many nodes.

    torchrun --nproc_per_node 2 pretrain_gpt_meap.py --meap-mask-ratio 0.15 <Megatron's own flags>

Flags: `--help`. Without a GPU the CPU trains, with no further flag.
"""

from megatron_meap.errors import run
from megatron_meap.pretrain import main

if __name__ == "__main__":
    run(main)
