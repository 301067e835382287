"""Show a training run's progress from its log: percent, losses, tokens per second, time left; draw its curves.

    python tools/watch_training.py runs/demo/train.log
    python tools/watch_training.py runs/demo/train.log --plot losses.png

Works on the output of any Megatron run that has logged a step, finished or not; stop watching with Ctrl-C.
"""

import argparse
import itertools
from pathlib import Path

from megatron_meap.inspection.training_log import follow, plot, read_log


def main() -> None:
    """Follow a log, or draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="file that the output of the training goes to")
    parser.add_argument("--plot", type=Path, metavar="PICTURE", help="draw the loss curves there, and end")
    args = parser.parse_args()
    history = read_log(args.log)
    if args.plot:
        plot(history, args.plot)
        print(f"drew {len(history.steps)} steps in {args.plot}")
        return
    for line in follow(args.log, itertools.repeat(False)):
        print(line, flush=True)
