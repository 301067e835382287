"""A save in the background writes the state at its beginning; if one waits for another, this is reported."""

import multiprocessing
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_meap.backend import device, helpers

device.prepare()

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, PersistentAsyncCaller  # noqa: E402
from megatron.training import async_utils  # noqa: E402

from megatron_meap.checkpoint.copies import Copies  # noqa: E402
from megatron_meap.errors import UsageError  # noqa: E402

SIZES = [(), (0, 3), (7,), (300, 200), (40000,)]


def request_of(tensors: list[torch.Tensor], written: list) -> AsyncRequest:
    """Megatron's request to write some tensors; the writing puts what it is given into `written`."""
    bucket = ("file", "name", (["object"], list(enumerate(tensors))))
    return AsyncRequest(lambda rank, buckets, results: written.extend(buckets), (3, [bucket], "queue"), [], {}, "stage")


def test_the_training_changes_nothing_of_what_is_written() -> None:
    """Twice, into the same memory; every tensor with a storage of its own, for PyTorch writes whole ones."""
    written: list[Any] = []
    for dtype in (torch.float32, torch.float32, torch.bfloat16):
        tensors = [torch.randn(size).to(dtype) for size in SIZES]
        before = [tensor.clone() for tensor in tensors]
        request = Copies(lambda state, folder, given=tensors: request_of(given, written))({}, "iter_0000002")
        parameters = [torch.nn.Parameter(tensor) for tensor in tensors]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD(parameters, lr=1.0).step()
        assert not torch.equal(tensors[-1], before[-1])
        assert request.preload_fn is None
        request.async_fn(*request.async_fn_args)
        path, name, (objects, copies) = written.pop()
        assert (path, name, objects) == ("file", "name", ["object"])
        for (number, copy), expected in zip(copies, before, strict=True):
            assert torch.equal(copy, expected), number
            assert copy.dtype == dtype
            assert copy.untyped_storage().nbytes() == expected.nbytes


def test_megatron_copies_from_a_gpu_itself() -> None:
    """What is there; the rest, as a state that is offloaded, is copied."""
    there, here = torch.empty(5, device="meta"), torch.ones(5)
    request = request_of([there, here], [])
    assert Copies(lambda state, folder: request)({}, "iter_0000002") is request
    [(_, _, (_, [(_, first), (_, second)]))] = request.async_fn_args[1]
    assert first is there
    assert torch.equal(second, here)
    assert second.data_ptr() != here.data_ptr()
    assert Copies(lambda state, folder: None)({}, "iter_0000002") is None  # in the foreground


def test_a_save_says_that_it_waits_for_the_one_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    done: list[bool] = []
    queue = SimpleNamespace(maybe_finalize_async_calls=lambda blocking: done.append(blocking))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(async_utils, "_get_async_calls_queue", lambda: queue)
    monkeypatch.setattr(async_utils, "is_empty_async_queue", lambda: not saved or bool(done))
    saved: list[str] = []
    save = Copies(lambda state, folder: saved.append(folder))
    save({}, "run/iter_0000002")
    assert capsys.readouterr().out == ""
    save({}, "run/iter_0000004")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "the save of iter_0000002 is still running; waiting (save less often, or to a faster disk)"
    assert said[1].startswith("waited ")
    assert done == [True]
    assert saved == ["run/iter_0000002", "run/iter_0000004"]


CONTEXT = multiprocessing.get_context("fork")


@pytest.mark.parametrize("blocking", [False, True])
def test_a_killed_saving_process_ends_the_training(blocking: bool) -> None:
    """Megatron's own wait for it has no end; nor has that for its orders to be read, at the end of the program."""
    training = CONTEXT.Process(target=train_beside_a_killed_one, args=(blocking,))
    training.start()
    training.join(60)
    training.kill()
    training.join()
    assert training.exitcode == 0


def train_beside_a_killed_one(blocking: bool) -> None:
    """In a process for it, since how that ends is what is tested."""
    helpers.notice_a_killed_one()
    PersistentAsyncCaller._persistent_comp_q = CONTEXT.Queue()
    PersistentAsyncCaller._persistent_queue = CONTEXT.JoinableQueue()
    PersistentAsyncCaller._persistent_queue.put(bytes(2**20))  # more than a pipe takes
    caller = PersistentAsyncCaller()
    caller.process = CONTEXT.Process(target=time.sleep, args=(600,))
    caller.process.start()
    caller.process.kill()
    caller.process.join()
    with pytest.raises(UsageError, match=r"the process that saves has ended with status -9"):
        caller.is_current_async_call_done(blocking=blocking)
    caller.process = None  # its destructor would wait for it
