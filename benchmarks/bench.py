"""All benchmarks that this machine can run, one after the other, and their figures in one table.

    make bench                                              # at most 35 minutes: few rounds; says what is left out
    make bench BENCH=--whole                                # all rounds and sizes, two hours and more
    python benchmarks/bench.py --only cpu_training startup
    python benchmarks/bench.py --preprocess "--corpus novels.jsonl --train-vocab 128000"   # preprocessing too

Each benchmark alternates between its contenders within one run. Their medians and spreads are gathered here, with the
command and the machine of each figure: `bench.jsonl` and `bench.md` in `--output`. A benchmark that fails or reaches
its limit, as on a busy machine, is named at the end; its figures so far are kept, and the others still run.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

from results import table  # noqa: E402

ONE_THREAD = "--threads 1 --cpu-time"


@dataclass(frozen=True)
class Benchmark:
    """A script of this folder, and how it is run."""

    script: str
    whole: str = ""
    """Its flags in a full run."""

    quick: str = ""
    """Flags added to them in a quick one."""

    minutes: float = 4
    """Its time limit in a quick run; in a full run it has eight times as long. What it leaves goes to the next."""

    def command(self, whole: bool) -> list[str]:
        """The script and its flags."""
        return [self.script, *shlex.split(self.whole if whole else f"{self.whole} {self.quick}")]


def benchmarks(preprocess: str | None) -> Iterator[Benchmark]:
    """All benchmarks; the limits of their quick runs add up to 35 minutes."""
    yield Benchmark("meap_overhead.py", quick="--rounds 5", minutes=4)
    yield Benchmark("retrieval_probe.py", minutes=2)
    compiled = " --compile" if shutil.which("c++") or shutil.which("g++") else ""
    yield Benchmark("cpu_training.py", ONE_THREAD + compiled, "--shapes 8x512 --rounds 3", minutes=7)
    yield Benchmark("cpu_training.py", f"{ONE_THREAD} --fp32 --shapes 8x512", "--rounds 3", minutes=3)
    yield Benchmark("checkpoint.py", quick="--rounds 1", minutes=4)
    yield Benchmark("evaluation.py", quick="--rounds 1", minutes=7)
    yield Benchmark("growth.py", quick="--only length vocabulary processes --steps 2", minutes=5)
    yield Benchmark("startup.py", quick="--rounds 3", minutes=3)
    if preprocess is not None:
        yield Benchmark("preprocess.py", preprocess, minutes=30)


def main() -> None:
    """Run them, print and write the table; the exit status is 1 if one failed or nothing was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="benchmarks to run, by the names of their files")
    parser.add_argument("--whole", action="store_true", help="all rounds and sizes")
    parser.add_argument("--preprocess", metavar="FLAGS", help="flags of preprocess.py, which wants a corpus")
    args = parser.parse_args()
    chosen = [each for each in benchmarks(args.preprocess) if not args.only or Path(each.script).stem in args.only]
    if not chosen:
        parser.error(f"--only {' '.join(args.only)}: no such benchmark")
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "bench.jsonl"
    file.write_text("")
    left = 0.0
    notes = [] if args.whole else [*left_out(chosen, args.preprocess)]
    try:
        for each in chosen:
            command = each.command(args.whole)
            begun = time.monotonic()
            print(f"\n$ python benchmarks/{shlex.join(command)}", flush=True)
            left += 60 * each.minutes * (8 if args.whole else 1)
            if reason := run(command, left, file):
                notes.append(f"{reason}: `{shlex.join(command)}`")
            took = time.monotonic() - begun
            left -= took
            print(f"({took / 60:.1f} minutes)", flush=True)
    finally:
        found = "\n".join([table(file), "", *(f"- {note}" for note in notes)])
        (args.output / "bench.md").write_text(found + "\n")
        print(f"\n{found}\n\n{file}, {args.output / 'bench.md'}")
    sys.exit(any(note.startswith("failed") for note in notes) or not file.read_text())


def run(command: list[str], limit: float, file: Path) -> str | None:
    """Run a benchmark for so many seconds at most; it appends its figures to a file. Returns why it did not end."""
    before = file.read_text().count("\n")
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as scratch:
        environment = os.environ | {"BENCH_RESULTS": str(file.resolve()), "TMPDIR": scratch}
        environment["BENCH_COMMAND"] = f"python benchmarks/{shlex.join(command)}"
        environment["PYTHONWARNINGS"] = "ignore"  # Megatron's, of what is not installed
        environment["BENCH_UNTIL"] = str(time.time() + limit)
        process = subprocess.Popen(
            [sys.executable, HERE / command[0], *command[1:]], env=environment, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            figures = file.read_text().count("\n") - before
            return f"ended at its limit, {limit / 60:.1f} minutes, figures until then: {figures}"
        finally:
            end(process)
    return f"failed with status {status}, see its output" if status else None


def end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of it, politely first: torchrun then ends its ranks, which are in other process groups."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)


def left_out(chosen: list[Benchmark], preprocess: str | None) -> Iterator[str]:
    """What a quick run leaves out."""
    yield from (
        f"shortened by `{each.quick}`: `{shlex.join(each.command(whole=True))}`" for each in chosen if each.quick
    )
    if preprocess is None:
        yield "no `--preprocess FLAGS`: preprocessing is not compared with Megatron's own tool"
    training = [each.whole for each in chosen if each.script == "cpu_training.py"]
    if training and not any("--compile" in flags for flags in training):
        yield "no C++ compiler: nothing is compared with torch.compile"
    yield "on a GPU: `benchmarks/gpu.py`"


if __name__ == "__main__":
    main()
