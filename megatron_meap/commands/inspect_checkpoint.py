"""Show the settings that determined the run of a checkpoint, compare it with another, verify its files.

    python tools/inspect_checkpoint.py checkpoints/run
    python tools/inspect_checkpoint.py checkpoints/run --compare checkpoints/other
    python tools/inspect_checkpoint.py checkpoints/run --ckpt-step 500 --verify

The argument is a directory as given to --save (its latest checkpoint, or --ckpt-step), or that of one iteration. Exit
status: 0; 1 if a run with the settings of the first could not resume the other; 2 if files are damaged.
"""

import os
import sys

from megatron_meap.flags import Parser


def main() -> None:
    """Describe, compare or verify the checkpoint."""
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", help="directory of the checkpoint")
    parser.add_argument("--ckpt-step", type=int, metavar="N", help="iteration (default: the latest)")
    parser.add_argument("--compare", metavar="DIR", help="another checkpoint: print only what differs")
    parser.add_argument("--verify", action="store_true", help="hash all files and compare them with what was recorded")
    flags = parser.parse_args()
    os.environ["MEAP_DEVICE"] = "cpu"
    from megatron_meap.backend import device

    device.prepare()
    from megatron_meap.inspection import checkpoints

    if flags.verify:
        print(checkpoints.verify(flags.checkpoint, flags.ckpt_step), flush=True)
    if flags.compare is None:
        print(*checkpoints.describe(flags.checkpoint, flags.ckpt_step), sep="\n")
        return
    lines, resumes = checkpoints.compare(flags.checkpoint, flags.ckpt_step, flags.compare)
    print(*lines, sep="\n")
    sys.exit(0 if resumes else 1)
