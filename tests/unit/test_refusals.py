"""An error before the first step is called a refusal of flags only if it is one."""

from argparse import Namespace
from pathlib import Path

import megatron.core
import pytest
import torch

from megatron_meap import errors
from megatron_meap.trainer import refusals

IN_MEGATRON = str(Path(megatron.core.__file__).parent / "a_module.py")
IN_THE_LOADER = str(Path(torch.__file__).parent / "utils/data/dataloader.py")


def raised(source: str, *files: str) -> BaseException:
    """The error of a function of the last file, which those before call."""
    space = {"torch": torch, "call": lambda: None}
    for number, file in enumerate(reversed(files)):
        body = "call()" if number else source
        exec(compile(f"def run(call=call):\n    {body}", file, "exec"), space)
        space["call"] = space.pop("run")
    with pytest.raises(BaseException) as found:
        space["call"]()
    return found.value


@pytest.mark.parametrize(
    ("source", "files"),
    [
        ("assert False, 'config.num_layers must be even'", [IN_MEGATRON]),
        ("raise NotImplementedError", [IN_MEGATRON]),
        ("torch.zeros(2, 3) @ torch.zeros(2, 3)", [IN_MEGATRON]),
        ("1 // 0", [IN_MEGATRON]),
        ("[][0]", [IN_MEGATRON]),
        ("import kitchen_sink", [IN_MEGATRON]),
    ],
)
def test_what_is_about_flags(source: str, files: list[str]) -> None:
    assert refusals.is_refusal(raised(source, *files))


@pytest.mark.parametrize(
    ("source", "files"),
    [
        ("torch.empty(2**60, device='cpu')", [IN_MEGATRON]),
        ("raise torch.OutOfMemoryError('CUDA out of memory')", [IN_MEGATRON]),
        ("raise MemoryError", [IN_MEGATRON]),
        ("raise torch.distributed.DistBackendError('NCCL error')", [IN_MEGATRON]),
        ("raise OSError(28, 'No space left on device')", [IN_MEGATRON]),
        ("raise RuntimeError('PytorchStreamWriter failed') from OSError(28, 'No space left on device')", [IN_MEGATRON]),
        ("raise RuntimeError('DataLoader worker (pid 1) is killed')", [IN_MEGATRON, IN_THE_LOADER]),
        ("raise KeyboardInterrupt", [IN_MEGATRON]),
        ("assert False", [refusals.__file__]),
        ("assert False", [IN_MEGATRON, refusals.__file__]),
    ],
)
def test_what_is_not(source: str, files: list[str]) -> None:
    assert not refusals.is_refusal(raised(source, *files))


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("assert False, 'needs num_layers'", "Megatron refuses these flags: needs --num-layers 3"),
        ("{}['num_layers']", f"Megatron refuses these flags: KeyError ('--num-layers 3') (at {IN_MEGATRON}:2)"),
    ],
)
def test_the_place_is_told_where_the_words_do_not(source: str, line: str) -> None:
    """It stands in no file otherwise: a refusal is no bug, whose traceback would be kept."""
    said = str(refusals.refusal(raised(source, IN_MEGATRON), Namespace(num_layers=3)))
    assert said == line.replace(str(Path(megatron.core.__file__).parents[2]) + "/", "")


def test_a_file_that_a_flag_names_is_named(tmp_path: Path) -> None:
    error = raised(f"open('{tmp_path}/absent')", IN_MEGATRON)
    with pytest.raises(errors.UsageError, match=f"^--config-file {tmp_path}/absent: No such file"):
        refusals.refuse(error, Namespace(config_file=f"{tmp_path}/absent"))
    refusals.refuse(error, Namespace(config_file=None))  # a failure: its traceback is wanted


def test_a_flag_that_is_json_is_named() -> None:
    error = raised("__import__('json').loads('{')", IN_MEGATRON)
    assert "(--layers-encoded-json)" in str(refusals.refusal(error, Namespace(layers_encoded_json="{", other="[")))


def test_memory_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise MemoryError("Unable to allocate 2.40 TiB")

    with pytest.raises(SystemExit) as end:
        errors.run(main)
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: out of memory: Unable to allocate 2.40 TiB\n"
