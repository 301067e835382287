"""Checkpoints: how long a save stalls the training, in the foreground and in the background; how long a load takes.

    python benchmarks/checkpoint.py                  # the quickstart's model, and one with checkpoints of 1 GB
    python benchmarks/checkpoint.py --sizes small --rounds 2
    python benchmarks/checkpoint.py --processes 2    # data-parallel ranks with the distributed optimizer

Every run is `pretrain_gpt_meap.py`, which saves five times, with hashes, and is then resumed. A save
begins some steps after the one before it is complete, so none waits for another. Runs that save in the foreground
alternate with runs with `--async-save`.

- stall: how long the training loop waits for a save. The first one in the background starts the saving process.
- hashes: the part of that for the hashes (in the background, the saving process computes them)
- until it counts: from the beginning of a save until the checkpoint is complete and named as the newest
- load: reading the checkpoint back and verifying its hashes
- steps beside: the time of a step during a save in the background, relative to one without a save

Wall time, medians; memory is the peak of the training process. The stalls are also given as parts of a step of the same
run, in processor time of the training thread, which other jobs on the machine hardly change. Of several processes the
times are those of rank 0.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import watch  # noqa: E402

SIZES = {
    "small": "--num-layers 4 --hidden-size 256 --ffn-hidden-size 704 --num-attention-heads 4",
    "1 GB": "--num-layers 8 --hidden-size 768 --ffn-hidden-size 2048 --num-attention-heads 12",
}
"""The quickstart's model with 5 million parameters, and one with 69 million; each parameter takes 14 bytes."""

FLAGS = (
    "--seq-length 128 --max-position-embeddings 128 --position-embedding-type rope --swiglu --normalization RMSNorm "
    "--disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --bf16 "
    "--tokenizer-type NullTokenizer --vocab-size 8000 --mock-data --num-workers 0 --micro-batch-size 1 "
    "--lr 1e-4 --log-interval 1 --eval-iters 0 --meap-mask-ratio 0.15 "
    "--train-iters 2000 --save-interval 2000"
)
SAVES, BETWEEN = 5, 4
"""Saves of a run, and steps without one before each; then the run ends."""

RESUMED = ["--exit-interval", "1"]
WAYS = {"foreground": [], "background": ["--async-save"]}


