"""The flags that this project adds to Megatron's, the defaults it changes, and their validation."""

import argparse
import contextlib
import importlib.util
import io
import traceback
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable

from megatron_meap import connections, device, official, retrieval_probe
from megatron_meap.errors import UsageError
from megatron_meap.masking import STRATEGIES, Masking, RatioSchedule
from megatron_meap.sft import flags as sft
from megatron_meap.tokenizer import MASK_TOKEN, resolve_mask_token

MASK_RATIO = 0.15
"""Of the input tokens in pretraining, as in the paper."""

LOCAL_LAYERS = {
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "no_persist_layer_norm": True,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "bias_dropout_fusion": False,
    "bias_swiglu_fusion": False,
}
"""Megatron's arguments for the local layers (layers.py): PyTorch only, no kernels of Apex or Transformer Engine."""


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this project's flags to Megatron's parser, and set the defaults for this machine."""
    group = parser.add_argument_group("MEAP", "mask-enhanced autoregressive prediction (arXiv 2502.07490)")
    group.add_argument(
        "--meap-mask-ratio",
        type=float,
        metavar="P",
        help="share of the input tokens replaced by the mask token, in [0, 1); 0 is next-token prediction, exactly "
        f"Megatron's own pipeline (default: {MASK_RATIO}; with --meap-sft {sft.MASK_RATIO}, of the answer tokens)",
    )
    group.add_argument(
        "--meap-mask-strategy",
        choices=list(STRATEGIES),
        default="random",
        help="random: int(P * sequence length) distinct positions, independent for every sample; official: the "
        "official code's column set of the optimiser step, bit for bit; span: the same count in spans "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--meap-span-length",
        type=int,
        default=3,
        metavar="TOKENS",
        help="length of a span, strategy span only (default: %(default)s)",
    )
    group.add_argument(
        "--meap-mask-token",
        default=MASK_TOKEN,
        metavar="TEXT",
        help="mask token; where the tokenizer has none of this name it becomes the next id, before vocabulary padding "
        "(default: %(default)s)",
    )
    group.add_argument("--meap-mask-seed", type=int, metavar="SEED", help="seed of the masks (default: --seed)")
    group.add_argument(
        "--meap-protect-special-tokens",
        action=BooleanOptionalAction,
        help="never mask EOD, BOS and padding (default: on, except with the strategy official)",
    )
    group.add_argument(
        "--meap-mask-validation",
        action="store_true",
        help="mask the inputs of validation and test as well (default: they are clean)",
    )
    group.add_argument(
        "--meap-mask-warmup-samples",
        type=int,
        default=0,
        metavar="SAMPLES",
        help="raise the ratio linearly from 0 over this many samples (default: %(default)s)",
    )
    group.add_argument(
        "--meap-clean-final-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="mask nothing during this last share of the training samples (default: %(default)s)",
    )
    group.add_argument(
        "--meap-allow-changed-settings",
        action="store_true",
        help="resume from a checkpoint that was trained with other masks (default: refused)",
    )
    group.add_argument(
        "--meap-refuse-damaged-checkpoint",
        action="store_true",
        help="refuse to start where the newest checkpoint is damaged (default: warn and take the newest good one)",
    )
    group.add_argument(
        "--meap-keep-last",
        type=int,
        metavar="N",
        help="keep only the last N checkpoints, and those at multiples of --meap-keep-every (default: keep all)",
    )
    group.add_argument(
        "--meap-keep-every",
        type=int,
        metavar="ITERATIONS",
        help="with --meap-keep-last: keep the checkpoints at multiples of this for good",
    )
    retrieval_probe.add_arguments(group)
    official.add_arguments(group)
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, show what would run on WORLD_SIZE ranks, and end: one process, without a GPU",
    )
    connections.add_arguments(group)
    group.add_argument(
        "--fp32",
        action="store_true",
        help="train in 32-bit floats (a GPU does so without --bf16 or --fp16; on a CPU with bf16 matrix units bf16 is "
        "the default)",
    )
    sft.add_arguments(parser)
    parser.set_defaults(
        eval_interval=1000,
        create_attention_mask_in_dataloader=False,  # attention is causal without it
        verify_integrity=True,  # torn and corrupted checkpoints are detected
        async_strategy="nvrx" if importlib.util.find_spec("nvidia_resiliency_ext") else "mcore",
        **_local_defaults(),
    )
    return parser


def _local_defaults() -> dict[str, object]:
    """Defaults that make Megatron run with what is installed here; the user's own flags still win."""
    if device.is_cpu():
        defaults: dict[str, object] = {"distributed_backend": "gloo", "use_cpu_initialization": True}
    elif _uses_transformer_engine():
        return {}
    else:
        defaults = {}
    return defaults | LOCAL_LAYERS


