"""Generation and evaluation with a Megatron checkpoint, against transformers and lm-eval with its export.

    python benchmarks/evaluation.py                       # the quickstart's model after 41 steps, trained first
    python benchmarks/evaluation.py --load runs/demo/checkpoints --rounds 5

- generation: tokens per second of `megatron_meap.huggingface.generation.Generator` on the checkpoint, greedily, against
  `generate` of the exported model, which must give the same text, and against the same without a cache of keys and
  values (which rounds differently)
- evaluation, as whole processes: `tools/evaluate.py`, against lm-eval's own command with its `hf` model on the same
  directories, task files and samples; both must give the same results. Two retrieval tasks; a grid of needles, whose
  prompts share most of their text; `--suite quick` of two models (really one under two names, which takes the same
  time), for which lm-eval's command runs twice

The sides alternate. Figures are medians of processor time, with one thread.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "examples" / "quickstart")]

from results import record, turns  # noqa: E402

EVALUATIONS: dict[str, tuple[int, str]] = {
    # name: models, and the flags of `tools/evaluate.py`
    "two tasks": (1, "--tasks meap_kv_logprob,meap_needle_logprob --samples 8 --kv-digits 4"),
    "needle grid": (1, "--tasks meap_needle,meap_needle_logprob --samples 4 --depths 0 10 20 30 40 50 60 70 80 90 100"),
    "suite quick": (2, "--suite quick"),
}
PROMPT = "Returns the value of"


def main() -> None:
    """Measure both and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=Path, help="checkpoint directory (default: 41 steps of the quickstart)")
    parser.add_argument("--rounds", type=int, default=3, help="of each side (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=200, help="to generate (default: %(default)s)")
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONPATH=str(HERE.parent))
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = args.load.resolve() if args.load else trained(Path(folder))
        from megatron_meap.evaluation.models import open_models

        [model] = open_models([str(checkpoints)], Path(folder) / "exports")
        generation = generating(checkpoints, model.directory, args.tokens)
        compare("generation", generation, args.rounds, warm_up=True)
        for name, (models, flags) in EVALUATIONS.items():
            sides = evaluating(model, models, flags.split(), Path(folder))
            compare(f"evaluation, {name}", sides, args.rounds)


def trained(folder: Path) -> Path:
    """The quickstart's model after its warm-up; returns the directory of its checkpoints."""
    import demo

    os.chdir(HERE.parent)
    demo.prepare_data(folder, 2)
    demo.train(folder, 41)
    return folder / "checkpoints"


def compare(what: str, sides: dict[str, Callable[[], tuple[float, Any]]], rounds: int, warm_up: bool = False) -> None:
    """Run the sides in turns, after a warm-up round if asked; print and record ratios to the first side's time."""
    found: dict[str, list[tuple[float, Any]]] = {name: [] for name in sides}
    for _ in turns(rounds, warm_up):
        for name, run in sides.items():
            found[name].append(run())
    ours = next(iter(sides))
    if any(result not in (None, found[ours][0][1]) for each in found.values() for _, result in each):
        sys.exit(f"{what}: the sides found different things: { {name: each[0][1] for name, each in found.items()} }")
    for name, each in found.items():
        seconds = [taken for taken, _ in each[warm_up:]]
        line = f"{what}, {name}: {statistics.median(seconds):.2f} s of processor"
        if name != ours:
            ratios = [taken / own for taken, (own, _) in zip(seconds, found[ours][warm_up:], strict=True)]
            record(f"{what}: processor time of {name} / ours", ratios, "x")
            line += f", {statistics.median(ratios):.2f} of the first's"
        print(line, flush=True)


