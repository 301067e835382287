"""From a Hugging Face directory to a Megatron checkpoint that any layout can load, with the mask token added.

Megatron's own model is built in one process, filled weight by weight, and saved by Megatron: memory holds the model in
the dtype of the checkpoint and one weight, and up to half the model again while Megatron saves.

New rows of the embedding and of the head (the mask token and the padding of the vocabulary) are the mean of the
tokens' rows plus normal noise of a hundredth of their standard deviation, column by column, from a fixed seed: a new
token starts as an average one, and no two are equal.
"""

import contextlib
import io
import math
import shlex
from argparse import Namespace
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_meap.checkpoint import latest
from megatron_meap.errors import UsageError
from megatron_meap.huggingface.architecture import Architecture, megatron_flags
from megatron_meap.huggingface.export import DTYPES
from megatron_meap.huggingface.generation_config import keep
from megatron_meap.huggingface.mapping import EMBEDDING, Weight, all_weights
from megatron_meap.huggingface.memory import PeakMemory
from megatron_meap.huggingface.output import new_directory
from megatron_meap.huggingface.selfcheck import compare, same_ids
from megatron_meap.huggingface.source import HuggingFaceWeights, read_directory
from megatron_meap.tokenization.huggingface import add_mask_token, load_directory, plain_ids, save_tokenizer

NOISE = 0.01  # of the rows' standard deviation
LARGEST_PADDING = 1024  # more rows than this are not padding, and are reported
FLAGS_FILE = "megatron_flags.txt"


@dataclass(frozen=True)
class ImportJob:
    """What to import, and how."""

    load: str
    """Hugging Face directory."""
    output: str
    mask_token: str = "[MASK]"
    dtype: str | None = None
    """A key of `export.DTYPES`; as stored if not given."""
    tokenizer: str | None = None
    """Directory of a tokenizer to use instead of the model's own."""
    divisible_by: int = 128
    """The vocabulary is padded to a multiple of this."""
    seed: int = 1234
    overwrite: bool = False
    check: bool = True


def import_model(job: ImportJob) -> None:
    """Write the Megatron checkpoint, check it, and only then give it its name.

    Raises:
        UsageError: the model, its tokenizer or the output directory cannot be used, or the check failed.
    """
    memory = PeakMemory()
    folder, output = Path(job.load), Path(job.output)
    source = read_directory(folder)
    tokenizer, tokens = _tokenizer(job, source.model)
    dtype = DTYPES[job.dtype] if job.dtype else source.dtype()
    size = dtype.itemsize * sum(math.prod(source.described(name)[0]) for name in source.places)
    with new_directory(output, source=folder, overwrite=job.overwrite, mark=FLAGS_FILE, needed=size) as directory:
        save_tokenizer(tokenizer, directory / "tokenizer", source.model.max_positions)
        keep(folder, directory / "tokenizer")
        flags = _model_flags(source.model, directory / "tokenizer", job)
        args = _megatron_args(flags, dtype)
        args.tokenizer_model = str(output.resolve() / "tokenizer")
        release = directory / "release"
        _convert(source, args, dtype, tokens, job.seed, release)
        (directory / latest.POINTER).write_text("release")
        line = _write_flags(directory, flags, args)
        print(f"wrote {size / 1e6:,.1f} MB in {dtype}; {memory}", flush=True)
        if job.check:
            _check(job, source, directory, dtype, tokens)
    print(f"{output}: imported{'' if job.check else ', not checked (--no-check)'}. Train it with\n", flush=True)
    print(f"  pretrain_gpt_meap.py --pretrained-checkpoint {shlex.quote(str(output))} {line}")


def _tokenizer(job: ImportJob, model: Architecture) -> tuple[Any, int]:
    """The tokenizer with the mask token, and the number of tokens it had before."""
    folder = Path(job.tokenizer or job.load)
    tokenizer = load_directory(folder)
    tokens = min(len(tokenizer), model.vocabulary)
    spare, beyond = model.vocabulary - tokens, len(tokenizer) - tokens
    added = [index for index in tokenizer.added_tokens_decoder if index >= model.vocabulary]
    if beyond > len(added) or (spare >= LARGEST_PADDING and job.tokenizer is not None):
        raise UsageError(
            f"{folder}: its tokenizer has {len(tokenizer)} tokens, the weights have {model.vocabulary} rows: "
            "it is not the tokenizer of this model"
        )
    if spare >= LARGEST_PADDING:
        print(f"note: the last {spare} rows of the embedding belong to no token; they are left out", flush=True)
    if beyond:
        names = ", ".join(str(tokenizer.added_tokens_decoder[index]) for index in added[:3])
        print(f"note: {beyond} tokens ({names}) have no row in the weights; they get new ones", flush=True)
    known = tokenizer.get_vocab().get(job.mask_token)
    if known is not None and known not in tokenizer.all_special_ids:
        raise UsageError(
            f"--mask-token {job.mask_token}: is an ordinary token of this tokenizer (id {known}), so text can produce "
            "it; name one that the tokenizer does not have"
        )
    add_mask_token(tokenizer, job.mask_token)
    return tokenizer, tokens