def _uses_transformer_engine() -> bool:
    """Whether a run on GPUs does: as it asks for, else wherever it is installed, or where the run is only planned."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--transformer-impl")
    asked = parser.parse_known_args()[0].transformer_impl
    if asked is not None:
        return asked != "local"
    return device.plans_for_gpu() or importlib.util.find_spec("transformer_engine") is not None


def parse_arguments(**changes: object) -> Namespace:
    """Parse, validate and complete the command line, and set Megatron's global variables from it.

    Args:
        changes: arguments to set differently.

    Raises:
        UsageError: a flag, or a combination of flags, cannot be used; one line that says which and why.
    """
    from megatron.training.global_vars import set_global_variables

    args = parse_flags()
    vars(args).update(changes)
    check(args)
    _explain(lambda: set_global_variables(args, build_tokenizer=False))
    set_tokenizer(args)
    return args


def parse_flags() -> Namespace:
    """What the command line says, not yet checked."""
    from megatron.training.arguments import parse_args
    from megatron.training.checkpointing import load_args_from_checkpoint

    args = parse_args(add_arguments)
    _choose_precision(args)
    if args.use_checkpoint_args:
        load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
        load_args_from_checkpoint(args)
    return args


def check(args: Namespace) -> None:
    """Check the flags by our rules and by Megatron's, which completes them as well.

    Raises:
        UsageError: as `parse_arguments`.
    """
    from megatron.training.arguments import validate_args

    _require_the_models_shape(args)
    _validate_meap(args)
    _refuse_what_this_device_cannot(args)
    args.use_persistent_ckpt_worker |= args.async_save  # without it Megatron saves in the foreground after all
    args.verify_integrity &= args.ckpt_format == "torch_dist"  # Megatron records hashes for no other format
    args.tokenizer_type = args.tokenizer_type or "GPT2BPETokenizer"
    args.create_attention_mask_in_dataloader |= args.reset_attention_mask  # then it is more than the causal one
    _explain(lambda: validate_args(args))
    _check_warmup(args)


def _require_the_models_shape(args: Namespace) -> None:
    """Name the flags that this run cannot go without, all at once: Megatron asserts them one by one, unnamed."""
    needed = ["hidden_size", "num_attention_heads", "seq_length", "max_position_embeddings", "micro_batch_size"]
    needed += [] if args.hybrid_layer_pattern else ["num_layers"]
    needed += ["save_interval"] if args.save else []
    if missing := [f"--{name.replace('_', '-')}" for name in needed if getattr(args, name) is None]:
        raise UsageError(f"{', '.join(missing)}: missing, and no run goes without; README.md shows a whole command")


def _check_warmup(args: Namespace) -> None:
    """Refuse a warm-up that the schedule has no room for: Megatron would fail when it builds the optimizer."""
    for unit in ("iters", "samples"):
        warmup = getattr(args, f"lr_warmup_{unit}")
        whole = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
        if warmup and whole and warmup >= whole:
            raise UsageError(
                f"--lr-warmup-{unit} {warmup}: must be less than the {whole} {unit} of the schedule "
                f"(--lr-decay-{unit}, else --train-{unit})"
            )


def _explain(validate: Callable[[], None]) -> None:
    """Run a check of Megatron's; say its failed assertion in one line, since those are about flags."""
    try:
        validate()
    except (AssertionError, ValueError, RuntimeError, TypeError) as error:
        said = "" if isinstance(error, TypeError) else " ".join(str(error).split())
        reason = said or _source_line(error)
        raise UsageError(f"Megatron refuses these flags: {reason}") from error


