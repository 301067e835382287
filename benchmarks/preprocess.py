"""Preprocessing speed and memory against Megatron-LM's own tools: same machine, cores, tokenizer and corpus, one run.

    python benchmarks/preprocess.py --megatron ../Megatron-LM --corpus novels.jsonl \\
        --tokenizer-type Llama2Tokenizer --tokenizer-model tokenizer.model

With --train-vocab N instead of the tokenizer's flags, a tokenizer of Llama 3's type is trained on the corpus
(byte-level BPE with Llama 3's regular expression; N tokens, or as many as the corpus allows). --megatron-main names a
checkout of Megatron-LM's main branch, to run its tools/preprocess_data_fast.py too (Hugging Face tokenizers only).

The corpus is enlarged to --megabytes by shuffling the paragraphs of its documents. The tools run as a user would run
them, alternating; their `.bin` and `.idx` must be byte-identical. If the machine has other work, processor time is more
reliable. The last number is the ceiling: gigatoken's own encoding of the same file on all cores, with nothing written.
Exit status 1: the bytes differ, or a ratio is below --at-least.
"""

import argparse
import filecmp
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from results import record  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent
OURS = "megatron-meap"

_CEILING = """
import sys, time, gigatoken
kind, model, corpus = sys.argv[1:]
load = gigatoken.Tokenizer if kind == "HuggingFaceTokenizer" else gigatoken.Tokenizer.from_sentencepiece
tokenizer = load(model)
begun, used = time.perf_counter(), time.process_time()
tokenizer.encode_files(gigatoken.JsonlFileSource([corpus]))
print(time.perf_counter() - begun, time.process_time() - used)
"""
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass
class Tool:
    """A program that creates a dataset, and what its runs took."""

    script: Path
    flags: list[str]
    checkout: Path | None = None
    """The checkout of Megatron it needs, if not the installed one."""

    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)

    def run(self, prefix: Path) -> None:
        """Run it once, and measure it with all its processes."""
        command = [sys.executable, str(self.script), *self.flags, "--output-prefix", str(prefix)]
        environment = {**os.environ, **({"PYTHONPATH": str(self.checkout)} if self.checkout else {})}
        with tempfile.TemporaryFile() as log:
            before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            peak = 0.0
            while process.poll() is None:
                peak = max(peak, memory_of_tree(process.pid))
                time.sleep(0.1)
            self.seconds.append(time.perf_counter() - begun)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            if process.returncode:
                log.seek(0)
                sys.exit(f"{' '.join(command)} failed:\n{log.read().decode()[-2000:]}")
        self.processor_seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        self.peak_mb.append(peak)


def main() -> None:
    """Measure, compare, print."""
    args = parse_args()
    with tempfile.TemporaryDirectory(dir=args.work_dir) as work:
        folder = Path(work)
        if args.train_vocab:
            args.tokenizer_type, args.tokenizer_model = "HuggingFaceTokenizer", folder / "tokenizer"
            tokens = train_llama3(args.corpus, args.tokenizer_model, args.train_vocab)
            print(f"tokenizer: {tokens:,} tokens", flush=True)
        corpus = folder / "corpus.jsonl"
        documents = enlarge(args.corpus, corpus, int(args.megabytes * 1e6))
        size = corpus.stat().st_size / 1e6
        print(f"corpus: {size:.1f} MB of JSON lines, {documents:,} documents; workers: {args.workers}", flush=True)
        tools = tools_of(args, corpus)
        for _ in range(args.rounds):
            for name, tool in tools.items():
                tool.run(folder / name)
                print(
                    f"{name:22} {tool.seconds[-1]:7.2f} s whole process, {size / tool.seconds[-1]:6.1f} MB/s, "
                    f"{tool.processor_seconds[-1]:7.2f} s of processor, peak {tool.peak_mb[-1]:5.0f} MB",
                    flush=True,
                )
        ceilings = [gigatokens_seconds(args, corpus) for _ in range(args.rounds)]
        different = [name for name in tools if not same(folder / OURS, folder / name)]
    ours = tools[OURS]
    print(f"medians of {args.rounds} rounds; memory is the sum of proportional set sizes")
    print(f".bin and .idx byte-identical: {'NO: ' + ', '.join(different) if different else 'yes'}")
    for name, tool in tools.items():
        print(f"{name}: peak {max(tool.peak_mb):.0f} MB", end="")
        if name != OURS:
            pairs = zip(tool.processor_seconds, ours.processor_seconds, strict=True)
            record(f"preprocessing, {size:.0f} MB: processor time of {name} / ours", [a / b for a, b in pairs], "x")
            print(f"; to ours: {ratio(tool.seconds, ours.seconds):.2f} times the time,", end=" ")
            print(f"{ratio(tool.processor_seconds, ours.processor_seconds):.2f} times the processor time", end="")
        print()
    time_taken, processor_time = (min(each) for each in zip(*ceilings, strict=True))
    print(f"gigatoken's own file encoding: {size / time_taken:.1f} MB/s; ours, whole process, is at", end=" ")
    print(f"{time_taken / min(ours.seconds):.2f} of it, by processor time", end=" ")
    print(f"{processor_time / min(ours.processor_seconds):.2f}")
    if different or (args.megatron and ratio(tools["megatron-lm"].seconds, ours.seconds) < args.at_least):
        sys.exit(1)


