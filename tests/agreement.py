"""Results of a dry run and of the training of command lines: `agreement.py CASES.json [RESULTS.json]`.

Python and Megatron are loaded once; every dry run and every rank of a training is a fork of this process, so that each
has the end, and the exit status, that it has on the command line. Prints the results as JSON.
"""

import json
import logging
import os
import signal
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from megatron_meap.backend import device

device.prepare()

import torch  # noqa: E402
import torch._dynamo.side_effects  # noqa: E402  # what the children would import, each again
from megatron.core.tokenizers.text import text_tokenizer  # noqa: E402, F401

from megatron_meap import errors, pretrain  # noqa: E402
from megatron_meap.inspection import dry_run  # noqa: E402, F401
from megatron_meap.trainer.log_line import LogLine  # noqa: E402
from tests.launch import free_port  # noqa: E402

PATIENCE_S = 300.0


def main() -> None:
    """Judge all cases: `{name: {"flags": [...], "world": 1, "dry": true}}`."""
    cases = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    for name, case in cases.items():
        results[name] = judge(case["flags"], case.get("world", 1), case.get("dry", True))
        if len(sys.argv) > 2:
            Path(sys.argv[2]).write_text(json.dumps(results))
    print("\nresults: " + json.dumps(results))


def judge(flags: list[str], world: int = 1, dry: bool = True) -> dict[str, Any]:
    """The verdict of the dry run, if wanted, and of the training: `[exit status, output]` each."""
    environment = {"WORLD_SIZE": str(world)}
    foretold = {"dry": launch([*flags, "--dry-run"], 1, environment)} if dry else {}
    return foretold | {"run": launch(flags, world, environment)}


def launch(flags: list[str], ranks: int, environment: dict[str, str]) -> tuple[int, str]:
    """Fork the ranks; the status of the first that failed, else 0, and what all of them said."""
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())} | environment
    with tempfile.TemporaryFile("w+") as output:
        children = {
            _fork(flags, {"RANK": str(rank), "LOCAL_RANK": str(rank)} | common, output.fileno())
            for rank in range(ranks)
        }
        status, deadline = 0, time.monotonic() + PATIENCE_S
        while children:
            child, ended = os.waitpid(-1, os.WNOHANG)
            children.discard(child)
            if child and ended and not status:
                status, deadline = os.waitstatus_to_exitcode(ended), time.monotonic() + 4.0
            if not child:
                time.sleep(0.02)
            if time.monotonic() > deadline:
                status = status or -signal.SIGALRM
                for each in children:
                    os.kill(each, signal.SIGKILL)
                deadline += PATIENCE_S
        output.seek(0)
        return status, output.read()


def _fork(flags: list[str], environment: dict[str, str], output: int) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        for name, number in (("stdout", 1), ("stderr", 2)):
            setattr(sys, name, open(number, "w", buffering=1, closefd=False))  # noqa: SIM115  # open until the end
        for handler in logging.root.handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)
        os.environ |= environment
        vars(sys.modules["__main__"]).pop("__file__", None)  # a process that a save starts would load this again
        sys.argv = ["pretrain_gpt_meap.py", *flags]
        seen = LogLine.see
        LogLine.see = lambda self, step: (seen(self, step), _say_weights(step))
        errors.run(pretrain.main)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _say_weights(step: Any) -> None:
    """Values that any difference in data or mathematics affects."""
    digest = 0
    for chunk in step.model:
        for weight in chunk.parameters():
            digest = zlib.crc32(weight.detach().contiguous().view(torch.uint8).numpy(), digest)
    print(f"weights of rank {os.environ['RANK']} after step {step.iteration}: {digest:08x}", flush=True)


if __name__ == "__main__":
    main()
