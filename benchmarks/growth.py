"""How cost grows: with the length of sequences, the vocabulary, the number of processes, and the corpus.

    python benchmarks/growth.py --picture docs/growth.png      # a quarter of an hour on two quiet cores
    python benchmarks/growth.py --only length corpus

The model is that of the speed figures (15.6M parameters), in bf16. Each point is a separate run:

- length: a step of 8,192 tokens, in sequences of 128 to 8,192
- vocabulary: a step of 2,048 tokens, with 8,064 to 128,064 rows in the embedding and in the output layer
- processes: a step of 4,096 tokens on 1 to 4 processes, split by data (DP), tensors (TP) or layers (PP)
- corpus: preprocessing of text gathered from this Python installation (`tools/build_corpus.py`), with two workers

Processor time is that of all processes together, the median of the steps. Memory is the peak: of the largest process in
training, of all processes together in preprocessing. Each process has one thread: how much wall time several cores save
depends on the machine, and is not measured.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from preprocess import Tool, enlarge  # noqa: E402
from results import record  # noqa: E402

LENGTHS = (128, 512, 2048, 8192)
VOCABULARIES = (8064, 32064, 128064)
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1": (1, []),
    "DP 2": (2, []),
    "TP 2": (2, ["--tensor-model-parallel-size", "2"]),
    "PP 2": (2, ["--pipeline-model-parallel-size", "2"]),
    "DP 4": (4, []),
    "TP 2 x PP 2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
}
"""Processes and flags of a layout."""
MEGABYTES = (100, 500, 2000)
WHAT = {"length": "tokens in a sequence", "vocabulary": "rows", "processes": "layout", "corpus": "MB of JSON lines"}


def main() -> None:
    """Measure all points, print them as a table and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(WHAT), default=list(WHAT), help="(default: all)")
    parser.add_argument("--steps", type=int, default=3, help="of each run, after one that warms up (default: 3)")
    parser.add_argument("--picture", type=Path, help="PNG to draw")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)  # a rank of one run
    args = parser.parse_args()
    if args.point:
        return measure(args.point)
    found: dict[str, list[tuple[str, float, float]]] = {}
    for what in args.only:
        print(f"\n| {WHAT[what]} | processor time, s | memory, MB |\n|---|---|---|", flush=True)
        for name, seconds, megabytes in points(what, args.steps):
            print(f"| {name} | {seconds:.2f} | {megabytes:,.0f} |", flush=True)
            record(f"growth, {what} {name}: processor time", [seconds], "s")
            record(f"growth, {what} {name}: memory", [megabytes], "MB")
            found.setdefault(what, []).append((name, seconds, megabytes))
    if args.picture:
        draw(found, args.picture)


def points(what: str, steps: int) -> Iterator[tuple[str, float, float]]:
    """Name, processor seconds and peak memory in MB of every run of a kind."""
    if what == "length":
        for length in LENGTHS:
            yield f"{length:,}", *run({"batch": 8192 // length, "length": length, "steps": steps})
    elif what == "vocabulary":
        for rows in VOCABULARIES:
            yield f"{rows:,}", *run({"batch": 1, "length": 2048, "vocabulary": rows, "steps": steps})
    elif what == "processes":
        for name, (processes, flags) in LAYOUTS.items():
            point = {"batch": 2, "length": 512, "flags": [*flags, "--global-batch-size", "8"], "steps": steps}
            yield name, *run(point, processes)
    else:
        yield from corpora()


def run(point: dict[str, Any], processes: int = 1) -> tuple[float, float]:
    """A separate training run: seconds of a step, of all processes together, and MB of the largest one."""
    command = [sys.executable, __file__, "--point", json.dumps(point)]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"MEAP_DEVICE": "cpu", "MEAP_CPU_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    ranks = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("found ")]
    steps = [sum(seconds) for seconds in zip(*(rank["seconds"] for rank in ranks), strict=True)]
    return statistics.median(steps), max(rank["megabytes"] for rank in ranks)


def measure(point: dict[str, Any]) -> None:
    """This rank's part of a run: processor seconds of its steps, and its memory."""
    import torch
    import trainer
    from trainer import Trainer, flags, random_batches

    trainer.SHAPE["vocabulary"] = point.get("vocabulary", trainer.SHAPE["vocabulary"])
    shape = point["batch"], point["length"]
    built = Trainer(flags(*shape, "--meap-mask-ratio", "0.15", "--bf16", *point.get("flags", [])))
    from megatron.core.rerun_state_machine import RerunDataIterator

    batches = RerunDataIterator(random_batches(*shape, trainer.SHAPE["vocabulary"] - 64))
    seconds = []
    for _ in range(point["steps"] + 1):
        begun = time.process_time()
        built.step(batches)
        seconds.append(time.process_time() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    torch.distributed.destroy_process_group()  # now and then gloo's threads abort a process that ends without
    os.write(1, f"found {json.dumps({'seconds': seconds[1:], 'megabytes': peak})}\n".encode())


def corpora() -> Iterator[tuple[str, float, float]]:
    """Preprocessing of corpora of several sizes."""
    with tempfile.TemporaryDirectory() as folder:
        small, large, tokenizer = (f"{folder}/{name}" for name in ("small.jsonl", "large.jsonl", "tokenizer.model"))
        tool("build_corpus", "--train", small, "--valid", f"{folder}/valid.jsonl", "--max-mb", "12")
        tool("train_tokenizer", "--input", small, "--output", tokenizer, "--vocab-size", "4096", "--max-mb", "4")
        for megabytes in MEGABYTES:
            enlarge(small, Path(large), megabytes * 10**6)
            flags = ["--input", large, "--append-eod", "--workers", "2", "--overwrite"]
            flags += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer]
            preprocessing = Tool(HERE.parent / "tools" / "preprocess_data.py", flags)
            preprocessing.run(Path(folder, "data"))
            yield f"{megabytes:,}", preprocessing.processor_seconds[0], preprocessing.peak_mb[0]


def tool(name: str, *flags: str) -> None:
    """Run a tool quietly."""
    command = [sys.executable, HERE.parent / "tools" / f"{name}.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"tools/{name}.py failed:\n{done.stderr[-2000:]}")


def draw(found: dict[str, list[tuple[str, float, float]]], path: Path) -> None:
    """Time above, memory below, for everything that was measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(found) + 0.4, 5.6))
    axes = figure.subplots(2, len(found), squeeze=False)
    for column, (what, each) in enumerate(found.items()):
        names = [name for name, _, _ in each]
        for row, unit in enumerate(("processor time, s", "memory, MB")):
            axis = axes[row][column]
            axis.bar(range(len(each)), [point[1 + row] for point in each], color=("tab:blue", "tab:orange")[row])
            axis.set_xticks(range(len(each)), names, rotation=30, ha="right", fontsize=8)
            axis.set_ylabel(unit if column == 0 else "")
            axis.grid(alpha=0.3, axis="y")
        axes[0][column].set_title(what)
        axes[1][column].set_xlabel(WHAT[what])
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