def tools_of(args: argparse.Namespace, corpus: Path) -> dict[str, Tool]:
    """What is compared, by name."""
    flags = ["--tokenizer-type", args.tokenizer_type, "--tokenizer-model", str(Path(args.tokenizer_model).resolve())]
    flags += ["--input", str(corpus), "--append-eod"]
    workers = ["--workers", str(args.workers)]
    found: dict[str, Tool] = {}
    if args.megatron:
        found["megatron-lm"] = Tool(Path(args.megatron, "tools/preprocess_data.py").resolve(), [*flags, *workers])
    if args.megatron_main:
        main_branch = Path(args.megatron_main).resolve()
        fast = [*flags, "--use-gigatoken"]
        found["megatron-lm main, fast"] = Tool(main_branch / "tools/preprocess_data_fast.py", fast, main_branch)
    found[OURS] = Tool(REPOSITORY / "tools/preprocess_data.py", [*flags, *workers, "--overwrite"])
    return found


def ratio(theirs: list[float], ours: list[float]) -> float:
    """The median of the ratios of all rounds."""
    return statistics.median(one / other for one, other in zip(theirs, ours, strict=True))


def same(one: Path, other: Path) -> bool:
    """Whether two datasets are the same bytes."""
    ends = ("_text_document.bin", "_text_document.idx")
    return all(filecmp.cmp(f"{one}{end}", f"{other}{end}", shallow=False) for end in ends)


def parse_args() -> argparse.Namespace:
    """The benchmark's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron", help="checkout of Megatron-LM (core_v0.19 is the reference)")
    parser.add_argument("--megatron-main", help="checkout of its main branch, for its preprocess_data_fast.py")
    parser.add_argument("--corpus", required=True, help="JSON lines with a text field, to enlarge")
    parser.add_argument("--tokenizer-type", default="Llama2Tokenizer")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer-model")
    tokenizer.add_argument("--train-vocab", type=int, help="train a tokenizer of Llama 3's type of at most that size")
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--at-least", type=float, default=4.0, help="ratio below which the exit status is 1")
    parser.add_argument(
        "--work-dir", help="where the corpus and the datasets go (default: the system's temporary folder)"
    )
    return parser.parse_args()


def train_llama3(corpus: str, folder: Path, size: int) -> int:
    """Train a tokenizer of Llama 3's type into a folder; returns its number of tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(_LLAMA3), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    with open(corpus, encoding="utf-8") as file:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in file), trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": special[0], "eos_token": special[1], "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return tokenizer.get_vocab_size()


def enlarge(source: str, target: Path, size: int) -> int:
    """Write `size` bytes of documents from the source's paragraphs in another order; returns how many documents."""
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
        pass  # it has ended in the meantime
    return total


def gigatokens_seconds(args: argparse.Namespace, corpus: Path) -> tuple[float, float]:
    """Seconds and processor seconds that gigatoken takes to encode the file, without loading."""
    command = [sys.executable, "-c", _CEILING, args.tokenizer_type, str(args.tokenizer_model), str(corpus)]
    taken, used = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(taken), float(used)


if __name__ == "__main__":
    main()
