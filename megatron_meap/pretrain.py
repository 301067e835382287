"""Pretrain a GPT-style model with MEAP on Megatron's trainer, from one laptop to many nodes.

    torchrun --nproc_per_node 2 -m megatron_meap.pretrain --meap-mask-ratio 0.15 <Megatron's own flags>

In a checkout `pretrain_gpt_meap.py` is the same. Without a GPU the CPU trains, with no further flag.
"""

import signal
import sys
from collections.abc import Callable
from functools import partial

from megatron_meap import errors
from megatron_meap.backend.garbage import nothing_is_garbage
from megatron_meap.flags import with_files


def main() -> None:
    """Choose the device, then start Megatron's trainer, or show what it would do."""
    signal.signal(signal.SIGINT, errors.end_at_once)
    sys.argv = with_files(sys.argv)
    with nothing_is_garbage():
        do = _what_is_asked()
    do()


def _what_is_asked() -> Callable[[], object]:
    # PyTorch is imported here, not above: Megatron's first save starts a process that imports this module again.
    from megatron_meap.backend import device

    if "--help" in sys.argv or "-h" in sys.argv or "--help-all" in sys.argv:
        device.prepare_to_look()
        from megatron_meap.trainer import help

        return partial(help.show, everything="--help-all" in sys.argv)
    if "--dry-run" in sys.argv:
        device.prepare_to_look(here=True)
        from megatron_meap.inspection import dry_run

        return dry_run.run
    device.prepare()  # before anything imports Megatron
    from megatron_meap.huggingface.architecture import not_exported
    from megatron_meap.trainer import run

    return partial(run.run, not_exported)


if __name__ == "__main__":
    errors.run(main)