def generating(checkpoints: Path, directory: Path, tokens: int) -> dict[str, Callable[[], tuple[float, Any]]]:
    """Ways to continue the prompt greedily; each returns its seconds and the text."""
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_meap.huggingface.generation import Generator, Sampling
    from megatron_meap.tokenization.huggingface import load_directory

    torch.set_num_threads(1)
    generator, sampling = Generator(str(checkpoints)), Sampling(tokens, temperature=0)
    tokenizer = load_directory(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=generator.model.dtype).eval()
    prompt = tokenizer(PROMPT, return_tensors="pt")

    def theirs(cache: bool) -> str:
        return tokenizer.decode(
            model.generate(
                input_ids=prompt["input_ids"], attention_mask=prompt["attention_mask"], max_new_tokens=tokens,
                do_sample=False, use_cache=cache, suppress_tokens=[generator.mask_id],
            )[0], skip_special_tokens=True,
        )  # fmt: skip

    def timed(run: Callable[[], str]) -> tuple[float, str]:
        begun = time.process_time()
        with torch.inference_mode():
            text = run()
        return time.process_time() - begun, text

    made = len(tokenizer(theirs(True))["input_ids"]) - prompt["input_ids"].shape[1]
    print(f"generation: about {made} tokens after {prompt['input_ids'].shape[1]}, {generator.model.dtype}", flush=True)
    return {
        "a Megatron checkpoint": lambda: timed(lambda: generator.generate(PROMPT, sampling)),
        "transformers": lambda: timed(lambda: theirs(True)),
        "transformers without a cache": lambda: (timed(lambda: theirs(False))[0], None),
    }


def evaluating(model: Any, models: int, flags: list[str], folder: Path) -> dict[str, Callable[[], tuple[float, Any]]]:
    """Ways to evaluate a model that many times; each returns its seconds and all values of every task and model."""
    from megatron_meap.evaluation.models import context_length
    from megatron_meap.evaluation.suites import TASKS

    directory, context = model.directory, context_length(model)
    tasks, settings = samples_of(model, flags)

    def ours() -> tuple[float, Any]:
        shutil.rmtree(folder / "ours", ignore_errors=True)
        named = [f"{number}={directory}" for number in range(models)]
        seconds = processor_seconds(["tools/evaluate.py", *named, *flags, "--output", f"{folder}/ours"])
        return seconds, [found_in(each) for each in (folder / "ours" / "lm_eval").iterdir()]

    def theirs() -> tuple[float, Any]:
        seconds, found = 0.0, []
        metadata = settings | dict.fromkeys(("pretrained", "tokenizer"), str(directory))
        arguments = f"pretrained={directory},dtype=float32,max_length={context}"
        command = ["-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", ",".join(tasks), "--device"]
        command += ["cpu", "--batch_size", "8", "--include_path", str(TASKS), "--metadata", json.dumps(metadata)]
        for _ in range(models):
            shutil.rmtree(folder / "theirs", ignore_errors=True)
            seconds += processor_seconds([*command, "--output_path", f"{folder}/theirs"])
            found.append(found_in(folder / "theirs"))
        return seconds, found

    return {"tools/evaluate.py": ours, "lm_eval --model hf": theirs}


def samples_of(model: Any, flags: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The tasks that `tools/evaluate.py` runs with these flags, and their settings as lm-eval's metadata."""
    from megatron_meap.commands import evaluate

    parser = argparse.ArgumentParser()
    evaluate.add_flags(parser)
    logging.disable(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        plan, tasks = evaluate.choose_tasks(parser.parse_args(flags), [model])
    return list(tasks), {name: value for name, value in plan.metadata.items() if value is not None}


def found_in(folder: Path) -> dict[str, dict[str, float]]:
    """The values of every task as lm-eval wrote them, without standard errors, which are random."""
    [file] = folder.rglob("results*.json")
    return {
        task: {
            name: round(value, 4)
            for name, value in values.items()
            if isinstance(value, float) and name.endswith(",none") and "stderr" not in name
        }
        for task, values in json.loads(file.read_text())["results"].items()
    }


def processor_seconds(command: list[str]) -> float:
    """Processor seconds of a Python program with all its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], cwd=HERE.parent, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
