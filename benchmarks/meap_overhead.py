"""The cost of MEAP: the training step and the data pipeline, with and without masking, in one run.

    python benchmarks/meap_overhead.py                  # about two minutes on two cores
    python benchmarks/meap_overhead.py --rounds 15 --samples 2048

Training step: one model (15.6M parameters) alternates between a MEAP step (`--meap-mask-ratio 0.15`: masked inputs, the
loss reported for masked and for clean inputs) and a next-token step. The samples of both are read beforehand, because
reading them is measured separately. Target: at most 1.01 of the next-token step.

Log: what this project adds to Megatron's line of a step (speed, time left, norms of the embedding), the search for
spikes and a heartbeat, all as if written after every step, relative to the step. Target: at most 0.005 of it.

Data pipeline: Megatron's own `GPTDataset` over a corpus of random tokens, and this project's, which masks, through the
same DataLoader in batches of 8, at the paper's 4,096 tokens. Target: at least 0.97 of the samples per second. As in
Megatron, `--workers` processes read them; with 0, nothing runs in parallel and the cost of masking shows most.

Objectives: the time to noise one sample of 4,096 tokens under each objective, in this process (with copies: one noised
copy). Target: at most 40 us.

The two sides alternate; a figure is the median over the rounds of the ratio within a round. Processor time of this
process is counted, so that other jobs on the machine do not affect the comparison; with workers it is wall time.
"""

import argparse
import contextlib
import copy
import io
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from results import record, turns  # noqa: E402
from trainer import SHAPE, Trainer, flags  # noqa: E402

RATIO = 0.15
BATCH = 8
LENGTH = 4096


def main() -> None:
    """Measure both and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="of each side (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=1024, help="read in a round (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that read (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            corpus = write_corpus(Path(folder), 2**20)
            data = ["--split", "1,0,0", "--data-path", corpus, "--data-cache-path", folder]
            trainer = Trainer([flag for flag in flags(BATCH, 512) if flag != "--mock-data"] + data)
            short, long = datasets(trainer, 512, args.samples), datasets(trainer, 4096, args.samples)
        clean, masked = (step(trainer, side, ratio) for side, ratio in zip(short, (0.0, RATIO), strict=True))
        steps = compare(clean, masked, args.rounds, time.process_time)
        print(f"training step: {describe(steps)} (target: at most 1.01)")
        record("training step, masking / none", [masked / without for without, masked in steps], "x")
        added = compare(clean, log_of_a_step(trainer, Path(folder)), args.rounds, time.process_time)
        shares = [log / step for step, log in added]
        record("log line and heartbeat of every step, of a training step", shares, "x")
        milliseconds = 1000 * statistics.median(log for _, log in added)
        print(
            f"log line and heartbeat: {milliseconds:.2f} ms, {statistics.median(shares):.5f} of a training step "
            "(target: at most 0.005)"
        )
        for workers in sorted({0, args.workers}):
            clean, masked = (reading(side, args.samples, workers) for side in (stock(long[0]), long[1]))
            reads = compare(clean, masked, args.rounds, time.perf_counter if workers else time.process_time)
            shares = [without / masked for without, masked in reads]
            share = statistics.median(shares)
            record(f"samples/s with {workers} data workers, masking / Megatron's own", shares, "x")
            print(
                f"reading {args.samples} samples, {workers} workers: {describe(reads)}; "
                f"{share:.3f} of the samples/s (target: at least 0.97)"
            )
        print(f"noising a sample of {LENGTH:,} tokens (target: at most 40 us):")
        for name, seconds in objectives(Path(folder), args.rounds):
            print(f"  {name:<12}{1e6 * seconds:6.1f} us")
            record(f"noising a sample of {LENGTH:,} tokens, {name}", [1e6 * seconds], "us")


def write_corpus(folder: Path, tokens: int) -> str:
    """A corpus of random tokens in documents of 100 to 1,000; returns its prefix."""
    from megatron_meap.backend import device

    device.prepare()
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{folder}/corpus.bin", dtype=np.int32)
    written = 0
    while written < tokens:
        document = generator.integers(1, SHAPE["vocabulary"] - 64, generator.integers(100, 1000))
        builder.add_document(torch.from_numpy(document), [len(document)])
        written += len(document)
    builder.finalize(f"{folder}/corpus.idx")
    return f"{folder}/corpus"


def datasets(trainer: Trainer, length: int, samples: int) -> tuple[Any, Any]:
    """The training set, and the same wrapped for masking."""
    from megatron_meap.trainer.batches import datasets_provider

    trainer.args.seq_length = length
    trainer.args.meap_mask_ratio = 0.0
    clean = datasets_provider([samples, 0, 0])[0]
    trainer.args.meap_mask_ratio = RATIO
    masked = datasets_provider([samples, 0, 0])[0]
    trainer.args.seq_length = 512
    return clean, masked


def stock(dataset: Any) -> Any:
    """The same samples, read by Megatron's own class."""
    from megatron.core.datasets.gpt_dataset import GPTDataset

    own = copy.copy(dataset)
    own.__class__ = GPTDataset
    return own


