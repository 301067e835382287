"""Plan a run before it is queued: parameters, memory of every rank, FLOPs, time and cost. No GPU is needed.

    python tools/plan_run.py --gpu h100 --gpus 64 --mfu 0.4 --price 2.5 --compare 5 <the flags of the training run>
    bash examples/pretrain/llama_70b.sh --plan --gpu h200 --compare 5

Parameters are counted on Megatron's own model, activations by running it on tensors without memory. Time is model FLOPs
divided by the GPUs' peak times `--mfu`, which you have to estimate: measure it with benchmarks/gpu.py.
"""

import argparse
import contextlib
import io
import logging
import os
import sys
import warnings

from megatron_meap.backend import device
from megatron_meap.errors import UsageError
from megatron_meap.flags import Parser, with_files


def parse() -> argparse.Namespace:
    """Take this tool's flags from the command line and leave the rest for Megatron's parser."""
    parser = Parser(__doc__, allow_abbrev=False)
    parser.add_argument("--gpu", default="h100", metavar="KIND", help="a100-40, a100, h100, h200, b200, l40s")
    parser.add_argument("--gpus", type=int, metavar="N", help="number of GPUs (default: WORLD_SIZE, or 1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--mfu", type=float, default=0.4, metavar="SHARE", help="expected MFU (default: %(default)s)")
    parser.add_argument(
        "--price", type=float, metavar="MONEY", help="price of one GPU per hour (default: no cost is shown)"
    )
    parser.add_argument(
        "--reserve",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of a GPU's memory reserved for CUDA, NCCL and fragmentation (default: %(default)s)",
    )
    parser.add_argument("--compare", type=int, default=0, metavar="N", help="propose the best N layouts that fit")
    own, rest = parser.parse_known_args(with_files(sys.argv[1:]))
    sys.argv = [sys.argv[0], *rest]
    return own


def main() -> None:
    """Plan, and compare layouts if asked."""
    own = parse()
    if own.gpus is not None and own.gpus < 1:
        raise UsageError(f"--gpus {own.gpus}: must be at least 1")
    if not 0 < own.mfu <= 1 or not 0 <= own.reserve < 1:
        raise UsageError(f"--mfu {own.mfu}, --reserve {own.reserve}: shares must lie between 0 and 1")
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(own.gpus or os.environ.get("WORLD_SIZE", 1))}
    device.prepare_to_look()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # the libraries' chatter: what matters is printed or raised
    from megatron_meap.backend import megatron_patches
    from megatron_meap.backend.peak import GPUS
    from megatron_meap.planning import layouts, text
    from megatron_meap.trainer import arguments

    if own.gpu not in GPUS:
        raise UsageError(f"--gpu {own.gpu}: unknown; choose from {', '.join(GPUS)}")
    gpu = GPUS[own.gpu]
    usable = gpu.memory * 2**30 * (1 - own.reserve)
    megatron_patches.apply()
    with contextlib.redirect_stdout(io.StringIO()):
        flags = arguments.parse_flags()
    base = layouts.plan(flags)
    print(text.describe(base))
    hours = base.work.hours(base.args.world_size, gpu, own.mfu)
    cost = f", {hours * base.args.world_size * own.price:,.0f} in all" if own.price else ""
    print(
        f"\ntime          {hours:,.1f} hours on {base.args.world_size} x {gpu.name} at {100 * own.mfu:.0f}% MFU{cost}"
    )
    for warning in text.warnings(base, usable, own.gpus_per_node):
        print(f"warning: {warning}")
    if own.compare:
        plans = layouts.best(base, flags, own.gpus_per_node, usable, own.compare)
        if not plans:
            raise UsageError(f"--gpus {base.args.world_size}: no layout fits {gpu.name}; give it more GPUs")
        print(
            f"\nthe best layouts that fit into {usable / 2**30:.1f} GiB; {100 * own.mfu:.0f}% MFU does not include the "
            "slowdown by recomputation and pipeline"
        )
        print(text.table(plans, gpu, own.mfu, own.price))