def main() -> None:
    """Measure every size in every way, alternating, and print a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="(default: both)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="ranks (default: %(default)s)")
    args = parser.parse_args()
    from results import turns

    for size in args.sizes:
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in turns(args.rounds):
            for way, flags in WAYS.items():
                found[way].append(measure(size, flags, args.processes))
        print_table(size, found)


def measure(size: str, flags: list[str], processes: int) -> dict[str, Any]:
    """Results of a run that saves and of one that resumes from it."""
    start, more_flags = [sys.executable], ["--global-batch-size", str(processes)]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        more_flags += ["--use-distributed-optimizer"]
    with tempfile.TemporaryDirectory() as folder:
        told = [Path(folder) / name for name in ("saved.json", "loaded.json")]
        command = [*start, __file__, *SIZES[size].split(), *FLAGS.split(), *more_flags]
        command += ["--load", f"{folder}/checkpoints"]
        for file, more in zip(told, (["--save", f"{folder}/checkpoints", *flags], RESUMED), strict=True):
            environment = os.environ | {"CHECKPOINT_TOLD": str(file), "MEAP_DEVICE": "cpu", "MEAP_CPU_THREADS": "1"}
            done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
        saved, loaded = (json.loads(file.read_text()) for file in told)
        newest = max(Path(folder, "checkpoints").glob("iter_*"))
        files = [each for each in newest.rglob("*") if each.is_file()]
        return saved | {"load": loaded["load"], "bytes": sum(each.stat().st_size for each in files)}


class Watch:
    """Records when the program saves, steps and loads, and when a save is complete."""

    def __init__(self) -> None:
        self.began: dict[str, tuple[float, float]] = {}
        self.spans: dict[str, list[tuple[float, float]]] = {"save": [], "step": [], "load": [], "hash": []}
        self.worked: dict[str, list[float]] = {what: [] for what in self.spans}
        self.complete: list[float] = []
        self.quiet = 0
        self.pointer = Path(sys.argv[sys.argv.index("--load") + 1], "latest_checkpointed_iteration.txt")
        self.seen: int | None = None
        threading.Thread(target=self.see_completions, daemon=True).start()

    def see_completions(self) -> None:
        """Note when the file that names the newest checkpoint changes."""
        while True:
            self.see_completion()
            time.sleep(0.005)

    def see_completion(self) -> None:
        """Look at it once."""
        now = self.pointer.stat().st_mtime_ns if self.pointer.exists() else None
        if now != self.seen:
            self.complete.append(time.time())
            self.seen = now

    def begin(self, what: str) -> None:
        """It begins."""
        self.began[what] = time.time(), time.thread_time()

    def end(self, what: str) -> None:
        """It has ended."""
        began, worked = self.began[what]
        self.spans[what].append((began, time.time()))
        self.worked[what].append(time.thread_time() - worked)

    def save_now_and_then(self) -> None:
        """After a step: decide whether to save, and whether to end with that save."""
        from megatron.training import get_args
        from torch.distributed import broadcast_object_list

        args = get_args()
        if not args.save:
            return
        self.see_completion()
        saves = self.spans["save"]
        self.quiet += 1 if not saves or any(each > saves[-1][0] for each in self.complete) else 0
        decided = [self.quiet > BETWEEN]
        broadcast_object_list(decided, 0)  # the ranks see the file change at different steps
        [due] = decided
        self.quiet *= not due
        args.save_interval = 1 if due else None
        args.exit_interval = 1 if due and len(saves) == SAVES - 1 else None

    def mark(self, run: Any) -> None:
        """The functions of Megatron's."""
        from megatron.training import training

        from megatron_meap.checkpoint import integrity

        for what, owner, name in (
            ("save", training, "save_checkpoint_and_time"),
            ("step", training, "train_step"),
            ("load", training, "load_checkpoint"),
            ("hash", integrity, "hash_files"),
        ):
            watch.around(owner, name, partial(self.begin, what), partial(self.end, what))
        watch.around(training, "checkpoint_and_decide_exit", self.save_now_and_then, lambda: None)

    def told(self) -> dict[str, Any]:
        """Seconds of each save, step and load; the stalls in steps too."""
        self.see_completion()  # of the last save, just before the end
        seconds = {what: [end - begin for begin, end in spans] for what, spans in self.spans.items()}
        saves = [begin for begin, _ in self.spans["save"]]
        counts = [min(end for end in self.complete if end > begin) - begin for begin in saves]
        during = [
            any(begin < saved + counted and end > saved for saved, counted in zip(saves, counts, strict=True))
            for begin, end in self.spans["step"]
        ]
        steps = list(zip(seconds["step"], during, strict=True))[1:]
        step = statistics.median(self.worked["step"])
        return {
            "stalls in steps": [each / step for each in self.worked["save"]],
            "first stall": seconds["save"][:1],
            "stall": seconds["save"][1:],
            "hashes": [
                sum(end - begin for begin, end in self.spans["hash"] if start <= begin < finish)
                for start, finish in self.spans["save"][1:]
            ],
            "until it counts": counts[1:],
            "step": [took for took, beside in steps if not beside],
            "step beside": [took for took, beside in steps if beside],
            "load": sum(seconds["load"]),
            "memory": watch.peak_memory(),
        }


def print_table(size: str, found: dict[str, list[dict[str, Any]]]) -> None:
    """A line for each way to save."""
    from results import record

    rounds_of_one = found["foreground"]
    size_mb = rounds_of_one[0]["bytes"] / 1e6
    print(f"\n{size} model: {size_mb:.0f} MB a checkpoint, {len(rounds_of_one)} rounds; seconds, medians")
    columns = ("first stall", "stall", "hashes", "until it counts", "step", "step beside")
    print(f"{'':16}" + "".join(f"{name:>16}" for name in columns) + f"{'load':>8}{'memory MB':>11}")
    for way, rounds in found.items():
        line = f"{way:16}"
        for name in columns:
            values = [value for each in rounds for value in each[name]]
            line += f"{statistics.median(values):16.3f}" if values else f"{'-':>16}"
            if values and name in ("first stall", "stall", "until it counts"):
                record(f"checkpoint of {size_mb:.0f} MB, {way}: {name}", values, "s")
        loads, memory = ([each[name] for each in rounds] for name in ("load", "memory"))
        record(f"checkpoint of {size_mb:.0f} MB, {way}: load", loads, "s")
        print(f"{line}{statistics.median(loads):8.2f}{statistics.median(memory):11.0f}")
    for way, rounds in found.items():
        ratios = {
            "first stall, in steps": [each["stalls in steps"][0] for each in rounds],
            "stall, in steps": [value for each in rounds for value in each["stalls in steps"][1:]],
            "stall, % of the save": [
                100 * stall / until
                for each in rounds
                for stall, until in zip(each["stall"], each["until it counts"], strict=True)
            ],
        }
        for what, values in ratios.items():
            print(f"{way}, {what}: {statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})")
            record(f"checkpoint of {size_mb:.0f} MB, {way}: {what}", values, "%" if "%" in what else "steps")


def rank() -> None:
    """Run the program under observation, in a process started for it."""
    watched = Watch()
    try:
        watch.pretrain(watched.mark)
    finally:
        if watch.is_first_rank():
            Path(os.environ["CHECKPOINT_TOLD"]).write_text(json.dumps(watched.told()))


if __name__ == "__main__":
    rank() if "CHECKPOINT_TOLD" in os.environ else main()