def objectives(folder: Path, rounds: int) -> Iterator[tuple[str, float]]:
    """Processor seconds to noise a sample, the median over the rounds, for each objective that noises anything."""
    from megatron_meap.meap.dataset import MaskedInputDataset
    from megatron_meap.meap.objectives import OBJECTIVES
    from megatron_meap.meap.settings import MaskSettings

    vocabulary, samples = SHAPE["vocabulary"], 64
    weights = folder / "weights.npy"
    np.save(weights, np.random.default_rng(0).random(vocabulary))
    text = torch.randint(3, vocabulary, (samples, LENGTH))
    clean = [{"tokens": tokens, "loss_mask": torch.ones(LENGTH)} for tokens in text]
    for name, objective in OBJECTIVES.items():
        chosen = dict(objective.settings)
        if chosen.get("mask_strategy") == "weighted":
            chosen["mask_weights"] = str(weights)
        settings = MaskSettings(**{"mask_ratio": RATIO, "mask_seed": 1} | chosen)
        masking = settings.masking("train", samples, BATCH, vocabulary, (1, 2))
        if masking is None:
            continue
        options = {"mask_token_id": vocabulary, "vocab_size": vocabulary, "protected_ids": (1, 2)}
        dataset = MaskedInputDataset(clean, masking, split=None, copy_weight=settings.copy_weight, **options)
        noised = range(samples) if settings.copy_weight is None else range(1, 2 * samples, 2)
        seconds = []
        for _ in turns(rounds, warm_up=2):
            start = time.process_time()
            for index in noised:
                dataset[index]
            seconds.append((time.process_time() - start) / samples)
        yield name, statistics.median(seconds[2:])


def loader(dataset: Any, workers: int = 0) -> torch.utils.data.DataLoader:
    """Batches in order."""
    return torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0)


def step(trainer: Trainer, dataset: Any, ratio: float) -> Callable[[], Any]:
    """A training step on batches read beforehand."""
    from megatron.core.rerun_state_machine import RerunDataIterator

    batches = RerunDataIterator(itertools.cycle(list(itertools.islice(loader(dataset), 8))))

    def run() -> None:
        trainer.args.meap_mask_ratio = ratio
        trainer.step(batches)

    return run


def log_of_a_step(trainer: Trainer, folder: Path) -> Callable[[], Any]:
    """The work for the log after one step, with a heartbeat (in training, there is one every ten seconds)."""
    from megatron_meap.backend.megatron_patches import Step
    from megatron_meap.cluster.run_files import Heartbeat
    from megatron_meap.trainer.log_line import LogLine

    log = LogLine(trainer.args)
    done = Step(trainer.model, trainer.optimizer, 1, {"lm loss": torch.tensor(9.0)}, False, 1.0, {})
    line = (
        f" iteration 1/ 100000 | elapsed time per iteration (ms): 900.0 | global batch size: {BATCH} | lm loss: 9.0 |"
    )

    def run() -> None:
        Heartbeat(str(folder)).beat(1)
        log.see(done)
        assert "tokens/s" in log.rewrite(line, done)

    return run


def reading(dataset: Any, samples: int, workers: int) -> Callable[[], Any]:
    """One pass over the samples through a DataLoader."""
    batches = loader(torch.utils.data.Subset(dataset, range(samples)), workers)
    return lambda: sum(1 for _ in batches)


def compare(without: Callable, masked: Callable, rounds: int, clock: Callable) -> list[tuple[float, float]]:
    """Seconds (without, with masking) of each round, in alternating order, after two rounds to warm up."""
    times = []
    for turn in turns(rounds, warm_up=2):
        sides = [(0, without), (1, masked)]
        seconds = [0.0, 0.0]
        for side, run in sides if turn % 2 else sides[::-1]:
            start = clock()
            run()
            seconds[side] = clock() - start
        times.append((seconds[0], seconds[1]))
    return times[2:]


def describe(times: list[tuple[float, float]]) -> str:
    """Both medians and the ratio."""
    without, masked = (1000 * statistics.median(side) for side in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    return f"{without:.1f} ms without masking, {masked:.1f} ms with, ratio {ratio:.3f}"


if __name__ == "__main__":
    main()
