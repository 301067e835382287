"""What counts as a second request to stop, and which processes end when a rank is killed."""

import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing import SignalException, api

from megatron_meap.cluster import signals, torchrun
from megatron_meap.cluster.run_files import Requests
from megatron_meap.errors import LAST_STATUS, UsageError
from megatron_meap.trainer import run
from megatron_meap.trainer.output import Output
from tests.launch import environment
from tests.processes import ended

LATE = signals._SAME_REQUEST_S + 50
START_ONE_OF_EACH_KIND = """
import multiprocessing, time
from megatron_meap.backend import helpers
helpers.end_with_this_process()
for kind in ("fork", "spawn", "forkserver"):
    process = multiprocessing.get_context(kind).Process(target=time.sleep, args=(60,), daemon=True)
    process.start()
    print(process.pid, flush=True)
time.sleep(60)
"""


class Ended(Exception):
    """In place of the end of the process."""


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> signals.StopRequest:
    """A rank of torchrun, here both in one process; a signal that ends it raises `Ended`."""

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setenv(LAST_STATUS, str(tmp_path / "status"))
    monkeypatch.setattr(api, "_terminate_process_handler", api._terminate_process_handler)
    monkeypatch.setattr(signals.os, "_exit", end)
    torchrun._mark_signals()
    request = signals.StopRequest(Requests(None))
    request._stepped = True
    return request


def launcher_gets(number: int) -> None:
    with pytest.raises(SignalException):
        api._terminate_process_handler(number, None)


def at(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals.time, "monotonic", lambda: 1000 + seconds)


def test_what_torchrun_sends_on_late_is_no_second_request(rank: signals.StopRequest, monkeypatch) -> None:
    """Ctrl-C reaches the rank from the terminal, and on a busy machine much later from torchrun."""
    at(0, monkeypatch)
    rank._note(signal.SIGINT)
    at(LATE, monkeypatch)
    launcher_gets(signal.SIGINT)
    rank._note(signal.SIGINT)
    with pytest.raises(Ended, match=str(128 + signal.SIGINT)):
        rank._note(signal.SIGINT)


def test_a_second_request_of_a_person_ends_it(rank: signals.StopRequest, monkeypatch) -> None:
    """Sent to the rank alone, unknown to torchrun; or to torchrun, which it ends and which then ends the rank."""
    at(0, monkeypatch)
    rank._note(signal.SIGTERM)
    rank._note(signal.SIGTERM)  # the same one, by another way
    at(LATE, monkeypatch)
    with pytest.raises(Ended):
        rank._note(signal.SIGTERM)
    launcher_gets(signal.SIGTERM)
    monkeypatch.setattr(signals.os, "getppid", lambda: 1)
    with pytest.raises(Ended):
        rank._note(signal.SIGTERM)


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_before_the_first_step_a_rank_ends_at_once(number: int, rank: signals.StopRequest, capsys, tmp_path) -> None:
    """Otherwise it would wait minutes for another rank that has already ended."""
    rank._stepped = False
    with pytest.raises(Ended, match=str(signals.EXIT_STOPPED)):
        rank._note(number)
    assert capsys.readouterr().out.startswith(f"stopped by {signal.Signals(number).name} before the end of the first")
    assert (tmp_path / "status").read_text() == str(signals.EXIT_STOPPED)


def test_a_rank_without_torchrun(rank: signals.StopRequest, monkeypatch) -> None:
    monkeypatch.delenv(LAST_STATUS)
    at(0, monkeypatch)
    rank._note(signal.SIGTERM)
    at(LATE, monkeypatch)
    with pytest.raises(Ended):
        rank._note(signal.SIGTERM)


def test_how_megatrons_end_is_told(rank: signals.StopRequest, monkeypatch) -> None:
    """An end without an error is one before the first step; later it has a cause, or is one that was asked for."""
    output, said = Output(), []
    monkeypatch.setattr(output, "say", said.append)
    output.last_of_library = "could not load the checkpoint"
    args = Namespace(
        rank=0, save=None, iteration=4, ckpt_convert_format=None, exit_duration_in_mins=None, train_iters=9
    )

    def end(code: int | None) -> int | str | None:
        with pytest.raises(SystemExit) as left:
            run._leave(args, SystemExit(code), rank, output)
        return left.value.code

    with pytest.raises(UsageError, match="before the first step: could not load the checkpoint"):
        end(None)
    assert end(3) == 3
    args.ckpt_convert_format = "torch"
    assert end(None) is None  # converted, and done
    args.curr_iteration, args.ckpt_convert_format = 6, None
    assert end(None) is None
    args.exit_duration_in_mins, args.exit_interval = 1, None
    assert end(0) == signals.EXIT_STOPPED
    assert said == ["stopped by --exit-duration-in-mins 1 after iteration 7: nothing saved: no --save"]
    args.exit_interval = 7
    assert end(0) == 0


def test_helpers_end_with_a_killed_rank() -> None:
    """Those that multiprocessing forks, spawns, or lets a server fork."""
    command = [sys.executable, "-c", START_ONE_OF_EACH_KIND]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        helpers = [int(rank.stdout.readline()) for _ in range(3)]
        assert not ended(helpers, 0)
        os.kill(rank.pid, signal.SIGKILL)
    assert ended(helpers, 20)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_the_shell_closed(closed: str, tmp_path: Path) -> None:
    """What a command prints goes nowhere, and above all not into the next file, which would have their number."""
    lines = ["print('said', flush=True)", "os.write(1, b'said')", "os.write(2, b'said')"]
    body = ["with open('file', 'w') as file:", *(f" {line}" for line in lines), " file.write(sys.stdin.read(4))"]
    body += [" sys.stderr.isatty()"]
    code = "\n ".join(["import os, sys\nfrom megatron_meap import errors\ndef main():", *body])
    shell = ["bash", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, f"{code}\nerrors.run(main)"]
    ended_as = subprocess.run(shell, cwd=tmp_path, env=environment(), input="", capture_output=True, text=True)
    assert (ended_as.returncode, (tmp_path / "file").read_text()) == (0, ""), ended_as.stderr
    assert "Traceback" not in ended_as.stderr


def test_names_that_are_not_utf8_are_printed() -> None:
    run_it = "from megatron_meap import errors\ndef main():\n print('l\\udce9')\nerrors.run(main)"
    ended_as = subprocess.run([sys.executable, "-c", run_it], capture_output=True, text=True, env=environment())
    assert (ended_as.returncode, ended_as.stdout) == (0, "l\\udce9\n"), ended_as.stderr


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("line", ["print('a line')", "pass"])
def test_output_that_cannot_be_written_is_one_line(buffered: bool, line: str) -> None:
    """A full disk behind `> log`, while a command prints or at its end; another error is told as it is."""
    run_it = f"from megatron_meap import errors\ndef main():\n print('begun')\n {line}\nerrors.run(main)"
    with open("/dev/full", "w") as full:
        command = [sys.executable, *([] if buffered else ["-u"]), "-c", run_it]
        ended_as = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment())
    assert ended_as.returncode == 1
    assert ended_as.stderr.startswith("error: standard output cannot be written: ")
    assert ended_as.stderr.count("\n") == 1
    other = run_it.replace(line, "raise OSError(28, 'elsewhere')")
    failed = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, env=environment())
    assert "elsewhere" in failed.stderr
    assert "standard output" not in failed.stderr
