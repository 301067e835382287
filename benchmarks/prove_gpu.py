"""Everything to be proven on a GPU, in one command of at most half an hour; run by tools/prove_gpu.sh.

Each step is a process with a time limit. `report.json` and `report.md` are rewritten after every step, so that an
interrupted run leaves a report too. Without a GPU nothing is run, unless `MEAP_DEVICE=cpu` asks for the steps on the
processor with a tiny model, which exercises this program and measures nothing.
"""

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {  # the paper's 0.1b, whose checkpoints take 2 GB
    "cuda": "--num-layers 12 --hidden-size 768 --num-attention-heads 12 --ffn-hidden-size 2048 --seq-length 4096 "
    "--max-position-embeddings 4096 --micro-batch-size 8 --global-batch-size 16 --bf16 --cross-entropy-loss-fusion",
    "cpu": "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128 --seq-length 64 "
    "--max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 4 --fp32",
}
COMMON = (
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear --attention-dropout 0 "
    "--hidden-dropout 0 --untie-embeddings-and-output-weights --tokenizer-type NullTokenizer --vocab-size 32000 "
    "--mock-data --num-workers 1 --lr 4e-4 --min-lr 4e-5 --log-interval 4 --eval-iters 0 --meap-mask-ratio 0.15"
)
INSTALLED = """
import importlib.metadata as m, subprocess, sys, torch
print("Python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)
for name in ("megatron-core", "transformer-engine", "apex", "triton", "nvidia-nccl-cu13"):
    try: print(name, m.version(name))
    except m.PackageNotFoundError: print(name, "is not installed")
print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout if torch.cuda.is_available() else "no GPU")
"""
SPEED = """
import sys, time; sys.path.insert(0, "benchmarks")
import gpu, torch
print(f"matrix product: {gpu.matrix_peak() / 1e12:.1f} TFLOP/s in bf16")
size = 2**20 if gpu.on_cpu() else 2**31
a = torch.zeros(size, dtype=torch.uint8, device="cpu" if gpu.on_cpu() else "cuda"); b = a.clone()
for _ in range(3): b.copy_(a)
gpu.synchronize(); start = time.perf_counter()
for _ in range(20): b.copy_(a)
gpu.synchronize()
print(f"bandwidth: {2 * 20 * size / (time.perf_counter() - start) / 1e9:.0f} GB/s (a copy, read and written)")
"""
KILL = """
import os, pathlib, signal, subprocess, sys, time
pointer = pathlib.Path(sys.argv[1], "latest_checkpointed_iteration.txt")
training = subprocess.Popen([sys.executable, *sys.argv[2:]], start_new_session=True)
while training.poll() is None and not pointer.exists(): time.sleep(0.1)
time.sleep(2)
os.killpg(training.pid, signal.SIGKILL)  # with its helper processes
training.wait()
print("killed after the checkpoint of iteration", pointer.read_text())
"""
CENSUS = """
import runpy, sys, torch
if torch.cuda.is_available(): torch.cuda.set_sync_debug_mode("warn")
runpy.run_path("pretrain_gpt_meap.py", run_name="__main__")
"""


@dataclass
class Step:
    """One process and its outcome."""

    name: str
    command: list[str]
    limit_s: int
    status: str = "not run"
    seconds: float = 0.0
    output: str = ""
    """Its last lines."""


