"""GPU training speed: the paper's four sizes, MEAP against NTP, Transformer Engine against PyTorch's attention (SDPA).

    python benchmarks/gpu.py                                             # all sizes, on one GPU
    python benchmarks/gpu.py --sizes 1.1b --rounds 20
    python benchmarks/gpu.py --sizes 1.1b --contenders te te-fp8 te-plain-loss
    MEAP_DEVICE=cpu python benchmarks/gpu.py --sizes tiny --rounds 2     # exercises this code on a CPU

For each size: tokens/s, TFLOP/s (model FLOPs, as counted by Megatron), MFU (TFLOP/s as a share of the fastest bf16
matrix product measured in the same run, not of a data sheet), and the peak of allocated memory. Each contender is a
separate process, which trains both objectives in turn on one model, alone on the GPU: the others wait with their
imports done. A turn is a round of a few steps; a ratio of objectives is the median over the rounds of the ratio
within a round. A step has four micro batches, each as large as the recipe's. Targets for 1.1b in bf16 on an H200: at
least 55% of the measured peak with Transformer Engine, at least 45% with SDPA.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch  # noqa: E402

from megatron_meap.backend import peak  # noqa: E402

#        layers hidden heads FFN, micro batch, sequence length: examples/pretrain/paper.sh
SIZES = {
    "0.1b": (12, 768, 12, 2048, 8, 4096),
    "0.3b": (24, 1024, 16, 2736, 8, 4096),
    "0.5b": (24, 1024, 16, 4864, 8, 4096),
    "1.1b": (24, 2048, 32, 5632, 4, 4096),
    "tiny": (2, 128, 2, 256, 2, 256),
}
#             in bf16; the loss is fused, as in the recipes, unless stated otherwise
CONTENDERS = {
    "te": "--transformer-impl transformer_engine --cross-entropy-loss-fusion",
    "te-fp8": "--transformer-impl transformer_engine --cross-entropy-loss-fusion --fp8-format hybrid",
    "te-plain-loss": "--transformer-impl transformer_engine",
    "sdpa": "--transformer-impl local --cross-entropy-loss-fusion",
    "sdpa-plain-loss": "--transformer-impl local",
}
VOCABULARY = 32000
RATIO = 0.15
OBJECTIVES = {"meap": RATIO, "ntp": 0.0}


def main() -> None:
    """Measure and print."""
    args = parse_arguments()
    contenders = args.contenders or ["te", "sdpa"][not has_transformer_engine() :]
    fastest = in_a_process(matrix_peak)
    print(f"{device_name()}; fastest bf16 matrix product measured: {fastest / 1e12:,.1f} TFLOP/s", flush=True)
    failed = False
    waiting = {
        (size, name): Contender(name, command_line(size, name, args.micro_batch))
        for size in args.sizes
        for name in contenders
    }
    for size in args.sizes:
        found = {name: waiting[size, name].measure(args.rounds, args.steps) for name in contenders}
        print_table(size, {name: each for name, each in found.items() if each is not None}, fastest)
        failed = failed or None in found.values()
    sys.exit(failed)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.1b", "0.3b", "0.5b", "1.1b"])
    parser.add_argument("--rounds", type=int, default=10, help="of each contender (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="in a round (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, metavar="N", help="sequences at a time (default: by size)")
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, help="(default: te, where it is installed, and sdpa)"
    )
    return parser.parse_args()


def on_cpu() -> bool:
    """Whether this run only exercises the code, on a CPU."""
    return os.environ.get("MEAP_DEVICE") == "cpu" or not torch.cuda.is_available()


def device_name() -> str:
    """The name of the device measured."""
    return "CPU" if on_cpu() else torch.cuda.get_device_name()


def has_transformer_engine() -> bool:
    """Whether it is installed, and there is a GPU for it."""
    return not on_cpu() and importlib.util.find_spec("transformer_engine") is not None


def matrix_peak() -> float:
    """FLOP/s of the fastest bf16 product measured here."""
    return peak.matrix_peak(torch.bfloat16, on_cpu())


def synchronize() -> None:
    """Wait for the GPU."""
    if not on_cpu():
        torch.cuda.synchronize()


def in_a_process(function: Any) -> Any:
    """Call it in a separate process, so that its GPU memory is released afterwards."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function).result()


def command_line(size: str, contender: str, micro_batch: int | None) -> list[str]:
    """Megatron's flags: those of examples/pretrain/paper.sh, on one GPU."""
    layers, hidden, heads, ffn, micro, length = SIZES[size]
    batch = micro_batch or micro
    flags = (
        f"--num-layers {layers} --hidden-size {hidden} --num-attention-heads {heads} --ffn-hidden-size {ffn} "
        f"--kv-channels 64 --group-query-attention --num-query-groups 2 --seq-length {length} "
        f"--max-position-embeddings {length} --position-embedding-type rope --normalization RMSNorm --swiglu "
        "--disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
        f"--tokenizer-type NullTokenizer --vocab-size {VOCABULARY} --make-vocab-size-divisible-by 64 "
        f"--micro-batch-size {batch} --global-batch-size {4 * batch} --train-iters 100000 --lr 4e-4 --clip-grad 1.0 "
        "--weight-decay 0.05 --adam-beta2 0.95 --eval-iters 0 --mock-data --num-workers 0 --bf16 "
        f"--meap-mask-ratio {RATIO} {CONTENDERS[contender]}"
    )
    return flags.split()