def _source_line(error: BaseException) -> str:
    """The failed assertion itself, for those that Megatron leaves without a message."""
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].line or type(error).__name__


def _choose_precision(args: Namespace) -> None:
    """bf16 by default on a CPU that has the units for it; elsewhere what the flags say."""
    if args.fp32 and (args.bf16 or args.fp16):
        raise UsageError("--fp32: contradicts --bf16 and --fp16; give one of them")
    if device.is_cpu() and not (args.fp32 or args.bf16 or args.fp16):
        from megatron_meap.cpu import has_bf16_units

        args.bf16 = has_bf16_units()


def _validate_meap(args: Namespace) -> None:
    """Check this project's flags, alone and against Megatron's."""
    connections.validate(args)
    if args.meap_mask_ratio is None:
        args.meap_mask_ratio = sft.MASK_RATIO if args.meap_sft else MASK_RATIO
    if not 0.0 <= args.meap_mask_ratio < 1.0:
        raise UsageError(f"--meap-mask-ratio {args.meap_mask_ratio}: must be at least 0 and below 1")
    if args.meap_span_length < 1:
        raise UsageError(f"--meap-span-length {args.meap_span_length}: must be at least 1")
    if args.meap_mask_warmup_samples < 0:
        raise UsageError(f"--meap-mask-warmup-samples {args.meap_mask_warmup_samples}: must not be negative")
    if not 0.0 <= args.meap_clean_final_share <= 1.0:
        raise UsageError(f"--meap-clean-final-share {args.meap_clean_final_share}: must lie between 0 and 1")
    if args.meap_mask_seed is None:
        args.meap_mask_seed = args.seed
    if not 0 <= args.meap_mask_seed < 2**64:
        raise UsageError(f"--meap-mask-seed {args.meap_mask_seed}: must lie between 0 and 2**64 - 1")
    if args.meap_protect_special_tokens is None:
        args.meap_protect_special_tokens = args.meap_mask_strategy != "official"
    if args.sft:
        raise UsageError("--sft: Megatron's own fine-tuning data is not supported here; use --meap-sft")
    if args.full_validation and not args.multiple_validation_sets:
        raise UsageError("--full-validation: megatron-core 0.19 fails without --multiple-validation-sets; add it")
    sft.validate(args)
    if args.dataloader_inter_document_masking and args.pipeline_model_parallel_size > 1 and args.micro_batch_size != 1:
        raise UsageError(
            f"--micro-batch-size {args.micro_batch_size}: Megatron passes packed documents between pipeline stages "
            "only with --micro-batch-size 1 (--meap-sft, or --dataloader-inter-document-masking, with "
            "--pipeline-model-parallel-size)"
        )
    if args.meap_keep_last is not None and args.meap_keep_last < 1:
        raise UsageError(f"--meap-keep-last {args.meap_keep_last}: must be at least 1")
    if args.meap_keep_last is not None and args.save is None:
        raise UsageError("--meap-keep-last: there is no --save whose checkpoints to keep; name one, or drop the flag")
    if args.meap_keep_every is not None and args.meap_keep_last is None:
        raise UsageError("--meap-keep-every: needs --meap-keep-last, without which all checkpoints are kept")
    if args.meap_keep_last is not None and args.save_retain_interval is not None:
        raise UsageError("--meap-keep-last: contradicts --save-retain-interval; use --meap-keep-every instead")
    retrieval_probe.validate(args)
    official.validate(args)
    if args.meap_mask_ratio == 0:
        return
    if args.dataloader_type not in (None, "single"):
        raise UsageError(
            f"--dataloader-type {args.dataloader_type}: repeats sample indices, so every epoch would get the same "
            "masks; use --dataloader-type single, which shuffles and repeats the data itself"
        )
    if args.meap_mask_strategy == "official" and (
        args.rampup_batch_size or args.step_batch_size_schedule or args.decrease_batch_size_if_needed
    ):
        raise UsageError(
            "--meap-mask-strategy official: needs a constant global batch size, because its masks follow the optimiser "
            "step; drop the batch-size schedule, or use --meap-mask-strategy random"
        )


