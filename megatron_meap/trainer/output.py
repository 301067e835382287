"""The output of a run: to the terminal as long as there is one, and completely to a log file beside the checkpoints."""

import contextlib
import errno
import io
import logging
import os
import re
import sys
import types
from pathlib import Path
from typing import Any, TextIO

LOG = "train.log"
"""Name of the log file, in the directory given to `--save`."""

_CLOSED = (errno.EPIPE, errno.EIO, errno.EBADF)
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_LIBRARIES = ("megatron.", "logging.", "warnings.", "torch.")
_WARNING = re.compile(r"\s*warning\b", re.IGNORECASE)
# Only for the log file, whenever it is printed; a CPU run has no device whose memory could be allocated.
_NO_NEWS = re.compile(
    r"one_logger|RerunStateMachine|could not find the metadata file|rerun_state_machine|Result validation enabled"
    r"|memory \(MB\) \| allocated: 0\.00 |compute_activation_memory|async save is deprecated"
    r"|exiting program after receiving SIGTERM|Overwriting old incomplete|Detected an existing checkpoint"
    r"|prepare_local_plan"
)


class Output:
    """Replaces `sys.stdout` and `sys.stderr`.

    A reader that closes the output (`| head`, `| tee` at a Ctrl-C, a closed terminal) does not end a training, which
    continues without one. Megatron's messages before the first step, and its estimates of memory (`plan_run.py` counts
    it), go only to the log file.
    """

    def __init__(self) -> None:
        self.quiet = True
        """Whether messages of Megatron and PyTorch, except warnings, go only to the log file: until the first step."""

        self.last_of_library = ""
        """The last message of Megatron or PyTorch."""

        self._streams: dict[str, _Stream | None] = {"stdout": None, "stderr": None}
        self._log: int | None = None
        self._failed = False  # to write to it
        self._early: list[bytes] | None = []  # output before there was a log file

    def install(self) -> "Output":
        """Capture everything that is printed or logged from now on."""
        for name in self._streams:
            old = getattr(sys, name)
            self._streams[name] = new = _Stream(old.terminal if isinstance(old, _Stream) else old, self)
            for handler in logging.root.handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                    handler.setStream(new)
            setattr(sys, name, new)
        return self

    def open_log(self, folder: str | None, heading: str | None) -> None:
        """Append to the log file in a folder from now on, beginning with the output so far; None keeps no log.

        The ranks share the file: each appends whole lines.
        """
        early, self._early = self._early or [], None
        if folder is None:
            return
        try:
            self._log = os.open(Path(folder) / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            self._log_fails(error)
        if heading is not None:
            self.record(f"\n{heading}\n")
        for text in early:
            self.record(text)

    def record(self, text: str | bytes) -> None:
        """Write only to the log file."""
        raw = _ESCAPES.sub("", text).encode(errors="replace") if isinstance(text, str) else text
        if self._early is not None:
            self._early.append(raw)
        elif self._log is not None:
            try:
                os.write(self._log, raw)
            except OSError as error:  # such as a full disk
                self._log_fails(error)

    def _log_fails(self, error: OSError) -> None:
        """Report it once: a run must not end because of its log."""
        if not self._failed:
            self._failed = True
            self.say(f"warning: {LOG} in --save lacks lines from here on ({error.strerror}); the training continues")

    def say(self, text: str) -> None:
        """Print what must not be lost: on standard error if standard output has been closed."""
        self.record(text + "\n")
        any(stream is not None and stream.show(text + "\n") for stream in self._streams.values())


class _Stream(io.TextIOBase):
    """One of the two streams: a terminal, pipe or file, until writing to it fails."""

    def __init__(self, terminal: TextIO, output: Output) -> None:
        self.terminal = terminal
        self._output = output
        self._open = True
        self._pending = ""

    def write(self, text: str) -> int:
        lines, newline, self._pending = (self._pending + text).rpartition("\n")
        if newline:
            self._send(lines + newline, sys._getframe(0).f_back)
        return len(text)

    def flush(self) -> None:
        if self._pending:
            text, self._pending = self._pending, ""
            self._send(text, sys._getframe(0).f_back)

    def _send(self, text: str, caller: types.FrameType | None) -> None:
        self._output.record(text)
        module = "" if caller is None else caller.f_globals.get("__name__", "")
        if module.startswith("megatron.training.theoretical_memory_usage"):
            return
        if f"{module}.".startswith(_LIBRARIES):
            self._output.last_of_library = " ".join(text.split()) or self._output.last_of_library
            lines = [line for line in text.splitlines(keepends=True) if not _NO_NEWS.search(line)]
            text = "".join(line for line in lines if not self._output.quiet or _WARNING.match(line))
            text = text if text.strip() else ""
        self.show(text)

    def show(self, text: str) -> bool:
        """Write to the terminal, if it is open; returns whether it still is."""
        if text and self._open:
            try:
                self.terminal.write(text)
                self.terminal.flush()
            except ValueError:  # closed by this process
                self._open = False
            except OSError as error:  # else such as a full disk
                if error.errno in _CLOSED:
                    self._continue_without()
        return self._open

    def _continue_without(self) -> None:
        """Discard what Python at its end, or child processes, still write to the descriptor."""
        self._open = False
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.terminal.fileno())
            os.close(null)
        self._output.say(
            f"warning: the reader of the output went away; the training continues, its log is {LOG} in --save"
        )

    def isatty(self) -> bool:
        return self._open and self.terminal.isatty()

    def fileno(self) -> int:
        return self.terminal.fileno()

    def writable(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.terminal, name)  # `buffer` and the like
