"""Files and directories appear complete or not at all, whatever interrupts their writing."""

import errno
import itertools
import os
import resource
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from megatron_meap.errors import UsageError, one_line, run
from megatron_meap.files import CannotWriteError, whole_directory, whole_file


@pytest.fixture
def earlier(tmp_path: Path) -> dict[str, Path]:
    """What was there before: a file and a directory."""
    (tmp_path / "directory").mkdir()
    for path in (tmp_path / "file", tmp_path / "directory" / "file"):
        path.write_text("earlier")
    return {"file": tmp_path / "file", "directory": tmp_path / "directory"}


def writing(kind: str, path: Path) -> AbstractContextManager:
    return whole_file(path) if kind == "file" else whole_directory(path, overwrite=True)


def full(error: OSError | None = None) -> None:
    raise error or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def wrapped_twice() -> None:
    """As reported by the writers of Megatron and PyTorch."""
    try:
        full()
    except OSError:
        try:
            raise ValueError("a worker failed")
        except ValueError as error:
            raise torch.distributed.checkpoint.CheckpointException("saving failed", {}) from error


def with_numpy() -> None:
    raise OSError("1000 requested and 24 written")


def over_quota() -> None:
    full(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)))


@pytest.mark.parametrize(
    ("kind", "cause"),
    [*itertools.product(["file", "directory"], [full, with_numpy, over_quota]), ("directory", wrapped_twice)],
)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(kind, cause, earlier, tmp_path):
    said = pytest.raises(CannotWriteError, match=f"^{earlier[kind]}: cannot be written: the disk is full")
    with said, writing(kind, earlier[kind]):
        cause()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["directory", "file", "file"]
    assert earlier["file"].read_text() == (earlier["directory"] / "file").read_text() == "earlier"


@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), UsageError("bad line"), ValueError("a bug"), SystemExit(3)])
def test_other_exceptions_pass_and_leave_what_was_there(kind, error, earlier, tmp_path):
    with pytest.raises(type(error)) as caught, writing(kind, earlier[kind]):
        raise error
    assert caught.value is error
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["directory", "file", "file"]
    assert earlier["file"].read_text() == "earlier"


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_complete_ones_replace_the_earlier(kind, earlier, tmp_path):
    old = os.umask(0o027)
    try:
        with writing(kind, earlier[kind]) as begun:
            if kind == "file":
                begun.write(b"new")
            else:
                (begun / "inner").mkdir()
                np.save(begun / "inner" / "a.npy", np.arange(3))
                save_file({"a": np.arange(3)}, begun / "a.safetensors")  # which makes its files private
    finally:
        os.umask(old)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "file"]
    if kind == "file":
        assert earlier["file"].read_text() == "new"
        assert earlier["file"].stat().st_mode & 0o777 == 0o640
    else:
        assert sorted(path.name for path in earlier["directory"].rglob("*")) == ["a.npy", "a.safetensors", "inner"]
        modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "directory").rglob("*")}
        assert modes == {"a.npy": 0o640, "a.safetensors": 0o640, "inner": 0o750}
        assert earlier["directory"].stat().st_mode & 0o777 == 0o750


def test_a_directory_stays_unless_it_may_be_replaced(earlier):
    with pytest.raises(FileExistsError), whole_directory(earlier["directory"]) as begun:
        (begun / "file").write_text("of the slower process")
    assert (earlier["directory"] / "file").read_text() == "earlier"


def test_what_is_needed_is_asked_for_first(tmp_path):
    with pytest.raises(UsageError, match="GB are needed there"), whole_directory(tmp_path / "out", needed=2**60):
        raise AssertionError("begun nevertheless")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_place_that_cannot_be_written(kind, tmp_path):
    (tmp_path / "file").touch()
    said = pytest.raises(CannotWriteError, match="file/x/y: cannot be written: Not a directory")
    with said, writing(kind, tmp_path / "file" / "x" / "y"):
        raise AssertionError("begun nevertheless")


def test_an_error_of_the_system_while_writing(tmp_path):
    """The real thing: what is written does not fit, and the system says so only when the file is closed."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        said = pytest.raises(CannotWriteError, match="cannot be written: File too large")
        with said, whole_file(tmp_path / "x") as file:
            file.write(bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_errors_of_other_files_pass(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"), whole_file(tmp_path / "x"):
        (tmp_path / "missing").read_text()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("two\n lines\tand  more"), "two lines and more"),
        (ValueError(" \n"), "ValueError"),
        (KeyError("x"), "'x'"),
        (ValueError("a" * 300), "a" * 197 + "..."),
    ],
)
def test_one_line(error, said):
    assert one_line(error) == said


def test_one_line_of_an_error_without_words():
    """The code that raised it: a bare assertion of another library says nothing else."""
    with pytest.raises(AssertionError) as caught:
        exec(compile("assert 1 > 2", __file__, "exec"))  # pytest would put words into an assertion of its own
    assert one_line(caught.value).startswith("AssertionError at `")


def test_a_name_breaks_no_line(capsys):
    """POSIX names hold any bytes but `/` and zero; and the line is whole where a worker sends its traceback along."""
    name = "new\nline\r\x1b[2J\u2028" + os.fsdecode(b"\xe9")
    worker = torch._utils.ExceptionWrapper.__new__(torch._utils.ExceptionWrapper)
    worker.exc_type, worker.where = UsageError, "in DataLoader worker process 0"
    worker.exc_msg = f"Traceback (most recent call last):\n  in x\nmegatron_meap.errors.UsageError: {name}: is bad\n"

    def direct():
        raise UsageError(f"{name}: is bad")

    for fail in (direct, worker.reraise):
        with pytest.raises(SystemExit):
            run(fail)
        assert capsys.readouterr().err == "error: new\\nline\\r\\x1b[2J\\u2028\\udce9: is bad\n"