@dataclass
class Measured:
    """Results of a contender."""

    seconds: dict[str, list[float]]
    """Seconds of a step in every round, by objective."""
    flops: float
    """Of a step."""
    tokens: int
    """Of a step."""
    memory: int
    """Peak of allocated bytes."""


class ContenderError(Exception):
    """A contender failed; its traceback."""


class Contender:
    """A process with a trainer in it."""

    def __init__(self, name: str, flags: list[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=contend, args=(theirs, flags), daemon=True)
        self.process.start()
        theirs.close()  # so that its end is noticed

    def measure(self, rounds: int, steps: int) -> Measured | None:
        """Have it build its model, train both objectives in turn, and exit; None, with a message, if it fails."""
        try:
            flops, tokens = self.ask("build", 0)
            seconds: dict[str, list[float]] = {objective: [] for objective in OBJECTIVES}
            for turn in range(rounds + 1):
                for objective in list(OBJECTIVES)[:: 1 if turn % 2 else -1]:
                    seconds[objective].append(self.ask(objective, steps))
            seconds = {name: each[1:] for name, each in seconds.items()}  # the first round warms up
            return Measured(seconds, flops, tokens, self.ask("memory", 0))
        except ContenderError as error:
            print(f"{self.name} failed:\n{error}", flush=True)
            return None
        finally:
            self.process.kill()
            self.process.join()  # its memory is the next one's

    def ask(self, *question: Any) -> Any:
        """Its answer."""
        try:
            self.pipe.send(question)
            said = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise ContenderError(f"its process ended with status {self.process.exitcode}") from None
        if isinstance(said, str):
            raise ContenderError(said)
        return said


def contend(pipe: Connection, flags: list[str]) -> None:
    """Import Megatron and build the trainer on request; then train steps of the objective asked for, and time them."""
    try:
        from trainer import Trainer, import_megatron

        import_megatron()
        pipe.recv()
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = Trainer(flags)
        from megatron.core.rerun_state_machine import RerunDataIterator
        from megatron.training.training import num_floating_point_operations

        args = trainer.args
        batches = {name: RerunDataIterator(random_batches(args, ratio)) for name, ratio in OBJECTIVES.items()}
        size = args.global_batch_size
        pipe.send((num_floating_point_operations(args, size), size * args.seq_length))
        while True:
            objective, steps = pipe.recv()
            if objective == "memory":
                pipe.send(0 if on_cpu() else torch.cuda.max_memory_allocated())
                continue
            args.meap_mask_ratio = OBJECTIVES[objective]
            trainer.step(batches[objective])  # takes its memory back
            synchronize()
            start = time.perf_counter()
            for _ in range(steps):
                trainer.step(batches[objective])
            synchronize()
            pipe.send((time.perf_counter() - start) / steps)
    except Exception:
        pipe.send(traceback.format_exc())


def random_batches(args: argparse.Namespace, ratio: float) -> Iterator[dict[str, torch.Tensor]]:
    """Random tokens in the form of Megatron's data loader, a share of the inputs masked; pinned, created beforehand."""
    shape = args.micro_batch_size, args.seq_length
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(shape[1]).repeat(shape[0], 1)
    batches = []
    for _ in range(8):
        tokens = torch.randint(0, VOCABULARY, (shape[0], shape[1] + 1), generator=generator)
        inputs = tokens[:, :-1].clone()
        inputs[torch.rand(shape, generator=generator) < ratio] = args.meap_mask_token_id
        labels, loss_mask = tokens[:, 1:].contiguous(), torch.ones(shape)
        batch = {"tokens": inputs, "labels": labels, "loss_mask": loss_mask, "position_ids": positions}
        batches.append(batch if on_cpu() else {name: each.pin_memory() for name, each in batch.items()})
    return itertools.cycle(batches)


def print_table(size: str, found: dict[str, Measured], peak: float) -> None:
    """Figures of every contender, and the ratios."""
    if not found:
        return
    tokens = next(iter(found.values())).tokens
    print(f"\n{size}, {tokens:,} tokens a step")
    print(f"{'':<22}{'ms a step':>10}{'tokens/s':>12}{'TFLOP/s':>10}{'MFU':>8}{'GiB':>8}")
    for name, each in found.items():
        for objective, seconds in each.seconds.items():
            step = statistics.median(seconds)
            rate = each.flops / step
            print(
                f"{f'{name} {objective}':<22}{1000 * step:>10.1f}{tokens / step:>12,.0f}{rate / 1e12:>10.1f}"
                f"{100 * rate / peak:>7.1f}%{each.memory / 2**30:>8.1f}"
            )
    for name, each in found.items():
        ratio = statistics.median(a / b for a, b in zip(*(each.seconds[it] for it in ("meap", "ntp")), strict=True))
        print(f"time of {name} meap / {name} ntp: {ratio:.3f}")
    first, *others = found
    for other in others:
        ratio = statistics.median(found[first].seconds["meap"]) / statistics.median(found[other].seconds["meap"])
        print(f"time of {first} meap / {other} meap: {ratio:.3f}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
