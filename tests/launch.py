"""Real launches of `pretrain_gpt_meap.py`, and the losses they log."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO

from tests import warm as start_warm

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
    """One training run, which may fail; see tests/warm.py."""
    done = start_warm.run_ranks(_environments(processes), [str(ENTRY), *flags], timeout)
    return parse(done.stdout, done.returncode)


def launch_many(
    processes: int,
    runs: dict[str, list[str]],
    folder: Path,
    timeout: float = 600,
    script: str = "run_many.py",
    warm: bool = True,
) -> dict[str, Run]:
    """Several training runs one after the other in the same processes: starting Python and Megatron once.

    Args:
        processes: ranks, started without torchrun.
        runs: flags of every run, by a name for it.
        folder: where the list of runs is written.
        script: which reads the list, of this folder.
        warm: see `run_ranks`.
    """
    listing = folder / "runs.json"
    listing.write_text(json.dumps(runs))
    path = Path(__file__).parent / script
    output = run_ranks(processes, str(path), str(listing), timeout=timeout, warm=warm)
    parts = re.split(r"^=== run (\S+)$", output, flags=re.MULTILINE)
    return {name: parse(output) for name, output in zip(parts[1::2], parts[2::2], strict=True)}


def run_ranks(processes: int, *command: str, timeout: float = 300, warm: bool = True) -> str:
    """Run a script in several ranks on this host, without torchrun; returns what they printed.

    Args:
        processes: ranks.
        command: script and arguments.
        timeout: seconds.
        warm: whether the ranks have imported Megatron already, see tests/warm.py; else torchrun starts them.
    """
    if warm:
        done = start_warm.run_ranks(_environments(processes), command, timeout)
    else:
        done = subprocess.run(
            torchrun(processes, *command),
            env=environment(), cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=timeout,
        )  # fmt: skip
    assert done.returncode == 0, errors(done.stdout)
    return done.stdout


def launch_killed(processes: int, flags: list[str], step: int, timeout: float = 300) -> Run:
    """A training run of which SIGKILL ends every rank after a step, before its checkpoint."""
    command = [str(Path(__file__).parent / "killed.py"), str(step), *flags]
    done = start_warm.run_ranks(_environments(processes), command, timeout)
    assert done.returncode == -signal.SIGKILL, errors(done.stdout)
    run = parse(done.stdout, done.returncode)
    assert run.steps, errors(done.stdout)  # a rank that fails has the others killed as well
    return run


def start_ranks(processes: int, command: list[str], output: IO[str]) -> list[BaseProcess]:
    """Start a script in several ranks, as `run_ranks` does, for a test that does something to them as they run."""
    return [start_warm.start(command, rank, REPOSITORY, [output, output]) for rank in _environments(processes)]


def _environments(processes: int) -> list[dict[str, str]]:
    """Of the ranks of a job, as torchrun would set them."""
    sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    job = environment() | sizes | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [job | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


_held: list[socket.socket] = []


def free_port() -> int:
    """A port of this host that nobody uses, and that the system gives nobody else while this process lives.

    It stays bound here, to an address that may be reused, as PyTorch's servers do.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    _held.append(held)
    return held.getsockname()[1]


def errors(output: str) -> str:
    """The part of a failed launch's output that says why: from the first traceback on, without torchrun's own."""
    start = output.find("Traceback")
    return output[max(0, start - 1500) :][:8000] if start >= 0 else output[-4000:]
