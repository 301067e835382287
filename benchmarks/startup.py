"""Start: from the command to the end of the first training step, and how the time in between was spent.

    python benchmarks/startup.py                           # one and two processes
    python benchmarks/startup.py --against CHECKOUT        # compared with another version of this project

A small model (that of the quickstart), trained on text from this Python installation with a SentencePiece tokenizer.
Each start is a separate command, alone or under torchrun; the parts are those of rank 0:

- launch: from the command to the first line of the script (torchrun imports PyTorch before it starts the ranks)
- imports: PyTorch, Megatron and this project
- flags, tokenizer: parsing, this project's checks and Megatron's; building the tokenizer, finding its mask token
- checks: the data's indices and digests, the record of the run, the meeting of the ranks
- Megatron: its process groups and random states; model: with its optimizer; data: indices of samples and loaders
- first step: forward, backward, optimizer

Wall time is how long one waits. Processor time (of rank 0 for the parts, of all processes for the whole) does not
depend on other work on the machine. Figures are medians over the rounds, of the ratio within a round for ratios.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import watch  # noqa: E402

HERE = Path(__file__).resolve().parent.parent

FLAGS = (
    "--num-layers 4 --hidden-size 256 --ffn-hidden-size 704 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --seq-length 256 --max-position-embeddings 256 --position-embedding-type rope --swiglu "
    "--normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 "
    "--hidden-dropout 0 --meap-mask-ratio 0.15 --split 95,5,0 --num-workers 1 --micro-batch-size 8 "
    "--global-batch-size 16 --train-iters 1 --lr 1e-3 --log-interval 1 --eval-iters 0 "
    "--tokenizer-type SentencePieceTokenizer"
)
PARTS = ("launch", "imports", "flags", "tokenizer", "checks", "Megatron", "model", "data", "first step")


def main() -> None:
    """Start each version on each number of processes, in turns, and print the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another version of this project")
    parser.add_argument("--rounds", type=int, default=5, help="starts of each (default: %(default)s)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    args = parser.parse_args()
    from results import turns  # it imports PyTorch, which each rank is to do itself

    versions = {"here": HERE} | ({"there": args.against.resolve()} if args.against else {})
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder))
        for turn in turns(args.rounds, warm_up=1):  # the first reads the files from the disk
            for processes in args.processes:
                for name, checkout in sorted(versions.items(), reverse=bool(turn % 2)):
                    measured = start(checkout, processes, data, Path(folder) / "parts.json")
                    found.setdefault(f"{processes} {name}", []).extend([measured] if turn else [])
    for processes in args.processes:
        measured_here = [found[f"{processes} {name}"] for name in versions]
        print_table(processes, measured_here, list(versions))
        _record(processes, list(versions), measured_here)


