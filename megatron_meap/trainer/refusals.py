"""Megatron's refusals in one line: its assertions are about flags, but name its own variables."""

import contextlib
import io
import re
import traceback
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import megatron.core
import torch

from megatron_meap.errors import UsageError, one_line
from megatron_meap.files import is_disk_full

_UNCLEAR = (TypeError, LookupError, ArithmeticError, AttributeError, StopIteration)
"""Errors whose messages are about Python, not about flags."""

_FAILURES = (OSError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError, torch.distributed.DistError)
"""Failures of the machine: memory, a disk, a device, a connection."""

_PROCESSES = ("/torch/utils/data/", "/torch/_utils.py", "/multiprocessing/")
"""Code that reports the failure of another process, such as a data loader's worker."""

_OTHER_NAMES = {"num_moe_experts": "num_experts", "layernorm_epsilon": "norm_epsilon", "params_dtype": "bf16"}
_NOT_FLAGS = {"world_size": "WORLD_SIZE", "data_parallel_size": "data-parallel ranks", "rank": "rank"}
_ABOUT = {
    "middle layers": "--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers, --num-layers",
    "Number of decoder layers": "--pipeline-model-parallel-layout",
    "moe_layer_pattern": "--moe-layer-freq",
    "hf_config_dict": "--heterogeneous-layers-config-path",
    "iteration-based": "--train-iters with lengths in samples: --train-samples, --lr-*-samples",
    "sample-based": "--train-samples with lengths in steps: --train-iters, --lr-*-iters",
    "multi latent attention": "--multi-latent-attention, --group-query-attention",
}
"""Words of a refusal, and the flags that they are about, if Megatron's variable names do not show them."""

_NAME = re.compile(r"(?<![-\w.])(?:(?:self|config|args)\.([a-z]\w*)|([a-z][a-z0-9]*(?:_[a-z0-9]+)+))(?![-\w(])")
_MEGATRON = str(Path(megatron.core.__file__).parents[1])


@contextlib.contextmanager
def explained(args: Namespace) -> Iterator[None]:
    """Run a check or a builder of Megatron's; report what it refuses in one line that names flags.

    Raises:
        UsageError: instead of an error that Megatron raised.
    """
    try:
        yield
    except Exception as error:
        refuse(error, args, unnamed=True)
        raise


def refuse(error: BaseException, args: Namespace, unnamed: bool = False) -> None:
    """Raise the one line where an error before the first step is about the flags, or about a file that one names.

    Args:
        error: what was raised.
        args: of the run.
        unnamed: the error may be about any file.

    Raises:
        UsageError: in its place.
    """
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError | PermissionError):
        named = [name for name, value in vars(args).items() if value and str(value) == str(error.filename)]
        if named or unnamed:
            flag = "".join(f"--{name.replace('_', '-')} " for name in named[:1])
            raise UsageError(f"{flag}{error.filename}: {error.strerror}") from error
    if is_refusal(error):
        raise refusal(error, args) from error


def is_refusal(error: BaseException) -> bool:
    """Whether an error before the first step is about the flags: it began in Megatron, or in PyTorch called from there.

    Not in our code, and not for want of memory, disk, a device or a connection.
    """
    if not isinstance(error, Exception) or isinstance(error, _FAILURES):
        return False
    if is_disk_full(error) or "allocate memory" in str(error):
        return False
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    ours = [place for place, name in enumerate(files) if f"{Path(__file__).parents[1]}/" in name]
    by_megatron = any(name.startswith(_MEGATRON) for name in files[ours[-1] + 1 if ours else 0 :])
    return by_megatron and not any(place in files[-1] for place in _PROCESSES)


def refusal(error: BaseException, args: Namespace) -> UsageError:
    """The message in one line, with the place in the code if the words do not make clear what failed."""
    said = one_line(error, most=1000) if str(error).strip() else ""
    is_unclear = not said or isinstance(error, _UNCLEAR)
    if is_unclear:
        said = _source_line(error) + (f" ({said})" if said else "")
    about = "; ".join(flags for words, flags in _ABOUT.items() if words in said)
    said = _with_flags(said, args)
    if "--" not in said and not about:
        about = ", ".join(_spelled_out(said, args) or _files_read(error, args))
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = ""
    if is_unclear or not last.filename.startswith(_MEGATRON):
        place = f" (at {last.filename.rpartition('site-packages/')[2]}:{last.lineno})"
    return UsageError(f"Megatron refuses these flags: {said}{f' ({about})' if about else ''}{place}")


def _spelled_out(said: str, args: Namespace) -> list[str]:
    """Flags whose names a message spells as words: `number of experts`."""
    words = re.sub(r"[^a-z0-9]+", "_", said.lower().replace("number of", "num"))
    names = [name for name in vars(args) if name.count("_") and name not in _NOT_FLAGS and f"_{name}_" in f"_{words}_"]
    return [f"--{name.replace('_', '-')}" for name in names if not name.startswith("meap_")]


def _files_read(error: BaseException, args: Namespace) -> list[str]:
    """Flags that name a file, which the code was reading where the error was raised; or that are JSON themselves."""
    if given := [name for name, value in vars(args).items() if value and value == getattr(error, "doc", None)]:
        return [f"--{name.replace('_', '-')}" for name in given]
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    values = [value for frame in frames for value in frame.f_locals.values() if isinstance(value, str | io.IOBase)]
    read = {str(getattr(value, "name", value)) for value in values}
    files = {name: value for name, value in vars(args).items() if isinstance(value, str) and value in read}
    return [f"--{name.replace('_', '-')} {path}" for name, path in files.items() if Path(path).is_file()]


def _source_line(error: BaseException) -> str:
    """The failed assertion itself, for those without a message."""
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].line or type(error).__name__


def _with_flags(reason: str, args: Namespace) -> str:
    """The message with Megatron's variables replaced by the flags that set them, and their values."""
    seen = set()

    def flag(match: re.Match) -> str:
        name = match[1] or match[2]
        name = _OTHER_NAMES.get(name, name)
        if not hasattr(args, name):
            return match[0]
        said = _NOT_FLAGS.get(name, f"--{name.replace('_', '-')}")
        value = getattr(args, name)
        if name in seen or not isinstance(value, int | float | str):
            return said
        seen.add(name)
        told = isinstance(value, bool) or re.match(rf"[ :=(]+{re.escape(str(value))}\b", reason[match.end() :])
        return said if told else f"{said} {value}"

    return _NAME.sub(flag, reason)
