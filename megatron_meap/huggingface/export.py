"""From a Megatron checkpoint of any layout to a Hugging Face directory: streaming, in one process."""

import json
import math
import re
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_meap.checkpoint.reader import open_checkpoint
from megatron_meap.errors import UsageError
from megatron_meap.huggingface import card
from megatron_meap.huggingface.generation_config import ending_ids, kept
from megatron_meap.huggingface.mapping import EMBEDDING
from megatron_meap.huggingface.memory import PeakMemory
from megatron_meap.huggingface.output import new_directory
from megatron_meap.huggingface.training_data import trained_tokenizer
from megatron_meap.huggingface.weights import Source, inspect
from megatron_meap.tokenization.huggingface import moved, save_tokenizer
from megatron_meap.trainer import carried

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class ExportJob:
    """What to export, and how."""

    load: str
    """Checkpoint directory, as given to `--save`, or that of one iteration."""
    output: str
    iteration: int | None = None
    """The latest if not given."""
    dtype: str | None = None
    """A key of `DTYPES`; as stored if not given."""
    tokenizer: str | None = None
    """A file or directory to use instead of the checkpoint's own copy, or of the path recorded in it."""
    add_bos: bool | None = None
    """Whether the tokenizer puts BOS before a text; if not given, as the training documents began."""
    max_shard_size: str = "2GB"
    overwrite: bool = False
    check: bool = True


def export(job: ExportJob) -> None:
    """Write the Hugging Face directory, check it, and only then give it its name.

    Raises:
        UsageError: the checkpoint, its tokenizer or the output directory cannot be used, or the check failed.
    """
    shard_bytes = parse_size(job.max_shard_size)
    memory = PeakMemory()
    checkpoint = open_checkpoint(job.load, job.iteration)
    args = moved(carried.arguments_of(checkpoint), job.tokenizer)
    if args is not checkpoint.args and job.tokenizer is None:
        print(f"tokenizer and manifests: the checkpoint's own, in {checkpoint.directory}", flush=True)
    tokenizer = trained_tokenizer(args, job.add_bos)
    source = inspect(checkpoint, tokenizer)
    dtype = DTYPES[job.dtype] if job.dtype else checkpoint.dtype(EMBEDDING)
    source.model.multipliers.check(dtype)
    parameters = sum(math.prod(shape) for _, shape in source.names())
    size = parameters * dtype.itemsize
    output = Path(job.output)
    with new_directory(
        output, source=checkpoint.directory, overwrite=job.overwrite, mark="config.json", needed=size
    ) as directory:
        write_weights(directory, source, dtype, shard_bytes)
        write_json(directory / "config.json", source.config(dtype, tokenizer))
        _write_tokenizer(directory, source, tokenizer, args)
        card.write_card(directory, output.name, source.model, parameters, args, checkpoint.iteration)
        print(f"wrote {parameters:,} weights, {size / 1e6:,.1f} MB in {dtype}; {memory}", flush=True)
        if job.check:
            from megatron_meap.huggingface import selfcheck

            selfcheck.check_export(checkpoint, directory, dtype, args)
    print(f"{output}: exported{'' if job.check else ', not checked (--no-check)'}", flush=True)


def write_weights(directory: Path, source: Source, dtype: torch.dtype, shard_bytes: int) -> None:
    """Write the safetensors files, one at a time, and an index if there are several."""
    plan: list[list[str]] = [[]]
    filled = 0
    for name, shape in source.names():
        size = math.prod(shape) * dtype.itemsize
        if plan[-1] and filled + size > shard_bytes:
            plan.append([])
            filled = 0
        plan[-1].append(name)
        filled += size
    files = [f"model-{i + 1:05d}-of-{len(plan):05d}.safetensors" for i in range(len(plan))]
    if len(plan) == 1:
        files = ["model.safetensors"]
    total = 0
    tensors = source.tensors(dtype)
    for file, names in zip(files, plan, strict=True):
        total += _write_shard(directory / file, tensors, names)
    if len(plan) > 1:
        places = {name: file for file, names in zip(files, plan, strict=True) for name in names}
        write_json(
            directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places}
        )


def _write_shard(path: Path, tensors: Iterator[tuple[str, Tensor]], names: list[str]) -> int:
    """Write the next tensors, which must have these names; returns their bytes."""
    shard = dict(next(tensors) for _ in names)
    assert list(shard) == names
    save_file(shard, path, metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in shard.values())


def _write_tokenizer(directory: Path, source: Source, tokenizer: Any | None, args: Namespace) -> None:
    """Write the tokenizer, or say that there is none, and the generation config."""
    mask_id = getattr(source.checkpoint.args, "meap_mask_token_id", None)
    settings: dict[str, Any] = kept(Path(args.tokenizer_model)) if args.tokenizer_model else {}
    if sampling := [name for name in settings if not name.endswith(("token_id", "suppress_tokens"))]:
        print(f"note: the generation config beside the tokenizer is kept: {', '.join(sampling)}", flush=True)
    if tokenizer is None:
        print("note: trained without a tokenizer (NullTokenizer), so the export has none", flush=True)
    else:
        save_tokenizer(tokenizer, directory, source.model.max_positions)
        mask_id = tokenizer.mask_token_id
        named = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        settings |= {name: value for name, value in named.items() if value is not None}
        if len(ends := ending_ids(args, tokenizer)) > 1:
            settings["eos_token_id"] = ends
    if mask_id is not None:
        settings["suppress_tokens"] = list(dict.fromkeys([*settings.get("suppress_tokens", []), mask_id]))
    write_json(directory / "generation_config.json", settings)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as transformers formats its own."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB`, `500MB` or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"--max-shard-size {text}: expected a size such as 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
