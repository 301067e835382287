"""CPU training speed: this project, Hugging Face's Llama and Megatron's own local path, side by side in one run.

    python benchmarks/cpu_training.py                                 # 8 x 512 and 2 x 2048 in bf16, on all cores
    python benchmarks/cpu_training.py --fp32 --shapes 8x512
    python benchmarks/cpu_training.py --threads 1 --cpu-time          # on a busy machine: see below

Every contender trains the same 15.6M-parameter Llama shape on the same tokens: forward, backward, clipping to norm 1,
AdamW. Each is a separate process; they alternate step by step (A B C A B C ...), so that noise affects all equally. A
ratio is the median over the rounds of "its time / our time in that round".

- ours: `pretrain_gpt_meap.py` by default: Megatron's `train_step`, schedule and optimizer (fp32 master weights and
  gradients), with the layers and patches of `megatron_meap.backend`. Next-token prediction, like the others.
- hugging face: `LlamaForCausalLM` with SDPA and PyTorch's fused AdamW. In bf16 its weights are bf16 without an fp32
  master copy, which is its fastest setting, though not one to train with: it does less work than Megatron.
- hf autocast (with `--autocast`): fp32 weights under bf16 autocast, the setting with master weights like Megatron's.
- plain: a Llama in plain PyTorch (`plain.py`) with bf16 weights and fused AdamW, like hugging face.
- with `--compile`, `hf compiled` and `plain compiled`: the same two under `torch.compile`, the fastest alternative (it
  needs a C++ compiler, and minutes before the first step).
- stock: Megatron's own local layers (`transformer_layer_spec` None), as the CPU adaptation alone runs them.

Share of peak: matrix FLOPs of the model (causal attention counted once) over the fastest matrix product measured here.
`--cpu-time` counts processor time instead of wall time: with one thread, it is the time on an otherwise idle machine.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch  # noqa: E402
from plain import Plain  # noqa: E402
from results import record, turns  # noqa: E402
from trainer import SHAPE, Trainer, flags, random_batches  # noqa: E402

from megatron_meap.backend.peak import matrix_peak  # noqa: E402


def main() -> None:
    """Measure every shape and print a table for each."""
    args = parse_arguments()
    contenders = ["ours", "hugging face", *(["hf autocast"] if args.autocast and not args.fp32 else []), "plain"]
    contenders += [*(["hf compiled", "plain compiled"] if args.compile else []), "stock"]
    torch.set_num_threads(args.threads)
    peaks = {dtype: 1e-9 * matrix_peak(dtype, cpu=True) for dtype in (torch.float32, torch.bfloat16)}
    print(
        f"{args.threads} threads; fastest matrix product: {peaks[torch.float32]:.0f} GFLOP/s in fp32, "
        f"{peaks[torch.bfloat16]:.0f} in bf16; times are {'processor' if args.cpu_time else 'wall'} time"
    )
    for shape in args.shapes:
        batch, length = (int(number) for number in shape.split("x"))
        times = take_turns(contenders, batch, length, args)
        print_table(batch, length, times, max(peaks.values()), "fp32" if args.fp32 else "bf16")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8x512", "2x2048"], metavar="BATCHxLENGTH")
    parser.add_argument("--fp32", action="store_true", help="32-bit floats in place of bf16")
    parser.add_argument("--autocast", action="store_true", help="also Hugging Face under autocast")
    parser.add_argument("--compile", action="store_true", help="also the peers under torch.compile")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each contender (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(default: all cores)")
    parser.add_argument("--cpu-time", action="store_true", help="count processor time, not wall time")
    return parser.parse_args()


def take_turns(names: list[str], batch: int, length: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each step of each contender, taking turns step by step, after two steps each to warm up."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name in names:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=contender, args=(name, batch, length, args, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        try:
            pipes[name].recv()  # built, before the next one starts to build
        except EOFError:
            sys.exit(f"{name}: could not be built (above)")
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in turns(args.rounds, warm_up=2):
        for name, pipe in pipes.items():
            pipe.send("step")
            times[name].append(pipe.recv())
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send("stop")
        process.join()
    return {name: each[2:] for name, each in times.items()}


def contender(name: str, batch: int, length: int, args: argparse.Namespace, pipe: Connection) -> None:
    """A process that trains one step on request, and returns the seconds it took."""
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115
    out = os.dup(2)
    os.dup2(log.fileno(), 1)  # Megatron prints a lot, which matters only if it fails
    os.dup2(log.fileno(), 2)
    os.environ["MEAP_CPU_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    try:
        build = megatron_step if name in ("ours", "stock") else pytorch_step
        step = build(name, batch, length, args)
        pipe.send("built")
        while pipe.recv() == "step":
            time.sleep(0.02)  # until the previous contender's threads have stopped spinning
            start = clock()
            step()
            pipe.send(clock() - start)
    except EOFError:  # another contender failed
        os._exit(1)
    except Exception:
        traceback.print_exc()
        log.seek(0)
        os.write(out, log.read()[-3000:].encode())
        os._exit(1)  # despite any threads that are left


def megatron_step(name: str, batch: int, length: int, args: argparse.Namespace) -> Callable[[], Any]:
    """Megatron's training step, with this project's layers or with Megatron's."""
    from megatron.core.rerun_state_machine import RerunDataIterator

    precision = "--fp32" if args.fp32 else "--bf16"
    trainer = Trainer(flags(batch, length, "--meap-mask-ratio", "0", precision), stock=name == "stock")
    batches = RerunDataIterator(random_batches(batch, length))
    return lambda: trainer.step(batches)


