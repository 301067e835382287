"""Evaluate models on retrieval, long context and commonsense, side by side, with lm-evaluation-harness.

    python tools/evaluate.py runs/demo/checkpoints --suite quick --output results/demo
    python tools/evaluate.py NTP=runs/ntp/checkpoints MEAP=runs/meap/checkpoints --suite paper \\
        --qa-file nq-open-20_total_documents_gold_at_0.jsonl.gz --output results/compare
    python tools/evaluate.py exported/model --tasks meap_needle,hellaswag --context-lengths 1024 --output results/one

A model is a Hugging Face directory or a Megatron --save directory (exported to a cache first): [NAME=]PATH[@ITERATION];
@all takes every checkpoint there is and draws curves over training tokens. The first model is the baseline.
An interrupted evaluation resumes: give the same command again.
"""

import argparse
import logging
import os
import shlex
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from megatron_meap.errors import UsageError, refusing
from megatron_meap.evaluation.tasks.options import Options
from megatron_meap.flags import Parser, add_group

UNFINISHED = "unfinished.txt"
"""A file in the output folder until everything is done."""


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="[NAME=]PATH[@ITERATION|@all]")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--overwrite", action="store_true", help="replace finished results there")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="exported checkpoints (default: the user's cache)")
    add_flags(parser)
    return parser.parse_args()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of what is run, and how, whatever the models are."""
    parser.add_argument(
        "--suite", choices=("quick", "paper"), help="quick: takes minutes; paper: everything that the paper reports"
    )
    parser.add_argument("--tasks", default="", metavar="A,B", help="tasks by name, ours (meap_...) or lm-eval's")
    parser.add_argument("--batch-size", default="8", metavar="N", help="samples at once, or auto (default %(default)s)")
    parser.add_argument("--device", help="a PyTorch device (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: fp32 on a CPU, otherwise as stored"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer of the checkpoints (default: each one's own)")
    parser.add_argument(
        "--judge-url", metavar="URL", help="OpenAI-compatible endpoint, up to /v1 (key: MEAP_JUDGE_KEY)"
    )
    parser.add_argument("--judge-model", metavar="NAME", help="the judge's model")
    add_group(parser, "samples of the generated tasks", None, Options)
    parser.set_defaults(**dict.fromkeys(Options.names()))  # where a flag is not given, the suite chooses


def main() -> None:
    """Evaluate."""
    flags = parse_flags()
    finished_there = (flags.output / "report.html").exists() and not (flags.output / UNFINISHED).exists()
    if finished_there and not flags.overwrite:
        raise UsageError(f"--output {flags.output}: holds earlier results; add --overwrite, or name another folder")
    prepare(flags)
    from megatron_meap.evaluation import models
    from megatron_meap.evaluation.reporting import pictures, report, results
    from megatron_meap.evaluation.run import evaluate

    chosen = models.open_models(flags.models, flags.cache or models.default_cache(), flags.tokenizer)
    plan, tasks = choose_tasks(flags, chosen)

    def finished(found: list[Any]) -> None:
        if found:
            results.save(found, flags.output)
            drawn = pictures.draw_all(found, flags.output / "pictures")
            report.write(found, plan, drawn, shlex.join(["python", *sys.argv]), flags.output / "report.html")

    answers = flags.output / "answers"
    unfinished = flags.output / UNFINISHED
    unfinished.write_text("an evaluation was begun here; the same command resumes it\n")
    found = evaluate(chosen, tasks, machine_of(flags, answers), finished)
    shutil.rmtree(answers, ignore_errors=True)
    unfinished.unlink()
    print(report.summary(found))
    say_left_out(plan)
    print(f"{flags.output}/report.html, results.csv, differences.csv, pictures/, lm_eval/", flush=True)


def prepare(flags: argparse.Namespace) -> None:
    """Refuse an output that cannot be written before hours are spent, and silence the libraries.

    Raises:
        UsageError: names the flag, or lm-evaluation-harness where it is not installed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars are for terminals
    warnings.simplefilter("ignore")  # the libraries' chatter: what matters is printed or raised
    logging.disable(logging.ERROR)
    _prepare_output(flags)
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UsageError("lm-evaluation-harness is not installed: pip install -e '.[eval]'") from error


def choose_tasks(flags: argparse.Namespace, chosen: list[Any]) -> tuple[Any, dict[str, Any]]:
    """The plan, and lm-eval's tasks by name, for these models.

    Raises:
        UsageError: nothing can be run, or a task that was named cannot.
    """
    from megatron_meap.evaluation import models
    from megatron_meap.evaluation.run import check_lengths, load_tasks, measuring_tokenizer
    from megatron_meap.evaluation.suites import make_plan

    given = {name: getattr(flags, name) for name in Options.names()}
    context = min(models.context_length(model) for model in chosen)
    plan = make_plan(flags.suite, [task for task in flags.tasks.split(",") if task], given, context)
    tasks = check_lengths(load_tasks(plan, measuring_tokenizer(chosen)), plan, chosen)
    if not tasks:
        reasons = "; ".join(f"{task}: {reason}" for task, reason in plan.left_out.items())
        raise UsageError(f"--suite {flags.suite}: nothing of it can be run ({reasons})")
    return plan, tasks


def machine_of(flags: argparse.Namespace, answers: Path | None) -> Any:
    """Where and how models run; `answers` keeps what they answered."""
    from megatron_meap.evaluation.run import Machine

    batch_size = flags.batch_size if flags.batch_size == "auto" else int(flags.batch_size)
    return Machine(batch_size, flags.device, flags.dtype, bool(flags.chat_template), answers)


def say_left_out(plan: Any) -> None:
    """Which tasks of a suite are not run, and why."""
    for task, reason in plan.left_out.items():
        print(f"not run: {task}: {reason}", flush=True)


def _prepare_output(flags: argparse.Namespace) -> None:
    """Check that the folder can be written; set where the judge keeps its verdicts."""
    if not (flags.batch_size == "auto" or (flags.batch_size.isdigit() and int(flags.batch_size) > 0)):
        raise UsageError(f"--batch-size {flags.batch_size}: must be a positive number or auto")
    with refusing(f"--output {flags.output}: cannot be written", OSError):
        flags.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=flags.output).close()
    os.environ["MEAP_JUDGE_LOG"] = str(flags.output / "judge.jsonl")
    for name in ("url", "model"):
        if value := getattr(flags, f"judge_{name}"):
            os.environ[f"MEAP_JUDGE_{name.upper()}"] = value