def make_data(folder: Path) -> list[str]:
    """Make a corpus from this Python installation and a tokenizer, with the tools; returns the flags that name them."""
    texts, tokenizer = folder / "text.jsonl", folder / "tokenizer.model"
    commands = (
        ["build_corpus.py", "--train", texts, "--valid", folder / "valid.jsonl", "--max-mb", "4"],
        ["train_tokenizer.py", "--input", texts, "--output", tokenizer, "--vocab-size", "4096", "--max-mb", "2"],
        ["preprocess_data.py", "--input", texts, "--output-prefix", folder / "data", "--append-eod",
         "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer],
    )  # fmt: skip
    for tool, *rest in commands:
        subprocess.run([sys.executable, HERE / "tools" / tool, *map(str, rest)], check=True, capture_output=True)
    return ["--data-path", f"{folder}/data_text_document", "--tokenizer-model", str(tokenizer)]


def start(checkout: Path, processes: int, data: list[str], parts: Path) -> dict[str, Any]:
    """Seconds of the parts of one start, wall and processor time, and the processor time of all its processes."""
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", str(processes)]
    command = [*([sys.executable] if processes == 1 else torchrun), __file__, *FLAGS.split(), *data]
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "MEAP_DEVICE": "cpu",
        "MEAP_CPU_THREADS": "1",  # threads that wait for each other burn time if other work is running
        "START_PARTS": str(parts),
        "START_AT": str(time.time()),
    }
    before = os.times()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    after = os.times()
    if done.returncode:
        sys.exit(f"{checkout}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    used = sum(after[2:4]) - sum(before[2:4])
    return json.loads(parts.read_text()) | {"processor time of all processes, whole run": used}


def print_table(processes: int, found: list[list[dict[str, Any]]], names: list[str]) -> None:
    """A line for each part, and one for the whole."""
    print(
        f"\n{processes} process{'es under torchrun' if processes > 1 else ''}, {len(found[0])} rounds; seconds, medians"
    )
    print(f"{'':14}" + "".join(f"{f'{name}: wall':>13}{'processor':>11}" for name in names))
    for part in (*PARTS, "until then"):
        line = f"{part:14}"
        for rounds in found:
            line += f"{statistics.median(each[part][0] for each in rounds):13.2f}"
            line += f"{statistics.median(each[part][1] for each in rounds):11.2f}"
        print(line)
    sums = ", ".join(f"{name} {_median(rounds):.2f}" for name, rounds in zip(names, found, strict=True))
    print(f"all processes, whole run: {sums}")
    if len(found) == 2:
        for which, kind in enumerate(("wall", "processor")):
            ratios = [a["until then"][which] / b["until then"][which] for a, b in zip(*found, strict=True)]
            print(f"{kind} time here / there: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def _record(processes: int, names: list[str], found: list[list[dict[str, Any]]]) -> None:
    from results import record

    kind = "1 process" if processes == 1 else f"{processes} processes under torchrun"
    for name, rounds in zip(names, found, strict=True):
        for which, time_of in enumerate(("wall", "processor")):
            record(f"start, {kind}, {name}: {time_of} time", [each["until then"][which] for each in rounds], "s")
    if len(found) == 2:
        ratios = [a["until then"][1] / b["until then"][1] for a, b in zip(*found, strict=True)]
        record(f"start, {kind}: processor time here / there", ratios, "x")


def _median(rounds: list[dict[str, Any]]) -> float:
    return statistics.median(each["processor time of all processes, whole run"] for each in rounds)


class Watch:
    """Follows the program: certain calls end one part and begin the next."""

    def __init__(self) -> None:
        self.parts = {part: [0.0, 0.0] for part in PARTS}
        self.last = [float(os.environ["START_AT"]), 0.0]

    def ended(self, part: str | None) -> None:
        """The time since the last call belongs to this part."""
        if part is None:
            return
        now = [time.time(), time.process_time()]
        for which in range(2):
            self.parts[part][which] += now[which] - self.last[which]
        self.last = now
        if part == PARTS[-1] and watch.is_first_rank():
            total = [sum(each[which] for each in self.parts.values()) for which in range(2)]
            Path(os.environ["START_PARTS"]).write_text(json.dumps(self.parts | {"until then": total}))

    def mark(self, run: Any) -> None:
        """The functions, each with the part that ends before it and the part that it is."""
        from megatron.training import training

        from megatron_meap.trainer import arguments

        marks = [
            (run, "run", "imports", None),
            (arguments, "set_tokenizer", "flags", "tokenizer"),
            (run.preflight, "check", "flags", "checks"),
            (training, "setup_model_and_optimizer", "Megatron", "model"),
            (training, "build_train_valid_test_data_iterators", "model", "data"),
            (training, "train_step", "data", "first step"),
        ]
        for owner, name, before, part in marks:
            watch.around(owner, name, partial(self.ended, before), partial(self.ended, part))


def rank() -> None:
    """Run the program under observation, in a process started for it."""
    watched = Watch()
    watched.ended("launch")
    watch.pretrain(watched.mark)


if __name__ == "__main__":
    rank() if "START_PARTS" in os.environ else main()
