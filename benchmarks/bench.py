"""Every benchmark that this machine allows, one after the other, and their figures in one table.

    make bench                                             # an hour or more on two quiet cores
    python benchmarks/bench.py --only cpu_training startup
    python benchmarks/bench.py --preprocess "--corpus novels.jsonl --train-vocab 128000"   # that too, on a corpus

Each compares its sides in turns within one run; here their medians and spreads are gathered, with the command and the
machine that each figure comes from: `bench.jsonl` and `bench.md` in `--output`. What cannot be measured here is said.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

from results import table  # noqa: E402


def main() -> None:
    """Run them, print and write the table; the exit status is 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="benchmarks to run, by the names of their files")
    parser.add_argument("--preprocess", metavar="FLAGS", help="flags of preprocess.py, which wants a corpus")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "bench.jsonl"
    file.write_text("")
    failed = []
    for command in commands(args.preprocess):
        if args.only and Path(command[0]).stem not in args.only:
            continue
        print(f"\n$ python benchmarks/{' '.join(command)}", flush=True)
        environment = os.environ | {"BENCH_RESULTS": str(file.resolve())}
        if subprocess.run([sys.executable, HERE / command[0], *command[1:]], env=environment).returncode:
            failed.append(" ".join(command))
    (args.output / "bench.md").write_text(table(file) + "\n")
    print(f"\n{table(file)}\n\n{file}, {args.output / 'bench.md'}")
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


def commands(preprocess: str | None) -> Iterator[list[str]]:
    """Scripts and their flags; what is left out is said."""
    compiler = shutil.which("c++") or shutil.which("g++")
    one_thread = ["--threads", "1", "--cpu-time"]
    yield ["startup.py"]
    yield ["cpu_training.py", *one_thread, *(["--compile"] if compiler else [])]
    yield ["cpu_training.py", *one_thread, "--fp32", "--shapes", "8x512"]
    yield ["meap_overhead.py"]
    yield ["retrieval_probe.py"]
    yield ["checkpoint.py"]
    yield ["evaluation.py"]
    yield ["growth.py"]
    if compiler is None:
        print("no C++ compiler: nothing is compared with torch.compile")
    if preprocess is not None:
        yield ["preprocess.py", *shlex.split(preprocess)]
    else:
        print("no --preprocess FLAGS: preprocessing is not compared with Megatron's own tool")
    print("on a GPU: benchmarks/gpu.py")


if __name__ == "__main__":
    main()
