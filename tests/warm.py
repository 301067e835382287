"""Python programs that start in processes which have imported PyTorch, Megatron and transformers already.

Each import costs seconds and the suite starts a hundred programs. They are forked from one process that has done the
imports and nothing else (`multiprocessing`'s fork server); all else is as if Python had been started with the script.
What is about starting itself (torchrun, signals, an installed package) is tested with real starts.
"""

import atexit
import importlib
import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

REPOSITORY = Path(__file__).resolve().parent.parent

SERVER = multiprocessing.get_context("forkserver")
"""Gives processes that have imported all that; for functions as well as for programs."""
_IMPORTS = "tests.warm_imports"
SERVER.set_forkserver_preload([_IMPORTS])


def _become(command: Sequence[str], environment: Mapping[str, str], cwd: str, outputs: Sequence[str]) -> None:
    """In the new process: what Python does when it is started with a script."""
    for stream, path in zip((sys.stdout, sys.stderr), outputs, strict=True):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, stream.fileno())
        os.close(opened)
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(line_buffering=True)
    importlib.import_module(_IMPORTS)  # done already; where the fork server failed at it without a word, this fails
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    warnings.simplefilter("ignore")
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # the system's default
    sys.argv = list(command)
    sys.path.insert(0, str(Path(command[0]).parent))
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def start(command: Sequence[str], environment: Mapping[str, str], cwd: str | Path, outputs: Sequence[IO[str]]):
    """Start a script with its arguments, its output appended to these files; returns a `multiprocessing` process."""
    names = [each.name for each in outputs]
    process = SERVER.Process(target=_become, args=(list(command), dict(environment), str(cwd), names))
    process.start()
    return process


def run(
    command: Sequence[str], environment: Mapping[str, str], cwd: str | Path = REPOSITORY, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a script with its arguments, as `subprocess.run` would, its output captured."""
    with tempfile.NamedTemporaryFile("r") as stdout, tempfile.NamedTemporaryFile("r") as stderr:
        process = start([str(each) for each in command], environment, cwd, [stdout, stderr])
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(list(command), timeout, stdout.read(), stderr.read())
        return subprocess.CompletedProcess(list(command), process.exitcode, stdout.read(), stderr.read())


def run_ranks(
    ranks: Sequence[Mapping[str, str]], command: Sequence[str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a script in several processes, one for each environment, their output in one; the first to fail ends all."""
    with tempfile.NamedTemporaryFile("r") as output:
        processes = [start(command, environment, REPOSITORY, [output, output]) for environment in ranks]
        deadline = time.monotonic() + timeout
        while any(running := [each for each in processes if each.exitcode is None]):
            if any(each.exitcode for each in processes) or time.monotonic() > deadline:
                for each in running:
                    each.kill()
                    each.join()
            multiprocessing.connection.wait([each.sentinel for each in running], 1)
        status = next((each.exitcode for each in processes if each.exitcode), 0)
        return subprocess.CompletedProcess(list(command), status, output.read())
