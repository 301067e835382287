"""Show the progress of training runs from their logs: losses, tokens per second, MFU, ETA, spikes; plot their curves.

    python tools/watch_training.py runs/demo/train.log
    python tools/watch_training.py runs/demo/train.log --plot losses.png
    python tools/watch_training.py NTP=runs/ntp/checkpoints MEAP=runs/demo/checkpoints --plot both.png

A run is given by its log file, or by its --save directory, which contains train.log. This works for any Megatron run
that has logged a step, finished or not. It ends when all runs are at 100%, at once with --once, or with Ctrl-C.
"""

from pathlib import Path

from megatron_meap.errors import UsageError
from megatron_meap.flags import Parser
from megatron_meap.inspection.curves import plot, plot_runs
from megatron_meap.inspection.training_log import Reader, follow, read_log


def main() -> None:
    """Follow logs, or plot them."""
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]LOG", help="log of a run, or its --save directory")
    parser.add_argument(
        "--plot", type=Path, metavar="PICTURE", help="draw the curves of all runs into this file, and exit"
    )
    parser.add_argument("--once", action="store_true", help="show the current progress and exit")
    args = parser.parse_args()
    logs = dict(map(_named, args.runs))
    if len(logs) < len(args.runs):
        raise UsageError(f"{' '.join(args.runs)}: two runs have the same name; name them: NAME=LOG")
    histories = {name: read_log(path) for name, path in logs.items()}
    if args.plot:
        if len(histories) == 1:
            plot(next(iter(histories.values())), args.plot)
        else:
            plot_runs(histories, args.plot)
        print(f"drew {sum(len(history.steps) for history in histories.values())} steps in {args.plot}")
        return
    readers = {name if len(logs) > 1 else "": Reader(path) for name, path in logs.items()}

    def all_done() -> bool:
        steps = (reader.history.steps for reader in readers.values())
        return all(each and max(each) >= each[max(each)].total for each in steps)

    for line in follow(readers, iter(lambda: args.once or all_done(), None)):
        print(line, flush=True)


def _named(word: str) -> tuple[str, Path]:
    """Name and log of a run named on the command line."""
    name, equals, rest = word.partition("=")
    named = bool(equals) and not Path(word).exists()
    path = Path(rest if named else word)
    path = path / "train.log" if path.is_dir() else path
    folders = [part for part in path.resolve().parts[:-1] if part != "checkpoints"]
    return name if named else folders[-1], path