def steps(device: str, work: Path) -> Iterator[Step]:
    """All steps, the most important first.

    Args:
        device: `cuda`, or `cpu` to exercise this program.
        work: folder for checkpoints.
    """
    python = [sys.executable]
    flags = [*SHAPE[device].split(), *COMMON.split()]
    train = [*python, "pretrain_gpt_meap.py", *flags]
    often = ["--save-interval", "8", "--meap-keep-last", "1"]
    sixteen = ["--train-iters", "16", *often]
    yield Step("what is installed", [*python, "-c", INSTALLED], 60)
    yield Step("matrix peak and bandwidth", [*python, "-c", SPEED], 90)
    for sizes in (["1.1b"], ["0.1b", "0.3b", "0.5b"]) if device == "cuda" else (["tiny"],):
        speed = [*python, "benchmarks/gpu.py", "--rounds", "4", "--steps", "2", "--sizes", *sizes]
        yield Step(f"speed of {' and '.join(sizes)}, MEAP and NTP", speed, 120 + 60 * len(sizes))
    if device == "cuda" and importlib.util.find_spec("transformer_engine"):
        contenders = ["--contenders", "te", "te-fp8", "te-plain-loss"]
        speed = [*python, "benchmarks/gpu.py", "--rounds", "3", "--steps", "1", "--sizes", "1.1b", *contenders]
        yield Step("speed in fp8, and without the fused loss", speed, 180)
    yield Step("tests/gpu", [*python, "-m", "pytest", "-q", "-ra", "tests/gpu"], 600)
    yield Step("waits for the device, by line", [*python, "-c", CENSUS, *flags, "--train-iters", "3"], 180)
    yield Step("checkpoints", [*train, *sixteen, "--save", str(work / "saved")], 180)
    background = ["--save", str(work / "background"), "--async-save"]
    yield Step("checkpoints in the background", [*train, *sixteen, *background], 180)
    endless = [*train, "--train-iters", "100000", *often, "--save", str(work / "run"), "--load", str(work / "run")]
    yield Step("killed after its first checkpoint", [*python, "-c", KILL, str(work / "run"), *endless[1:]], 180)
    yield Step("resumed after the kill", [*endless, "--exit-interval", "8"], 180)


def run(step: Step, environment: dict[str, str]) -> None:
    """Run it within its limit, and record its status and the end of its output."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            step.command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=step.limit_s, errors="replace",
        )  # fmt: skip
        step.status, output = f"status {done.returncode}", done.stdout
    except subprocess.TimeoutExpired as late:
        output = (late.stdout or b"").decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        step.status = f"cut off after {step.limit_s} s"
    step.seconds = round(time.monotonic() - start, 1)
    step.output = "\n".join(output.strip().splitlines()[-60:])


def write(report: Path, results: list[Step], device: str) -> None:
    """The report of all steps so far, as JSON and as Markdown."""
    report.mkdir(parents=True, exist_ok=True)
    when = f"{datetime.now():%Y-%m-%d %H:%M}"
    body = json.dumps({"device": device, "written": when, "steps": [asdict(each) for each in results]}, indent=1)
    (report / "report.json").write_text(body)
    lines = [f"# What a GPU says ({when})", "", "| step | status | seconds |", "|---|---|---|"]
    if device == "cpu":
        lines[1:1] = ["", "**On the processor**: this exercises the program, and measures nothing."]
    lines += [f"| {each.name} | {each.status} | {each.seconds} |" for each in results]
    for each in results:
        command = shlex.join(word if "\n" not in word else "..." for word in each.command)
        lines += ["", f"## {each.name}", "", f"`{command}`", "", "```text", each.output, "```"]
    (report / "report.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Run all steps, as far as the time allows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path("runs/gpu"), help="folder (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=30, help="for all steps (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="steps whose name holds one of these texts")
    args = parser.parse_args()
    device = "cpu" if os.environ.get("MEAP_DEVICE") == "cpu" else "cuda"
    seen = subprocess.run([sys.executable, "-c", "import torch; exit(not torch.cuda.is_available())"], check=False)
    if device == "cuda" and seen.returncode:
        sys.exit(
            "error: PyTorch sees no GPU here, so nothing was run; MEAP_DEVICE=cpu exercises the steps on the processor"
        )
    deadline = time.monotonic() + 60 * args.minutes
    environment = os.environ | {"MEAP_DEVICE": device, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    work = args.report / "work"
    results = [step for step in steps(device, work) if not args.only or any(it in step.name for it in args.only)]
    for step in results:
        if (left := int(deadline - time.monotonic())) < 10:
            step.status = "not run: no time was left"
            continue
        step.limit_s = min(step.limit_s, left)
        run(step, environment)
        write(args.report, results, device)
        print(f"{step.seconds:7.1f} s  {step.name}: {step.status}", flush=True)
    shutil.rmtree(work, ignore_errors=True)  # checkpoints of gigabytes
    write(args.report, results, device)
    print(f"report: {args.report / 'report.md'}")


if __name__ == "__main__":
    main()