def _refuse_what_this_device_cannot(args: Namespace) -> None:
    """What cannot work on a CPU, or with the local layers: say why, instead of failing deep inside Megatron."""
    if device.is_cpu():
        from megatron_meap.cpu import unsupported

        for flag, reason in unsupported(args):
            raise UsageError(f"{flag}: cannot work on a CPU: {reason}; drop it, or train on a GPU")
    if args.context_parallel_size > 1 and args.transformer_impl == "local":
        raise UsageError(
            f"--context-parallel-size {args.context_parallel_size}: needs Transformer Engine, whose attention reaches "
            "beyond a rank's part of the sequence; install it (pip install -e '.[gpu]'), or use tensor parallelism"
        )


def set_tokenizer(args: Namespace) -> None:
    """Build the tokenizer, find or append the mask token, and pad the vocabulary that holds them both."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer, vocab_size_with_padding
    from megatron.training import global_vars

    padded_by_user = args.padded_vocab_size
    pad_vocab_size, args.pad_vocab_size = args.pad_vocab_size, False  # padding comes after the mask token
    try:
        # sentencepiece and tokenizers write about a bad file to stdout and stderr before they raise
        with contextlib.redirect_stdout(io.StringIO()):
            tokenizer = build_tokenizer(args)
    except Exception as error:
        path = args.tokenizer_model or args.vocab_file or "(no --tokenizer-model given)"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"--tokenizer-model {path}: not a {args.tokenizer_type} tokenizer ({reason})") from error
    args.pad_vocab_size = pad_vocab_size
    mask = resolve_mask_token(tokenizer, args.meap_mask_token)
    needed = max(tokenizer.vocab_size, mask.id + 1)
    if padded_by_user is None:
        args.padded_vocab_size = vocab_size_with_padding(needed, args) if pad_vocab_size else needed
    elif padded_by_user < needed:
        raise UsageError(
            f"the vocabulary has {padded_by_user} rows, but the tokenizer and the mask token {mask.text!r} need "
            f"{needed}; raise --padded-vocab-size, or use the tokenizer the checkpoint was trained with"
        )
    args.meap_mask_token_id = mask.id
    args.meap_tokenizer_vocab_size = tokenizer.vocab_size
    global_vars._GLOBAL_TOKENIZER = tokenizer


def masking_from(args: Namespace, split: str) -> Masking | None:
    """The masking of a split, or None where its inputs stay clean.

    The schedule follows the training samples; masked validation uses the final ratio throughout.
    """
    if args.meap_mask_ratio == 0 or (split != "train" and not args.meap_mask_validation):
        return None
    schedule = RatioSchedule(args.meap_mask_ratio)
    if split == "train":
        total = args.train_samples or args.train_iters * args.global_batch_size
        share = args.meap_clean_final_share
        schedule = RatioSchedule(
            args.meap_mask_ratio, args.meap_mask_warmup_samples, round(total * (1 - share)) if share else None
        )
    return Masking(
        schedule,
        args.meap_mask_strategy,
        args.meap_mask_seed,
        split,
        args.meap_span_length,
        args.global_batch_size if split == "train" else args.eval_global_batch_size,
    )
