"""Real launches of `pretrain_gpt_meap.py` under torchrun, and the losses they log."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
ENTRY = REPOSITORY / "pretrain_gpt_meap.py"

MODEL = [
    "--num-layers",
    "2",
    "--hidden-size",
    "64",
    "--num-attention-heads",
    "4",
    "--group-query-attention",
    "--num-query-groups",
    "2",
    "--ffn-hidden-size",
    "160",
    "--seq-length",
    "64",
    "--max-position-embeddings",
    "64",
    "--position-embedding-type",
    "rope",
    "--normalization",
    "RMSNorm",
    "--swiglu",
    "--disable-bias-linear",
    "--untie-embeddings-and-output-weights",
    "--attention-dropout",
    "0",
    "--hidden-dropout",
    "0",
]
"""A Llama-style model that a step of takes milliseconds."""

TRAINING = [
    "--fp32",
    "--micro-batch-size",
    "2",
    "--global-batch-size",
    "8",
    "--lr",
    "1e-3",
    "--min-lr",
    "1e-4",
    "--lr-decay-style",
    "cosine",
    "--weight-decay",
    "0.05",
    "--clip-grad",
    "1.0",
    "--train-iters",
    "20",
    "--log-interval",
    "1",
    "--eval-interval",
    "1000",
    "--eval-iters",
    "0",
    "--seed",
    "1234",
]

_STEP = re.compile(r" iteration +(\d+)/ +\d+ \|.*")
_VALUE = re.compile(r"\| ([^|:]+): +([-+.\dEeNnAaIiFf]+) (?=\|)")


@dataclass
class Run:
    """What one training run printed."""

    output: str
    returncode: int = 0
    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    """Logged values by iteration, such as `lm loss` and `grad norm`."""

    def losses(self, name: str = "lm loss") -> list[float]:
        """The logged values of one name, by iteration."""
        return [self.steps[iteration][name] for iteration in sorted(self.steps)]


def parse(output: str, returncode: int = 0) -> Run:
    """Read Megatron's log lines."""
    run = Run(output, returncode)
    for match in _STEP.finditer(output):
        run.steps[int(match[1])] = {name.strip(): float(value) for name, value in _VALUE.findall(match[0])}
    return run


def environment() -> dict[str, str]:
    """The environment of a launch: this checkout first, on CPU, two ranks not fighting for two cores."""
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "MEAP_DEVICE": "cpu", "MEAP_CPU_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}


def torchrun(processes: int, *command: str) -> list[str]:
    """Command line that runs a script under torchrun on this host, on a free port."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *command,
    ]  # fmt: skip


def launch(processes: int, flags: list[str], timeout: float = 300) -> Run:
    """One training run under torchrun."""
    done = subprocess.run(
        torchrun(processes, str(ENTRY), *flags),
        env=environment(), cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout,
    )  # fmt: skip
    return parse(done.stdout, done.returncode)


def launch_many(
    processes: int, runs: dict[str, list[str]], folder: Path, timeout: float = 600, script: str = "run_many.py"
) -> dict[str, Run]:
    """Several training runs one after the other in the same processes: starting Python and Megatron once.

    Args:
        processes: ranks, started without torchrun.
        runs: flags of every run, by a name for it.
        folder: where the list of runs is written.
        script: which reads the list, of this folder.
    """
    listing = folder / "runs.json"
    listing.write_text(json.dumps(runs))
    returncode, output = start_ranks(processes, str(Path(__file__).parent / script), str(listing), timeout=timeout)
    assert returncode == 0, errors(output)
    parts = re.split(r"^=== run (\S+)$", output, flags=re.MULTILINE)
    return {name: parse(output) for name, output in zip(parts[1::2], parts[2::2], strict=True)}


def start_ranks(processes: int, *command: str, timeout: float) -> tuple[int, str]:
    """Run a script in several ranks without torchrun, which takes as long to start as the ranks do.

    Returns:
        The first status that is not 0, and what all ranks have printed. The first to fail ends the others.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    job = environment() | sizes | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with tempfile.TemporaryFile("w+") as output:
        started = {"cwd": REPOSITORY, "stdout": output, "stderr": subprocess.STDOUT}
        environments = [job | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        ranks = [subprocess.Popen([sys.executable, "-u", *command], env=each, **started) for each in environments]
        deadline = time.monotonic() + timeout
        try:
            while (states := [rank.poll() for rank in ranks]) and None in states and not any(states):
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired(ranks[0].args, timeout)
                time.sleep(0.1)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        output.seek(0)
        return next(filter(None, states), 0), output.read()


def errors(output: str) -> str:
    """The part of a failed launch's output that says why: from the first traceback on, without torchrun's own."""
    start = output.find("Traceback")
    return output[max(0, start - 1500) :][:8000] if start >= 0 else output[-4000:]
