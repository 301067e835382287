"""GPU training speed: the paper's four sizes, MEAP against NTP, Transformer Engine against PyTorch's attention (SDPA).

    python benchmarks/gpu.py                                  # all sizes, on one GPU
    python benchmarks/gpu.py --sizes 1.1b --rounds 20
    python benchmarks/gpu.py --precision fp8 --sizes 1.1b     # Transformer Engine's fp8
    MEAP_DEVICE=cpu python benchmarks/gpu.py --sizes tiny --rounds 2     # exercises this code on a CPU

For each size: tokens/s, TFLOP/s (model FLOPs, as Megatron counts them) and MFU, that is TFLOP/s as a share of the
fastest bf16 matrix product measured here in the same run, not of a data sheet. Each implementation is a process of its
own, alone on the GPU, which trains both objectives in turn on one model. The turns are rounds of a few steps; a ratio
of objectives is the median over the rounds of the ratio within a round. A step has four micro batches, as large as the
recipe's. Targets for 1.1b in bf16 on an H200: at least 55% of the measured peak with Transformer Engine, at least 45%
with SDPA.

Not yet measured: no GPU was at hand when this was written.
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
VOCABULARY = 32000
RATIO = 0.15
OBJECTIVES = {"meap": RATIO, "ntp": 0.0}


def main() -> None:
    """Measure and print."""
    args = parse_arguments()
    fastest = in_a_process(matrix_peak)
    print(f"{device_name()}; fastest bf16 matrix product measured: {fastest / 1e12:,.1f} TFLOP/s", flush=True)
    for size in args.sizes:
        times: dict[str, list[float]] = {}
        for name in implementations(args):  # one after the other: the memory of a GPU is for one
            seconds, flops, tokens = take_turns(size, name, args)
            times |= seconds
        print_table(size, times, flops, tokens, fastest)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.1b", "0.3b", "0.5b", "1.1b"])
    parser.add_argument("--rounds", type=int, default=10, help="of each contender (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="in a round (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, metavar="N", help="sequences at a time (default: by size)")
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="bf16", help="(default: %(default)s)")
    parser.add_argument("--implementations", nargs="+", choices=("te", "sdpa"), help="(default: what is installed)")
    return parser.parse_args()


def on_cpu() -> bool:
    """Whether this run only exercises the code."""
    return os.environ.get("MEAP_DEVICE") == "cpu" or not torch.cuda.is_available()


def device_name() -> str:
    """Of what is measured."""
    return "CPU" if on_cpu() else torch.cuda.get_device_name()


def implementations(args: argparse.Namespace) -> list[str]:
    """Contenders: Transformer Engine where it is installed, SDPA everywhere but in fp8."""
    if args.implementations:
        return args.implementations
    te = not on_cpu() and importlib.util.find_spec("transformer_engine") is not None
    return (["te"] if te else []) + (["sdpa"] if args.precision == "bf16" else [])


def matrix_peak() -> float:
    """FLOP/s of the fastest bf16 product measured here."""
    return peak.matrix_peak(torch.bfloat16, on_cpu())


def synchronize() -> None:
    """Wait for the GPU."""
    if not on_cpu():
        torch.cuda.synchronize()


def in_a_process(function: Any) -> Any:
    """Call it in a process of its own, whose GPU memory is gone afterwards."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function).result()


def command_line(size: str, implementation: str, args: argparse.Namespace) -> list[str]:
    """Megatron's flags: those of examples/pretrain/paper.sh, on one GPU."""
    layers, hidden, heads, ffn, micro, length = SIZES[size]
    batch = args.micro_batch or micro
    flags = (
        f"--num-layers {layers} --hidden-size {hidden} --num-attention-heads {heads} --ffn-hidden-size {ffn} "
        f"--kv-channels 64 --group-query-attention --num-query-groups 2 --seq-length {length} "
        f"--max-position-embeddings {length} --position-embedding-type rope --normalization RMSNorm --swiglu "
        "--disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
        f"--tokenizer-type NullTokenizer --vocab-size {VOCABULARY} --make-vocab-size-divisible-by 64 "
        f"--micro-batch-size {batch} --global-batch-size {4 * batch} --train-iters 100000 --lr 4e-4 --clip-grad 1.0 "
        "--weight-decay 0.05 --adam-beta2 0.95 --eval-iters 0 --mock-data --num-workers 0 --bf16 "
        f"--meap-mask-ratio {RATIO} --transformer-impl {'transformer_engine' if implementation == 'te' else 'local'}"
    )
    fp8 = ["--fp8-format", "hybrid"] if args.precision == "fp8" else []
    return [*flags.split(), *fp8]


