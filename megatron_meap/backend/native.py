"""The kernels of `kernels.c`, compiled for this processor at its first training, if there is a C compiler.

They are faster than `kernels` in plain PyTorch because they pass over memory once instead of several times, and as
exact. `MEAP_CPU_COMPILE=0` disables them; `CC` names the compiler.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from megatron_meap.errors import one_line

_SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


def suits(x: Tensor) -> bool:
    """Whether the kernels are available for such tensors: bf16 on a CPU, with data (not a fake tensor)."""
    return x.dtype == torch.bfloat16 and type(x) is Tensor and x.device.type == "cpu" and library() is not None


def call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Call a kernel; tensors are contiguous and large enough, integers 64 and floats 32 bits wide."""
    kernel = getattr(library(), name)
    kernel.restype = None
    kernel(*map(_as_c, arguments))


def _as_c(argument: Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p(None if argument is None else argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


def library() -> ctypes.CDLL | None:
    """The compiled kernels; None if they are not available."""
    return _loaded()[0]


def state() -> str:
    """Which kernels compute, in words: they round differently."""
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    name = os.environ.get("CC", "cc")
    if os.environ.get("MEAP_CPU_COMPILE") == "0":
        return None, "PyTorch's kernels (MEAP_CPU_COMPILE=0)"
    if (compiler := shutil.which(name)) is None:
        return None, f"PyTorch's kernels (no C compiler {name!r})"
    try:
        return ctypes.CDLL(str(_built(compiler))), "compiled kernels"
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home directory
        return None, f"PyTorch's kernels ({one_line(error)})"


def _built(compiler: str) -> Path:
    """The library in the user's cache, named by a digest of everything that determines its content."""
    processor = {line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "model"))}
    made_of = [_SOURCE.read_text(), compiler, *_FLAGS, str(Path(compiler).stat().st_mtime), *sorted(processor)]
    name = f"kernels-{hashlib.sha256('\n'.join(made_of).encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "megatron-meap")
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=folder
        ) as own:  # with several ranks, each replaces it with the same content
            made = Path(own, name)
            command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(made), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            made.replace(folder / name)
    return folder / name
