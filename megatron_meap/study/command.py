"""What `examples/study/study.py` does: list, run, or write up the runs of a grid."""

import argparse
import signal
import sys
from pathlib import Path

from megatron_meap.errors import UsageError
from megatron_meap.study import grid as grids
from megatron_meap.study.analysis import points_of
from megatron_meap.study.grid import Grid, Stage
from megatron_meap.study.runs import Runner, finished, read_results, write_results
from megatron_meap.study.texts import Texts

HERE = Path("examples/study")


def main() -> None:
    """Parse the command line and do it."""
    args = _parse()
    grid = grids.read(args.grid)
    results = args.results or HERE / "results" / f"{grid.path.stem}.jsonl"
    stages = [stage for stage in grid.stages if args.stage in (None, stage.name)]
    if not stages:
        raise UsageError(f"--stage {args.stage}: none of {', '.join(stage.name for stage in grid.stages)}")
    if args.do == "run":
        _run(args, grid, stages)
        return
    done = read_results(results) | finished(args.runs)
    if args.do == "list":
        for stage in stages:
            print(f"{stage.name}: {stage.question}")
            for point in points_of(grid, stage, done):
                print(f"  {'done' if point in done else '    '}  {point.name}")
        return
    from megatron_meap.study.page import write_page  # matplotlib and SciPy take seconds

    write_results(results, done)
    write_page(grid, done, results, args.page)
    print(f"{len(done)} runs in {results}; the page is {args.page}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("do", choices=["list", "run", "page"])
    parser.add_argument("--grid", type=Path, default=HERE / "grid.toml", help="default: %(default)s")
    parser.add_argument("--stage", help="one stage of the grid (default: all, in order)")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/study"), help="folder of all runs (default: %(default)s)"
    )
    parser.add_argument(
        "--texts", type=Path, default=Path(), help="folder of the grid's files of documents (default: here)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--gpus", type=int, help="GPUs of this machine, a run at a time on each")
    parser.add_argument("--member", default="1/1", metavar="I/N", help="run the I-th of N parts, as of a Slurm array")
    parser.add_argument(
        "--results", type=Path, help="JSON lines to collect in (default: examples/study/results/GRID.jsonl)"
    )
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"), help="default: %(default)s")
    return parser.parse_args()


def _run(args: argparse.Namespace, grid: Grid, stages: list[Stage]) -> None:
    member, _, members = args.member.partition("/")
    if not (member.isdigit() and members.isdigit() and 1 <= int(member) <= int(members)):
        raise UsageError(f"--member {args.member}: expected a part and their number, as 3/20")
    if (args.gpus if args.gpus is not None else args.jobs) < 1:
        raise UsageError("--jobs, --gpus: at least 1")
    slots = [{}] * args.jobs if args.gpus is None else [{"CUDA_VISIBLE_DEVICES": str(i)} for i in range(args.gpus)]
    texts = Texts(grid, args.texts, args.runs / "data")
    runner = Runner(grid, texts, args.runs, slots, lambda line: print(line, flush=True))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stage in stages:
        points = points_of(grid, stage, finished(args.runs))
        print(f"== {stage.name}" + ("" if points else f": waits for “{stage.tuned_by}”"), flush=True)
        runner.run(points[int(member) - 1 :: int(members)])
