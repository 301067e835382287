"""Branch a checkpoint of a run with a constant learning rate into a run that decays (WSD), with its own --save.

    python tools/branch_run.py runs/stable/checkpoints --at 18000 --decay 2000 --save runs/20b/checkpoints
    torchrun ... pretrain_gpt_meap.py <the stable run's flags> @runs/20b/checkpoints/branch_flags.txt

The second command trains the branch, and resumes it. It reads the data that the stable run would have read next.
The stable run is not changed, and checkpoints that it deletes later stay in the branch.
"""

import os
from pathlib import Path

from megatron_meap.flags import Parser


def main() -> None:
    """Make the branch, and say how it is trained."""
    parser = Parser(__doc__, allow_abbrev=False)
    parser.add_argument("stable", type=Path, help="--save directory of the stable run")
    parser.add_argument("--at", type=int, metavar="STEP", help="checkpoint to branch from (default: the newest)")
    parser.add_argument("--decay", type=int, required=True, metavar="STEPS", help="length of the decay")
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="--save directory of the branch")
    styles = ("linear", "cosine", "exponential", "minus_sqrt")
    parser.add_argument("--style", choices=styles, default=styles[0], help="shape of the decay (default: %(default)s)")
    parser.add_argument(
        "--min-lr", type=float, metavar="LR", help="learning rate at the end (default: the stable run's --min-lr)"
    )
    flags = parser.parse_args()
    os.environ["MEAP_DEVICE"] = "cpu"
    from megatron_meap.backend import device

    device.prepare()
    from megatron_meap.trainer.branch import FLAGS, Branch

    made = Branch(flags.stable, flags.at, flags.decay, flags.save, flags.style, flags.min_lr).make()
    print(*made, sep="\n")
    print(f"to train the branch, append to the stable run's command: @{flags.save / FLAGS} at its end", flush=True)