def pytorch_step(name: str, batch: int, length: int, args: argparse.Namespace) -> Callable[[], Any]:
    """A plain PyTorch training step of `LlamaForCausalLM`, or of the model in `plain.py`."""
    autocast = name == "hf autocast"
    model = Plain(length) if name.startswith("plain") else hugging_face(length)
    model = model.to(torch.float32 if args.fp32 or autocast else torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    batches = random_batches(batch, length)
    if name.endswith("compiled"):
        model.compile(dynamic=False)

    def step() -> float:
        data = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if isinstance(model, Plain):
                loss = model(data["tokens"], data["labels"])
            else:
                loss = model(input_ids=data["tokens"], labels=data["labels"], shift_labels=data["labels"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def hugging_face(length: int) -> torch.nn.Module:
    """`LlamaForCausalLM` of our shape, with PyTorch's attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SHAPE["vocabulary"],
        hidden_size=SHAPE["hidden"],
        intermediate_size=SHAPE["ffn"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["groups"],
        max_position_embeddings=length,
        tie_word_embeddings=False,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def print_table(batch: int, length: int, times: dict[str, list[float]], peak: float, precision: str) -> None:
    """One line per contender: milliseconds and tokens per second (medians), share of the peak, and ratio to ours."""
    print(f"\n{batch} x {length} tokens, {precision}, {len(times['ours'])} rounds")
    print(f"{'':14}{'ms/step':>9}{'tokens/s':>10}{'of peak':>9}{'ours is':>10}")
    for name, each in times.items():
        seconds = statistics.median(each)
        ratios = [theirs / own for theirs, own in zip(each, times["ours"], strict=True)]
        ratio = statistics.median(ratios)
        if name != "ours":
            record(f"training step, {batch} x {length}, {precision}: time of {name} / ours", ratios, "x")
        share = 1e-9 * flops(batch, length) / seconds / peak
        print(f"{name:14}{1000 * seconds:9.0f}{batch * length / seconds:10.0f}{share:9.0%}{ratio:9.2f}x")


def flops(batch: int, length: int) -> int:
    """Floating-point operations of the matrix products of a training step, forward and backward."""
    head = SHAPE["hidden"] // SHAPE["heads"]
    attention = SHAPE["hidden"] * head * (2 * SHAPE["heads"] + 2 * SHAPE["groups"])
    weights = SHAPE["layers"] * (attention + 3 * SHAPE["hidden"] * SHAPE["ffn"]) + SHAPE["hidden"] * SHAPE["vocabulary"]
    scores = SHAPE["layers"] * length * SHAPE["hidden"]  # a causal half of two products a layer
    return 6 * batch * length * (weights + scores)


if __name__ == "__main__":
    main()
