"""Fine-tune a tiny model to answer from documents, with and without masks, and show where it finds the answers.

    python examples/sft/demo.py

On a CPU, in minutes, with nothing downloaded: a tokenizer and a model are trained on descriptions of invented people,
and the model is then fine-tuned on questions twice: with next-token prediction on as many rows as MEAP has (`ntp`), and
with MEAP (`meap`). tools/evaluate.py asks both models questions over four documents, and draws their accuracy by the
place of the answer. Everything is written to `runs/sft`; steps that are done are not repeated.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from facts import DOCUMENTS, write_conversations, write_questions, write_texts

from megatron_meap.checkpoint import latest
from megatron_meap.errors import UsageError, run
from megatron_meap.flags import Parser

ROOT = Path(__file__).resolve().parent.parent.parent
VARIANTS = {
    "ntp": ["--meap-mask-ratio", "0", "--meap-sft-ntp-budget", "equal"],
    "meap": ["--meap-mask-ratio", "0.10"],
}
MODEL = shlex.split("""
    --num-layers 2 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4 --init-method-std 0.08
    --seq-length 512 --max-position-embeddings 512 --position-embedding-type rope --normalization RMSNorm --swiglu
    --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --make-vocab-size-divisible-by 64
""")
TRAINING = shlex.split("""
    --micro-batch-size 8 --global-batch-size 8 --lr-decay-style cosine --weight-decay 0 --clip-grad 1.0
    --adam-beta2 0.95 --eval-iters 0 --log-interval 20 --num-workers 1
""")


def main() -> None:
    """Do what is not done yet, then evaluate."""
    parser = Parser(__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/sft"), help="folder of the run (default: %(default)s)")
    parser.add_argument("--pretrain-iters", type=int, default=1500, help="steps of pretraining (default: %(default)s)")
    parser.add_argument("--train-iters", type=int, default=600, help="steps of fine-tuning (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=60, help="for each place of the answer (default: %(default)s)")
    args = parser.parse_args()
    os.chdir(ROOT)
    started = time.monotonic()
    tokenizer = prepare_data(args.run, args.questions)
    pretrained = pretrain(args.run, tokenizer, args.pretrain_iters)
    models = [f"{name}={finetune(args.run, tokenizer, pretrained, name, args.train_iters)}" for name in VARIANTS]
    evaluate(args.run, models, args.questions)
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")


def prepare_data(folder: Path, questions: int) -> list[str]:
    """Texts, conversations, questions, tokenizer and dataset; the tokenizer's flags."""
    folder.mkdir(parents=True, exist_ok=True)
    texts, asked, model = folder / "texts.jsonl", folder / "train.jsonl", folder / "tokenizer.model"
    flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
    write_questions(folder / "questions.jsonl", seed=3, count=questions)
    if not (folder / "texts_text_document.idx").exists():
        write_texts(texts, seed=1, count=30000)
        write_conversations(asked, seed=2, count=20000)
        sizes = ["--vocab-size", 1792, "--max-mb", 2]
        call("tools/train_tokenizer.py", "--input", asked, texts, "--output", model, *sizes)
        call("tools/preprocess_data.py", "--input", texts, "--output-prefix", folder / "texts", "--append-eod", *flags)
    return flags


def pretrain(folder: Path, tokenizer: list[str], iterations: int) -> Path:
    """Train the model that both variants start from."""
    data = ["--data-path", f"{folder}/texts_text_document", "--split", "100,0,0", "--meap-mask-ratio", "0"]
    rates = ["--lr", "4e-3", "--min-lr", "4e-4", "--lr-warmup-iters", "50"]
    short = shlex.split("--seq-length 256 --micro-batch-size 16 --global-batch-size 16")  # copying is learned sooner
    return train(folder / "pretrained", [*tokenizer, *data, *rates, *short], iterations)


def finetune(folder: Path, tokenizer: list[str], pretrained: Path, name: str, iterations: int) -> Path:
    """Fine-tune one variant; answers of more than 5 tokens get masked copies, because answers are short here."""
    sft = ["--meap-sft", "--meap-sft-template", "vicuna", "--meap-sft-threshold", "5", *VARIANTS[name]]
    data = ["--train-data-path", f"{folder}/train.jsonl", "--pretrained-checkpoint", str(pretrained)]
    rates = ["--lr", "2e-3", "--min-lr", "2e-5", "--lr-warmup-iters", "20"]
    return train(folder / name, [*tokenizer, *sft, *data, *rates], iterations)


def train(checkpoints: Path, flags: list[str], iterations: int) -> Path:
    """Train to a checkpoint, unless it exists; the log goes to a file beside it."""
    if latest.pointer(checkpoints) == str(iterations):
        return checkpoints
    save = ["--save", checkpoints, "--load", checkpoints, "--save-interval", iterations, "--train-iters", iterations]
    log = checkpoints.with_suffix(".log")
    with open(log, "w") as output:
        call("pretrain_gpt_meap.py", *MODEL, *TRAINING, *flags, *save, output=output, log=f"; its log: {log}")
    return checkpoints


def evaluate(folder: Path, models: list[str], questions: int) -> None:
    """Evaluate both models on the same questions, with the answer in each of the documents, in their own template."""
    tasks = [f"meap_multidoc{kind}{form}" for form in ("", "_logprob") for kind in ("", "_closedbook", "_oracle")]
    asked = ["--qa-file", folder / "questions.jsonl", "--qa-documents", DOCUMENTS, "--samples", questions]
    output = ["--output", folder / "results", "--overwrite", "--cache", folder / "exported", "--batch-size", 32]
    call("tools/evaluate.py", *models, "--tasks", ",".join(tasks), "--chat-template", *asked, *output)


def call(script: str, *arguments: object, output=None, log: str = "") -> None:
    """Show a command of this project, run it, and stop where it fails."""
    command = [script, *map(str, arguments)]
    print(f"$ python {' '.join(command)}", flush=True)
    environment = {**os.environ, "MEAP_DEVICE": os.environ.get("MEAP_DEVICE", "cpu")}
    if status := subprocess.run(
        [sys.executable, *command], stdout=output, stderr=output and subprocess.STDOUT, env=environment
    ).returncode:
        raise UsageError(f"{script} ended with status {status}{log}")


if __name__ == "__main__":
    run(main)
