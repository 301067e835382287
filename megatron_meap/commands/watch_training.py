"""Show a training run's progress from its log: percent, losses, tokens per second, time left; draw its curves.

    python tools/watch_training.py runs/demo/train.log
    python tools/watch_training.py runs/demo/train.log --plot losses.png

Works on the output of any Megatron run that has logged a step, finished or not. It ends at 100%, with --once
at once, or at Ctrl-C.
"""

import argparse
from pathlib import Path

from megatron_meap.inspection.training_log import History, follow, plot, read_log


def main() -> None:
    """Follow a log, or draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="file that the output of the training goes to")
    parser.add_argument("--plot", type=Path, metavar="PICTURE", help="draw the loss curves there, and end")
    parser.add_argument("--once", action="store_true", help="show the last progress and end")
    args = parser.parse_args()
    seen, history = History(), read_log(args.log)
    if args.plot:
        plot(history, args.plot)
        print(f"drew {len(history.steps)} steps in {args.plot}")
        return
    last = history.steps[max(history.steps)]
    done = (args.once or reached >= last.total for reached in iter(lambda: max(seen.steps, default=0), None))
    for line in follow(args.log, done, seen):
        print(line, flush=True)