def contend(pipe: Connection, flags: list[str], steps: int) -> None:
    """Build the trainer; then do a round of steps of the objective asked for, and answer with the seconds of a step."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from trainer import Trainer

            trainer = Trainer(flags)
        from megatron.core.rerun_state_machine import RerunDataIterator
        from megatron.training.training import num_floating_point_operations

        args = trainer.args
        batches = {name: RerunDataIterator(random_batches(args, ratio)) for name, ratio in OBJECTIVES.items()}
        size = args.global_batch_size
        pipe.send((num_floating_point_operations(args, size), size * args.seq_length))
        while objective := pipe.recv():
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
    """Random tokens in the form of Megatron's data loader, a share of the inputs masked; made beforehand."""
    shape = args.micro_batch_size, args.seq_length
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(shape[1]).repeat(shape[0], 1)
    batches = []
    for _ in range(8):
        tokens = torch.randint(0, VOCABULARY, (shape[0], shape[1] + 1), generator=generator)
        inputs = tokens[:, :-1].clone()
        inputs[torch.rand(shape, generator=generator) < ratio] = args.meap_mask_token_id
        labels, loss_mask = tokens[:, 1:].contiguous(), torch.ones(shape)
        batches.append({"tokens": inputs, "labels": labels, "loss_mask": loss_mask, "position_ids": positions})
    return itertools.cycle(batches)


def take_turns(size: str, implementation: str, args: argparse.Namespace) -> tuple[dict[str, list[float]], float, int]:
    """Seconds of a step in every round, by implementation and objective; FLOPs and tokens of a step."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    flags = command_line(size, implementation, args)
    process = context.Process(target=contend, args=(theirs, flags, args.steps), daemon=True)
    process.start()
    try:
        flops, tokens = answer(implementation, pipe)
        times: dict[str, list[float]] = {f"{implementation} {objective}": [] for objective in OBJECTIVES}
        for turn in range(args.rounds + 1):
            for objective in list(OBJECTIVES)[:: 1 if turn % 2 else -1]:
                pipe.send(objective)
                times[f"{implementation} {objective}"].append(answer(implementation, pipe))
        return {name: each[1:] for name, each in times.items()}, flops, tokens  # the first round warms up
    finally:
        process.kill()
        process.join()  # its memory is the next one's


def answer(name: str, pipe: Connection) -> Any:
    """What a contender says; its failure ends the benchmark."""
    said = pipe.recv()
    if isinstance(said, str):
        sys.exit(f"{name} failed:\n{said}")
    return said


def print_table(size: str, times: dict[str, list[float]], flops: float, tokens: int, peak: float) -> None:
    """Figures of every contender, and the ratios."""
    print(f"\n{size}, {tokens:,} tokens a step\n{'':<12}{'ms a step':>11}{'tokens/s':>12}{'TFLOP/s':>10}{'MFU':>8}")
    for name, seconds in times.items():
        step = statistics.median(seconds)
        rate = flops / step
        print(f"{name:<12}{1000 * step:>11.1f}{tokens / step:>12,.0f}{rate / 1e12:>10.1f}{100 * rate / peak:>7.1f}%")
    for ours, other in (("te meap", "te ntp"), ("sdpa meap", "sdpa ntp"), ("te meap", "sdpa meap")):
        if ours in times and other in times:
            ratio = statistics.median(a / b for a, b in zip(times[ours], times[other], strict=True))
            print(f"time of {ours} / {other}: {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
