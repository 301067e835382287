"""The cost of the retrieval probe: a probe against a training step of the quickstart's model, in one run.

    python benchmarks/retrieval_probe.py                  # about a minute on two cores

The model is that of examples/quickstart (5 million parameters, 16 x 256 tokens a step). Steps and probes alternate; the
share is the probe's time relative to that of an interval's steps, as in the log of a training run. Processor time of
this process is counted, so that other jobs on the machine do not affect it. Target: below 1% at an interval of 100.
"""

import argparse
import contextlib
import io
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from results import record, turns  # noqa: E402
from trainer import Trainer, random_batches  # noqa: E402

VOCABULARY = 4096
QUICKSTART = (
    "--num-layers 4 --hidden-size 256 --ffn-hidden-size 704 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --seq-length 256 --max-position-embeddings 256 --position-embedding-type rope "
    "--normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights "
    f"--attention-dropout 0 --hidden-dropout 0 --tokenizer-type NullTokenizer --vocab-size {VOCABULARY} "
    "--make-vocab-size-divisible-by 64 --micro-batch-size 8 --global-batch-size 16 --train-iters 100000 --lr 2e-3 "
    "--clip-grad 1.0 --eval-iters 0 --mock-data --num-workers 0"
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="of a step and a probe (default: %(default)s)")
    parser.add_argument("--interval", type=int, default=100, help="steps between probes (default: %(default)s)")
    args = parser.parse_args()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(QUICKSTART.split())
        from megatron.core.rerun_state_machine import RerunDataIterator

        from megatron_meap.trainer.probe import RetrievalProbe

        probe = RetrievalProbe(trainer.args, special=())
        batches = RerunDataIterator(random_batches(8, 256, VOCABULARY))
        times = [
            (seconds(trainer.step, batches), seconds(probe.measure, trainer.model, trainer.optimizer))
            for _ in turns(args.rounds, warm_up=2)
        ][2:]
    step, probing = (1000 * statistics.median(side) for side in zip(*times, strict=True))
    shares = [probing / step / args.interval for step, probing in times]
    share = statistics.median(shares)
    record(f"retrieval probe every {args.interval} steps, of the training time", [100 * each for each in shares], "%")
    print(
        f"training step: {step:.1f} ms, probe: {probing:.1f} ms, {100 * share:.2f} % of the training time every "
        f"{args.interval} steps (target: below 1 %)"
    )


def seconds(run: Callable[..., Any], *arguments: Any) -> float:
    """Processor time of a call."""
    start = time.process_time()
    run(*arguments)
    return time.process_time() - start


if __name__ == "__main__":
    main()
