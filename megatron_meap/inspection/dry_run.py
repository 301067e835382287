"""`--dry-run`: check everything that a run would check, show what it would do, and end.

One process checks the whole job: the layout is that of WORLD_SIZE ranks, but nothing is communicated, no weight is
allocated, and nothing is written except the index cache of the data, which the run itself would write.
"""

import contextlib
import io
import logging
import os
from argparse import Namespace
from typing import Any

from megatron.training import get_tokenizer
from megatron.training.datasets.data_samplers import build_pretraining_data_loader
from megatron.training.training import get_train_valid_test_num_samples, update_train_iters

from megatron_meap.backend import device, megatron_patches
from megatron_meap.errors import UsageError
from megatron_meap.huggingface.architecture import not_exported
from megatron_meap.inspection.samples import has_colors, view
from megatron_meap.meap.dataset import NOISED, noise_of
from megatron_meap.meap.settings import MaskSettings
from megatron_meap.planning.memory import count_parameters
from megatron_meap.planning.text import layout_of
from megatron_meap.planning.world import pretended
from megatron_meap.sft import data as sft
from megatron_meap.tokenization.fingerprint import tokenizer_fingerprint
from megatron_meap.trainer import batch_sizes, data_use, log_line, optimizers, preflight
from megatron_meap.trainer.arguments import parse_arguments
from megatron_meap.trainer.batches import datasets_provider
from megatron_meap.trainer.data_plan import run_samples
from megatron_meap.trainer.data_use import amount, tokens_read
from megatron_meap.trainer.refusals import explained


def run() -> None:
    """Show what the command line would run."""
    if os.environ.get("RANK", "0") != "0":
        return  # under torchrun, only one process prints
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
    logging.disable(logging.WARNING)
    megatron_patches.apply()
    with contextlib.redirect_stdout(io.StringIO()) as said:  # Megatron's table of arguments and what it builds
        args = _parse()
        args.meap_tokenizer_sha256 = tokenizer_fingerprint(args)
        checked = preflight.look(args)
        with explained(args):
            total, by_stage = count_parameters(args)
            dataset = _data(args)
    for line in said.getvalue().splitlines():
        if line.startswith("note: "):
            print(line)
    for warning in checked["warnings"]:
        print(f"warning: {warning}")
    for line in (
        *not_exported(args),
        *_model(args, total, by_stage),
        *_schedule(args),
        *_masks(args),
        *_checkpoints(args, checked),
    ):
        print(line)
    if dataset is None:
        raise UsageError("--data-path: names no training data")
    for line in sft.lines(args) if args.meap_sft else ():
        print(line)
    print(f"data          {len(dataset):,} training samples; one of them, noised tokens marked:\n")
    print(
        view(dataset, _sample_to_show(dataset, args), get_tokenizer(), args.meap_mask_token_id).for_terminal(
            has_colors()
        )
    )
    print("dry run: all checks passed, nothing was trained or saved", flush=True)


def _parse() -> Namespace:
    """The checked arguments, without TensorBoard."""
    args = parse_arguments(tensorboard_dir=None)
    args.iteration = 0
    return args


def _data(args: Namespace) -> Any:
    """The training samples; validation samples are built as well, and the first batch of each is read."""
    with pretended(args):
        update_train_iters(args)
        train, valid, _ = datasets_provider(list(get_train_valid_test_num_samples()))
        for dataset in (train, *(valid if isinstance(valid, list) else [valid])):
            if dataset is not None:
                loader = build_pretraining_data_loader(dataset, 0)
                next(iter(loader))
    return train


def _sample_to_show(dataset: Any, args: Namespace) -> int:
    """Index of the first sample with a mask, if one of the first 64 has any: in fine-tuning, not every sample does."""
    indices = range(min(64, len(dataset)))
    return next((i for i in indices if (noise_of(dataset[i], args.meap_mask_token_id) & NOISED).any()), 0)


def _model(args: Namespace, total: int, by_stage: list[int]) -> list[str]:
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    one, more = ("GPU", "GPUs") if device.plans_for_gpu() else ("CPU process", "CPU processes")
    ranks = one if args.world_size == 1 else more
    on_cpu = "device        CPU, because PyTorch cannot use a GPU here; MEAP_DEVICE=cuda makes it a run for GPUs"
    return [
        *([] if device.plans_for_gpu() or "MEAP_DEVICE" in os.environ else [on_cpu]),
        f"model         {total:,} parameters: {args.num_layers} layers, hidden {args.hidden_size}, FFN "
        f"{args.ffn_hidden_size}, {args.num_attention_heads} heads, vocabulary {args.padded_vocab_size}, {precision}",
        f"layout        {layout_of(args)} on {args.world_size} {ranks}; at most {max(by_stage):,} parameters on one",
    ]


def _schedule(args: Namespace) -> list[str]:
    samples = batch_sizes.samples(args)
    validation = (
        f"{args.eval_iters} batch{'es' if args.eval_iters > 1 else ''} every {args.eval_interval} steps"
        if args.eval_iters
        else "none"
    )
    return [
        f"batch         {batch_sizes.describe(args)}",
        f"schedule      {args.train_iters:,} steps, {samples:,} samples, {amount(tokens_read(args))} "
        f"tokens; learning rate {args.lr} to {args.min_lr}, {args.lr_decay_style}",
        f"optimizer     {optimizers.words(args)}",
        *data_use.lines(args),
        *log_line.lines(args),
        f"validation    {validation}",
    ]


def _masks(args: Namespace) -> list[str]:
    settings = MaskSettings.of(args)
    what = "input tokens"
    if args.meap_sft:
        what = f"tokens of a copy of each answer of more than {args.meap_sft_threshold} tokens"
    seed = f", seed {args.meap_mask_seed}" if settings.ratio > 0 else ""
    lines = [f"objective     {settings.expanded()}", f"masks         {settings.words(what)}{seed}"]
    if settings.copy_weight is not None:
        samples = run_samples(args)
        lines.append(
            f"copies        half of the samples and tokens above: {samples // 2:,} samples of the data, each followed "
            f"by its copy; a global batch is {args.global_batch_size // 2} of the data, and its loss is that of "
            f"the clean ones + {settings.copy_weight:g} x that of the copies"
        )
    return lines


def _checkpoints(args: Namespace, checked: dict[str, Any]) -> list[str]:
    start = f"starts from {checked['start']}" if checked["start"] else "starts anew"
    saves = f"saves every {args.save_interval} steps to {args.save}" if args.save else "saves nothing (no --save)"
    return [f"checkpoint    {start}; {saves}"]
