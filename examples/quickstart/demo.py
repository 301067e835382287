"""The quickstart: from text to a small MEAP-pretrained model on this machine, with the tools of a real run.

    make demo        (or: python examples/quickstart/demo.py)

Corpus, tokenizer, preprocessing, training, a validation perplexity, generated samples and a picture, all in
`runs/demo`. Every step is a command that is printed first. Ctrl-C stops it; the next `make demo` resumes.
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_meap.checkpoint import latest
from megatron_meap.errors import UsageError, run
from megatron_meap.flags import Parser
from megatron_meap.inspection.curves import plot
from megatron_meap.inspection.training_log import History, Reader, follow, read_log
from megatron_meap.preprocessing.statistics import unigram_entropy

ROOT = Path(__file__).resolve().parent.parent.parent
VOCABULARY = 4096


def main() -> None:
    """Do what is not done yet, then print a summary."""
    parser = Parser(__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of the run (default: %(default)s)")
    parser.add_argument("--train-iters", type=int, default=320, help="optimizer steps (default: %(default)s)")
    parser.add_argument(
        "--corpus-mb", type=float, default=12, help="text to gather, in 10^6 bytes (default: %(default)s)"
    )
    args = parser.parse_args()
    os.chdir(ROOT)
    started = time.monotonic()
    prepare_data(args.run, args.corpus_mb)
    train(args.run, args.train_iters)
    generate(args.run)
    summarise(args.run, args.train_iters, time.monotonic() - started)


def prepare_data(folder: Path, megabytes: float) -> None:
    """Corpus, tokenizer and datasets."""
    train_text, valid_text = folder / "train.jsonl", folder / "valid.jsonl"
    if not (train_text.exists() and valid_text.exists()):
        title("corpus: real text from this machine's own Python")
        tool("build_corpus", "--train", train_text, "--valid", valid_text, "--max-mb", megabytes, "--overwrite")
    tokenizer = folder / "tokenizer.model"
    if not tokenizer.exists():
        title(f"tokenizer: {VOCABULARY} pieces, [MASK] among them as a control symbol")
        tool("train_tokenizer", "--input", train_text, "--output", tokenizer, "--vocab-size", VOCABULARY, "--max-mb", 4)
    for split, text in (("train", train_text), ("valid", valid_text)):
        if not (folder / f"{split}_text_document.idx").exists():
            title(f"preprocessing: {split}")
            tool(
                "preprocess_data", "--input", text, "--output-prefix", folder / split, "--append-eod",
                "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer,
            )  # fmt: skip


def train(folder: Path, iterations: int) -> None:
    """Train under torchrun, unless that is done; Megatron's log goes to a file, the progress to the terminal."""
    checkpoints, log = folder / "checkpoints", folder / "train.log"
    reached = latest.pointer(checkpoints)
    if reached is not None and int(reached) >= iterations:
        return
    title(f"training: {iterations} steps with 15% of the inputs masked; the full log goes to {log}")
    environment = {**os.environ, "RUN": str(folder), "TRAIN_ITERS": str(iterations)}
    command = ["bash", "examples/quickstart/train.sh"]
    print(f"$ {' '.join(command)}", flush=True)
    history = read_log(log) if log.exists() and reached is not None else History()
    with open(log, "a") as output:
        start = output.tell()
        training = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        interrupted = show_progress(training, log, start, history)
    if interrupted:
        sys.exit(f"stopped; `make demo` resumes at step {latest.pointer(checkpoints) or 0}")
    if training.returncode != 0:
        raise UsageError(f"training ended with status {training.returncode}; the reason is at the end of {log}")


def show_progress(training: subprocess.Popen, log: Path, start: int, history: History) -> bool:
    """Show the progress until the training has ended; True if Ctrl-C ended it."""
    interrupts = []
    previous = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))  # the terminal sends it to torchrun too

    def ended() -> Iterator[bool]:
        while True:
            yield training.poll() is not None

    terminal, shown = sys.stdout.isatty(), 0.0
    try:
        for line in follow({"": Reader(log, history, start)}, ended()):
            if terminal:
                print(f"\r\033[K{line}", end="", flush=True)
            elif time.monotonic() - shown > 10:
                print(line, flush=True)
                shown = time.monotonic()
    finally:
        signal.signal(signal.SIGINT, previous)
    print(flush=True)
    return bool(interrupts)


def generate(folder: Path) -> None:
    """Two short continuations of words that begin many docstrings of the corpus."""
    title("two samples")
    tool(
        "generate", "--load", folder / "checkpoints", "--prompt", "Returns the", "--max-new-tokens", 60,
        "--temperature", 0.3, "--top-k", 20, "--num-samples", 2, "--seed", 1,
    )  # fmt: skip


def summarise(folder: Path, iterations: int, seconds: float) -> None:
    """Print what was made, where it is, how good it is and how to continue."""
    history = read_log(folder / "train.log")
    unigram = unigram_entropy(str(folder / "train_text_document"))
    picture = folder / "losses.png"
    plot(history, picture, unigram)
    loss = history.validation[max(history.validation)]
    title("summary")
    print(f"""\
time               {seconds / 60:.1f} minutes
validation         loss {loss:.3f} nats per token, perplexity {math.exp(loss):.1f}
                   (a model that ignores the context: {unigram:.3f} nats, perplexity {math.exp(unigram):.0f})
loss curves        {picture}
checkpoints        {folder / "checkpoints"}
tokenizer          {folder / "tokenizer.model"}
dataset            {folder / "train_text_document"}.bin and .idx
log                {folder / "train.log"}

continue training  RUN={folder} TRAIN_ITERS={2 * iterations} bash examples/quickstart/train.sh
generate           .venv/bin/python tools/generate.py --load {folder / "checkpoints"} --prompt 'import '""")


def title(text: str) -> None:
    """Announce a step."""
    print(f"\n== {text}", flush=True)


def tool(name: str, *arguments: object) -> None:
    """Show the command of one of the tools, run it, and stop where it fails."""
    command = [f"tools/{name}.py", *map(str, arguments)]
    print(f"$ python {' '.join(command)}", flush=True)
    if status := subprocess.run([sys.executable, *command]).returncode:
        raise UsageError(f"tools/{name}.py ended with status {status}; its output is above")


if __name__ == "__main__":
    run(main)
