"""What `examples/study/study.py` does: list, run, or write up the runs of a grid."""

import argparse
import signal
import sys
from pathlib import Path

from megatron_meap.errors import UsageError
from megatron_meap.flags import Parser
from megatron_meap.study import grid as grids
from megatron_meap.study.analysis import points_of
from megatron_meap.study.grid import Grid, Stage
from megatron_meap.study.runs import AGAIN, Runner, finished, read_results, write_results
from megatron_meap.study.texts import Texts

HERE = Path("examples/study")
GRIDS = (HERE / "grid.toml", HERE / "retrieval.toml")
"""What is run and written up if no grid is named."""


def main() -> None:
    """Parse the command line and do it."""
    args = _parse()
    studies = [Study(grids.read(path), args) for path in args.grid or GRIDS]
    names = [stage.name for study in studies for stage in study.grid.stages]
    if args.stage not in (None, *names):
        raise UsageError(f"--stage {args.stage}: none of {', '.join(names)}")
    if args.do == "page":
        _write_up(studies, args.page)
        return
    do = {"run": _run, "list": _list, "again": _again}[args.do]
    for study in studies:
        do(study, [stage for stage in study.grid.stages if args.stage in (None, stage.name)], args)


class Study:
    """A grid, the folder of its runs, and their results."""

    def __init__(self, grid: Grid, args: argparse.Namespace) -> None:
        self.grid = grid
        self.folder: Path = args.runs / grid.data["folder"]
        self.file: Path = args.results / f"{grid.path.stem}.jsonl"
        self.results = read_results(self.file) | finished(self.folder)
        self.file_again = self.file.with_stem(f"{self.file.stem}-again")
        self.again = read_results(self.file_again) | finished(self.folder, AGAIN)


def _write_up(studies: list[Study], page: Path) -> None:
    from megatron_meap.study.page import Written, write_page  # matplotlib and SciPy take seconds

    for study in studies:
        for file, results in ((study.file, study.results), (study.file_again, study.again)):
            if results:
                write_results(file, results)
    write_page([Written(study.grid, study.results, study.again, study.file) for study in studies], page)
    print(f"{sum(len(study.results) for study in studies)} runs; the page is {page}")


def _list(study: Study, stages: list[Stage], args: argparse.Namespace) -> None:
    for stage in stages:
        print(f"{stage.name}: {stage.question}")
        for point in points_of(study.grid, stage, study.results):
            print(f"  {'done' if point in study.results else '    '}  {point.name}")


def _parse() -> argparse.Namespace:
    parser = Parser(sys.modules["__main__"].__doc__)
    parser.add_argument("do", choices=["list", "run", "again", "page"], metavar="list|run|again|page")
    parser.add_argument(
        "--grid", type=Path, action="append", help=f"may be given again (default: {' and '.join(map(str, GRIDS))})"
    )
    parser.add_argument("--stage", help="one stage of the grids (default: all, in order)")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="below it each grid has a folder (default: %(default)s)"
    )
    parser.add_argument(
        "--texts", type=Path, default=Path(), help="folder of the grid's files of documents (default: here)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--gpus", type=int, help="GPUs of this machine, a run at a time on each")
    parser.add_argument("--member", default="1/1", metavar="I/N", help="run the I-th of N parts, as of a Slurm array")
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", help="folder to collect GRID.jsonl in (default: %(default)s)"
    )
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"), help="default: %(default)s")
    return parser.parse_args()


def _again(study: Study, stages: list[Stage], args: argparse.Namespace) -> None:
    """Repeat the shortest run of these stages."""
    points = [p for stage in stages for p in points_of(study.grid, stage, study.results) if p in study.results]
    if not points:
        print(f"{study.grid.path}: no finished run to repeat")
        return
    shortest = min(points, key=lambda point: study.results[point]["cpu_seconds"])
    _runner(study, args).again(study.results[shortest])


def _run(study: Study, stages: list[Stage], args: argparse.Namespace) -> None:
    member, _, members = args.member.partition("/")
    if not (member.isdigit() and members.isdigit() and 1 <= int(member) <= int(members)):
        raise UsageError(f"--member {args.member}: expected a part and their number, as 3/20")
    runner = _runner(study, args)
    for stage in stages:
        points = points_of(study.grid, stage, finished(study.folder))
        print(f"== {stage.name}" + ("" if points else f": waits for “{stage.tuned_by}”"), flush=True)
        runner.run(points[int(member) - 1 :: int(members)])


def _runner(study: Study, args: argparse.Namespace) -> Runner:
    if (args.gpus if args.gpus is not None else args.jobs) < 1:
        raise UsageError("--jobs, --gpus: at least 1")
    slots = [{}] * args.jobs if args.gpus is None else [{"CUDA_VISIBLE_DEVICES": str(i)} for i in range(args.gpus)]
    texts = Texts(study.grid, args.texts, study.folder / "data")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return Runner(study.grid, texts, study.folder, slots, lambda line: print(line, flush=True))
