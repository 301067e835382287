"""Preprocessing speed and memory against Megatron-LM's own tool: same machine, cores, tokenizer and corpus, one run.

    python benchmarks/preprocess.py --megatron ../Megatron-LM --corpus novels.jsonl \\
        --tokenizer-type Llama2Tokenizer --tokenizer-model tokenizer.model

The corpus is enlarged to --megabytes by shuffling the paragraphs of its documents. Both tools run as a user runs them,
in turn; their `.bin` and `.idx` must be byte-identical. The last number is the ceiling: gigatoken's own encoding of the
same file, all cores, nothing written. Exit status 1: different bytes, or a ratio below --at-least.
"""

import argparse
import filecmp
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

_CEILING = """
import sys, time, gigatoken
kind, model, corpus = sys.argv[1:]
load = gigatoken.Tokenizer if kind == "HuggingFaceTokenizer" else gigatoken.Tokenizer.from_sentencepiece
tokenizer = load(model)
begun = time.perf_counter()
tokenizer.encode_files(gigatoken.JsonlFileSource([corpus]))
print(time.perf_counter() - begun)
"""


def main() -> None:
    """Measure, compare, print."""
    args = parse_args()
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        corpus = Path(folder, "corpus.jsonl")
        documents = enlarge(args.corpus, corpus, int(args.megabytes * 1e6))
        size = corpus.stat().st_size / 1e6
        print(f"corpus: {size:.1f} MB of JSON lines, {documents:,} documents; workers: {args.workers}", flush=True)
        flags = [
            "--tokenizer-type",
            args.tokenizer_type,
            "--tokenizer-model",
            str(Path(args.tokenizer_model).resolve()),
        ]
        flags += ["--input", str(corpus), "--append-eod", "--workers", str(args.workers)]
        tools = {
            "megatron-lm": Path(args.megatron).resolve() / "tools" / "preprocess_data.py",
            "megatron-meap": REPOSITORY / "tools" / "preprocess_data.py",
        }
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in tools}
        for _ in range(args.rounds):
            for name, tool in tools.items():
                extra = ["--overwrite"] if name == "megatron-meap" else []
                prefix = ["--output-prefix", str(Path(folder, name))]
                seconds, peak = measure([sys.executable, str(tool), *flags, *prefix, *extra])
                runs[name].append((seconds, peak))
                print(
                    f"{name:14} {seconds:7.2f} s whole process, {size / seconds:6.1f} MB/s, peak {peak:5.0f} MB",
                    flush=True,
                )
        same = all(
            filecmp.cmp(*(Path(folder, f"{name}_text_document{suffix}") for name in tools), shallow=False)
            for suffix in (".bin", ".idx")
        )
        ceiling = min(float(ceiling_seconds(args, corpus)) for _ in range(args.rounds))
    best = {name: min(seconds for seconds, _ in found) for name, found in runs.items()}
    ratios = [theirs[0] / ours[0] for theirs, ours in zip(*runs.values(), strict=True)]
    print(f".bin and .idx byte-identical: {'yes' if same else 'NO'}")
    print(f"ratio of whole-process times: {statistics.median(ratios):.2f} (median of {len(ratios)} rounds)")
    print(f"peak memory: {max(p for _, p in runs['megatron-meap']):.0f} MB, Megatron-LM's tool", end=" ")
    print(f"{max(p for _, p in runs['megatron-lm']):.0f} MB (sum of proportional set sizes)")
    print(f"gigatoken's own file encoding: {size / ceiling:.1f} MB/s; ours, whole process, is at", end=" ")
    print(f"{ceiling / best['megatron-meap']:.2f} of it")
    if not same or statistics.median(ratios) < args.at_least:
        sys.exit(1)


def parse_args() -> argparse.Namespace:
    """The benchmark's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron", required=True, help="checkout of Megatron-LM (core_v0.19 is the reference)")
    parser.add_argument("--corpus", required=True, help="JSON lines with a text field, to enlarge")
    parser.add_argument("--tokenizer-type", default="Llama2Tokenizer")
    parser.add_argument("--tokenizer-model", required=True)
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--at-least", type=float, default=4.0, help="ratio below which the exit status is 1")
    parser.add_argument(
        "--work-dir", help="where the corpus and the datasets go (default: the system's temporary folder)"
    )
    return parser.parse_args()


def enlarge(source: str, target: Path, size: int) -> int:
    """Write `size` bytes of documents made of the source's paragraphs in another order; returns their number."""
    with open(source, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    generator, written, documents = random.Random(0), 0, 0
    with open(target, "w", encoding="utf-8") as file:
        while written < size:
            paragraphs = generator.choice(texts).split("\n\n")
            generator.shuffle(paragraphs)
            kept = paragraphs[: generator.randint(1, len(paragraphs))]
            written += file.write(json.dumps({"text": "\n\n".join(kept)}) + "\n")
            documents += 1
    return documents


def measure(command: list[str]) -> tuple[float, float]:
    """(seconds, peak memory in MB) of a command and all its processes."""
    with tempfile.TemporaryFile() as log:
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, memory_of_tree(process.pid))
            time.sleep(0.1)
        seconds = time.perf_counter() - begun
        if process.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{log.read().decode()[-2000:]}")
    return seconds, peak


def memory_of_tree(pid: int) -> float:
    """Memory of a process and its descendants in MB, shared pages counted once."""
    total = 0.0
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            total += next(int(line.split()[1]) for line in file if line.startswith("Pss:")) / 1000
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                total += sum(memory_of_tree(int(child)) for child in file.read().split())
    except (OSError, StopIteration):
        pass  # it ended meanwhile
    return total


def ceiling_seconds(args: argparse.Namespace, corpus: Path) -> str:
    """Seconds that gigatoken takes to encode the file, its loading aside."""
    command = [sys.executable, "-c", _CEILING, args.tokenizer_type, args.tokenizer_model, str(corpus)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
