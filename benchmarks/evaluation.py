"""Generation and evaluation: a Megatron checkpoint, against what transformers and lm-eval do with it once exported.

    python benchmarks/evaluation.py                              # the quickstart's model after 41 steps, made here
    python benchmarks/evaluation.py --load runs/demo/checkpoints --rounds 5

- generation: tokens per second of `megatron_meap.huggingface.generation.Generator` on the checkpoint, greedily, against
  `generate` of the exported model, which must give the same text, and without its cache of keys and values (whose
  rounding is another one)
- evaluation: two retrieval tasks by `tools/evaluate.py`, against lm-eval's own command with its `hf` model on the same
  directory, task files and samples; both must find the same. Whole processes

The sides take turns; processor time, medians. One thread, as the others share a machine.
"""

import argparse
import json
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

from results import record  # noqa: E402

TASKS = ("meap_kv_logprob", "meap_needle_logprob")
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
        from megatron_meap.evaluation.models import context_length, open_models

        [model] = open_models([str(checkpoints)], Path(folder) / "exports")
        compare("generation", generating(checkpoints, model.directory, args.tokens), args.rounds)
        compare("evaluation", evaluating(model.directory, context_length(model), Path(folder)), args.rounds)


def trained(folder: Path) -> Path:
    """The quickstart's model after its warm-up; returns the directory of its checkpoints."""
    import demo

    os.chdir(HERE.parent)
    demo.prepare_data(folder, 2)
    demo.train(folder, 41)
    return folder / "checkpoints"


def compare(what: str, sides: dict[str, Callable[[], tuple[float, Any]]], rounds: int) -> None:
    """Run the sides in turns, after one round that warms up; print and record the ratios to the first one's time."""
    found: dict[str, list[tuple[float, Any]]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, run in sides.items():
            found[name].append(run())
    ours = next(iter(sides))
    if any(result not in (None, found[ours][0][1]) for each in found.values() for _, result in each):
        sys.exit(f"{what}: the sides found different things: { {name: each[0][1] for name, each in found.items()} }")
    for name, each in found.items():
        seconds = [taken for taken, _ in each[1:]]
        line = f"{what}, {name}: {statistics.median(seconds):.2f} s of processor"
        if name != ours:
            ratios = [taken / own for taken, (own, _) in zip(seconds, found[ours][1:], strict=True)]
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


def evaluating(directory: Path, context: int, folder: Path) -> dict[str, Callable[[], tuple[float, Any]]]:
    """Ways to run the tasks; each returns its seconds and the value of every task."""
    from megatron_meap.evaluation.suites import TASKS as FOLDER

    settings = {"max_seq_lengths": [context], "samples": 8, "kv_digits": 4}
    settings |= dict.fromkeys(("pretrained", "tokenizer"), str(directory))
    small = ["--context-lengths", str(context), "--samples", "8", "--kv-digits", "4"]
    tasks = ",".join(TASKS)

    def ours() -> tuple[float, Any]:
        command = ["tools/evaluate.py", str(directory), "--tasks", tasks, *small, "--output", f"{folder}/ours"]
        seconds = processor_seconds([*command, "--overwrite"])
        return seconds, found_in(folder / "ours" / "lm_eval")

    def theirs() -> tuple[float, Any]:
        model = f"pretrained={directory},dtype=float32,max_length={context}"
        command = ["-m", "lm_eval", "--model", "hf", "--model_args", model, "--tasks", tasks, "--device", "cpu"]
        command += ["--batch_size", "8", "--include_path", str(FOLDER), "--metadata", json.dumps(settings)]
        shutil.rmtree(folder / "theirs", ignore_errors=True)
        seconds = processor_seconds([*command, "--output_path", f"{folder}/theirs"])
        return seconds, found_in(folder / "theirs")

    return {"tools/evaluate.py": ours, "lm_eval --model hf": theirs}


def found_in(folder: Path) -> dict[str, float]:
    """The mean log-probability of the right answers of every task, as lm-eval has written it."""
    [file] = folder.rglob("results*.json")
    results = json.loads(file.read_text())["results"]
    return {task: round(results[task]["logprob,none"], 4) for task in TASKS}


def processor_seconds(command: list[str]) -> float:
    """What a Python program takes, all its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], cwd=HERE.parent, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