def _model_flags(model: Architecture, tokenizer: Path, job: ImportJob) -> list[str]:
    """Flags of the model, its tokenizer and its mask token."""
    flags = megatron_flags(model)
    flags += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)]
    flags += ["--make-vocab-size-divisible-by", str(job.divisible_by)]
    if job.mask_token != "[MASK]":
        flags += ["--meap-mask-token", job.mask_token]
    return flags


def _megatron_args(flags: list[str], dtype: torch.dtype) -> Namespace:
    """The arguments that a training run with these flags would save."""
    from megatron_meap.backend import megatron_patches
    from megatron_meap.tokenization.fingerprint import ids_fingerprint, tokenizer_fingerprint
    from megatron_meap.trainer import arguments
    from megatron_meap.trainer.tokenizer import set_tokenizer

    megatron_patches.apply()
    length = flags[flags.index("--max-position-embeddings") + 1]
    run = ["--seq-length", length, "--micro-batch-size", "1", "--train-iters", "1"]
    precision = "--bf16" if dtype == torch.bfloat16 else "--fp32"
    with contextlib.redirect_stdout(io.StringIO()):
        args = arguments.parse_flags([*flags, *run, precision])
        arguments.check(args)
        args.meap_tokenizer_ids = ids_fingerprint(set_tokenizer(args))
    args.meap_tokenizer_sha256 = tokenizer_fingerprint(args)
    return args


def _convert(
    source: HuggingFaceWeights, args: Namespace, dtype: torch.dtype, tokens: int, seed: int, release: Path
) -> None:
    """Build Megatron's model, fill it and save it."""
    from megatron_meap.huggingface import megatron_model

    with megatron_model.one_process():
        model = megatron_model.build(args, dtype)
        fill(dict(model.named_parameters()), source, args.padded_vocab_size, tokens, seed)
        megatron_model.save(model, args, release)


def fill(parameters: dict[str, Tensor], source: HuggingFaceWeights, rows: int, tokens: int, seed: int) -> None:
    """Set the parameters of a Megatron model.

    Args:
        parameters: by Megatron's names in the local layer spec.
        source: where the weights come from.
        rows: of Megatron's embedding, padding included.
        tokens: rows of the source's embedding that are tokens.
        seed: for the new rows.
    """
    model = source.model
    linear = model.output_bias or model.mlp_bias
    complete = replace(model, qkv_bias=model.qkv_bias or linear, output_bias=linear, mlp_bias=linear)
    weights = {local_name(layer, weight): (layer, weight) for layer, weight in all_weights(complete)}
    assert weights.keys() == parameters.keys(), sorted(parameters.keys() ^ weights.keys())
    seeds = {EMBEDDING: seed, "output_layer.weight": seed + 2}
    with torch.no_grad():
        for name, (layer, weight) in weights.items():
            value = source.fused(layer, weight)
            parameters[name].copy_(new_rows(value[:tokens], rows, seeds[name]) if name in seeds else value)


def local_name(layer: int | None, weight: Weight) -> str:
    """Name of a parameter in the local layer spec, whose norms and experts are modules of their own."""
    if layer is None:
        return weight.megatron
    for number in weight.expert:
        return f"decoder.layers.{layer}." + weight.megatron.replace("experts.linear", f"local_experts.{number}.linear")
    name = weight.megatron.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
    name = name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
    return f"decoder.layers.{layer}.{name}"


def new_rows(rows: Tensor, count: int, seed: int) -> Tensor:
    """Rows [tokens, hidden] followed by new ones up to `count`: their mean plus a little noise."""
    values = rows.float()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count - len(rows), rows.shape[1], generator=generator)
    added = values.mean(dim=0) + NOISE * values.std(dim=0) * noise
    return torch.cat([rows, added.to(rows.dtype)])


def _write_flags(directory: Path, flags: list[str], args: Namespace) -> str:
    """Write the flags for training to a file, and return them as one line."""
    final = [args.tokenizer_model if flag == str(directory / "tokenizer") else flag for flag in flags]
    line = shlex.join([*final, "--padded-vocab-size", str(args.padded_vocab_size)])
    (directory / FLAGS_FILE).write_text(line + "\n")
    return line


def _check(job: ImportJob, source: HuggingFaceWeights, directory: Path, dtype: torch.dtype, tokens: int) -> None:
    """Compare the checkpoint with the directory that it was made from."""
    original, carried = load_directory(Path(job.tokenizer or job.load)), load_directory(directory / "tokenizer")
    same_ids(carried, partial(plain_ids, original), original.decode, str(directory / "tokenizer"))
    print(f"self-check: the tokenizer round-trips; {carried.mask_token} is id {carried.mask_token_id}", flush=True)
    compare(source.folder, directory / "release", dtype, tokens)
