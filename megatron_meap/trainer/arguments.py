"""The flags that this project adds to Megatron's, the defaults it changes, and their validation."""

import argparse
import functools
import importlib.util
import os
import sys
from argparse import Namespace
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_meap.backend import device
from megatron_meap.checkpoint import model_arguments
from megatron_meap.checkpoint.latest import CheckpointSettings
from megatron_meap.checkpoint.reader import open_checkpoint
from megatron_meap.cluster import hangs, meeting
from megatron_meap.cluster.connections import ConnectionSettings
from megatron_meap.errors import UsageError
from megatron_meap.flags import Settings, add_group, flag, refuse_in_one_line
from megatron_meap.meap import settings as meap
from megatron_meap.meap.settings import MaskSettings
from megatron_meap.sft import flags as sft
from megatron_meap.sft.flags import BadLineSettings, SFTSettings
from megatron_meap.trainer import bad_steps, batch_sizes, blend, ranges, wandb_run, without_effect, writable
from megatron_meap.trainer.data_plan import DataSettings
from megatron_meap.trainer.log_line import LogSettings
from megatron_meap.trainer.official import OfficialSettings
from megatron_meap.trainer.probe import ProbeSettings
from megatron_meap.trainer.refusals import explained
from megatron_meap.trainer.tokenizer import set_tokenizer

LOCAL_LAYERS = {
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "no_persist_layer_norm": True,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
}
"""Megatron's arguments for the local layers (layers.py): PyTorch only, no kernels of Apex or Transformer Engine."""

NEED_TRANSFORMER_ENGINE = {"layernorm", "mla_up_proj", "moe_act"}
"""Modules whose recomputation in Megatron needs a part of Transformer Engine."""

NOT_COMPILED = {"bias_dropout_fusion": False, "bias_swiglu_fusion": False}
"""What `torch.compile` fuses on a GPU; on a CPU nothing does."""


@dataclass(frozen=True)
class RunSettings(Settings):
    """The two flags of a run as a whole."""

    PREFIX: ClassVar[str] = ""

    dry_run: bool = flag(
        False,
        "check everything, show what would run on WORLD_SIZE ranks, and exit: a single process, without a GPU",
        name="--dry-run",
    )
    fp32: bool = flag(
        False,
        "train in 32-bit floats (the default on a GPU, unless --bf16 or --fp16 is given; on a CPU with bf16 matrix "
        "units the default is bf16)",
        name="--fp32",
    )


GROUPS: tuple[tuple[Any, ...], ...] = (
    ("MEAP", "mask-enhanced autoregressive prediction (arXiv 2502.07490)", MaskSettings, ProbeSettings),
    ("MEAP, training as the paper's code", "docs/recipes.md", OfficialSettings),
    ("MEAP fine-tuning", "conversations in JSON lines (docs/finetuning.md)", SFTSettings, BadLineSettings),
    (
        "MEAP, the run",
        "docs/training.md",
        RunSettings,
        DataSettings,
        CheckpointSettings,
        ConnectionSettings,
        LogSettings,
    ),
)
"""This project's flags as `--help` shows them: title, description, and the components that declare them."""


def add_own_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this project's flags."""
    for title, description, *settings in GROUPS:
        add_group(parser, title, description, *settings)


def add_arguments(parser: argparse.ArgumentParser, command_line: list[str] | None = None) -> argparse.ArgumentParser:
    """Add this project's flags to Megatron's parser, and set the defaults for this machine.

    Args:
        parser: Megatron's, which reads the program's own command line.
        command_line: what the parser reads instead.
    """
    add_own_arguments(parser)
    refuse_in_one_line(parser)
    if command_line is not None:
        parser.parse_args = functools.partial(parser.parse_args, command_line)  # type: ignore[assignment]
    parser.set_defaults(
        eval_interval=1000,
        create_attention_mask_in_dataloader=False,  # attention is causal without it
        verify_integrity=True,  # torn and corrupted checkpoints are detected
        dist_ckpt_strictness="log_unexpected",  # checkpoints of the local layers load into Transformer Engine's
        async_strategy="nvrx" if not device.is_cpu() and importlib.util.find_spec("nvidia_resiliency_ext") else "mcore",
        **_local_defaults(command_line),
    )
    return parser


def _local_defaults(command_line: list[str] | None = None) -> dict[str, object]:
    """Defaults with which Megatron runs with what is installed here; the user's flags take precedence."""
    if device.is_cpu():
        defaults: dict[str, object] = {"distributed_backend": "gloo", "use_cpu_initialization": True} | NOT_COMPILED
    elif _uses_transformer_engine(command_line):
        return {}
    else:
        defaults = {}
    return defaults | LOCAL_LAYERS


def _uses_transformer_engine(command_line: list[str] | None = None) -> bool:
    """Whether a run on GPUs does: as its flags say, as the run it resumes, or if it is installed or planned for."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    refuse_in_one_line(parser)
    parser.add_argument("--transformer-impl")
    parser.add_argument("--load")
    parser.add_argument("--ckpt-step", type=int)
    parser.add_argument("--finetune", action="store_true")
    given = parser.parse_known_args(command_line)[0]
    if given.transformer_impl is not None:
        return given.transformer_impl != "local"
    installed = device.plans_for_gpu() or importlib.util.find_spec("transformer_engine") is not None
    if installed and given.load is not None and not given.finetune and _has_local_layers(given.load, given.ckpt_step):
        if os.environ.get("RANK", "0") == "0":
            print("layers: local, as in the checkpoint; --transformer-impl transformer_engine changes them", flush=True)
        return False
    return installed


def _has_local_layers(load: str, step: int | None) -> bool:
    """Whether the resumed run had them; false if there is none, or its checkpoint cannot be read."""
    try:
        checkpoint = open_checkpoint(load, step)
    except UsageError:
        return False
    return checkpoint.directory.name != "release" and getattr(checkpoint.args, "transformer_impl", None) == "local"


def parse_arguments(**changes: object) -> Namespace:
    """Parse, validate and complete the command line, and set Megatron's global variables from it.

    Args:
        changes: arguments to set differently.

    Raises:
        UsageError: a flag, or a combination of flags, cannot be used; the message says which and why.
    """
    from megatron.training import global_vars

    args = parse_flags()
    writable.check(args)
    vars(args).update(changes)
    check(args)
    project, args.wandb_project = args.wandb_project, None  # begun once nothing is left to be refused: wandb_run.begin
    with explained(args):
        global_vars.set_global_variables(args, build_tokenizer=False)
    args.wandb_project = project
    global_vars._GLOBAL_TOKENIZER = set_tokenizer(args)
    return args


def parse_flags(command_line: list[str] | None = None) -> Namespace:
    """Parse a command line, by default the program's own; checked only for flags without effect and numbers."""
    from megatron.training.arguments import parse_args
    from megatron.training.checkpointing import load_args_from_checkpoint

    if any(word.partition("=")[0] == "--yaml-cfg" for word in command_line or sys.argv):
        raise UsageError("--yaml-cfg: cannot contain this project's flags; give flags, or a file of them as @FILE")
    meeting.check_environment()
    parsers = []

    def all_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parsers.append(add_arguments(parser, command_line))
        return parser

    with explained(Namespace()):
        args = parse_args(all_arguments)
    given = without_effect.changed(parsers[0], args)
    without_effect.refuse_unread(given)
    ranges.check(given, args)
    _choose_precision(args)
    if args.use_checkpoint_args:  # these replace the given ones and what those need
        for source in ("pretrained_checkpoint", "load"):
            found = load_args_from_checkpoint(args, load_arg=source)
            if isinstance(found, tuple):  # else there is no checkpoint
                model_arguments.take_over(found[1], args)
    else:
        without_effect.refuse_unaccompanied(given, args)
    return args


def check(args: Namespace) -> None:
    """Check the flags by our rules and by Megatron's, which also completes them.

    Raises:
        UsageError: as `parse_arguments`.
    """
    from megatron.training.arguments import validate_args

    _require_the_models_shape(args)
    batch_sizes.settle(args)
    _validate_meap(args)
    _refuse_what_this_device_cannot(args)
    _refuse_rounded_gradients(args)
    args.use_persistent_ckpt_worker |= args.async_save  # without it Megatron saves in the foreground after all
    args.verify_integrity &= args.ckpt_format == "torch_dist"  # Megatron records hashes for no other format
    args.tokenizer_type = args.tokenizer_type or "GPT2BPETokenizer"
    args.create_attention_mask_in_dataloader |= args.reset_attention_mask  # then it is more than the causal one
    with explained(args):
        validate_args(args)
    ranges.check_heads(args)
    if args.full_validation:  # its sampler gives every data-parallel rank one sample at a time
        args.eval_micro_batch_size, args.eval_global_batch_size = 1, args.data_parallel_size
    batch_sizes.check_phases(args)
    batch_sizes.check_interleaved(args)
    meap.check_batches(args)
    DataSettings.of(args).check(args)


def _require_the_models_shape(args: Namespace) -> None:
    """Name all missing flags that every run needs at once: Megatron asserts them one by one, without their names."""
    needed = ["hidden_size", "num_attention_heads", "seq_length", "max_position_embeddings", "micro_batch_size"]
    needed += [] if args.hybrid_layer_pattern else ["num_layers"]
    if missing := [f"--{name.replace('_', '-')}" for name in needed if getattr(args, name) is None]:
        raise UsageError(f"{', '.join(missing)}: missing; every run needs this; README.md shows a whole command")
    if args.save and args.save_interval is None:
        raise UsageError("--save-interval: missing; --save needs it: the number of steps between checkpoints")


def _choose_precision(args: Namespace) -> None:
    """By default bf16 on a CPU that has the units for it; otherwise what the flags say."""
    if args.fp32 and (args.bf16 or args.fp16):
        raise UsageError("--fp32: contradicts --bf16 and --fp16; give one of them")
    if device.is_cpu() and not (args.fp32 or args.bf16 or args.fp16):
        from megatron_meap.backend.cpu import has_bf16_units

        args.bf16 = has_bf16_units()


def _validate_meap(args: Namespace) -> None:
    """Check this project's flags, by themselves and against Megatron's."""
    ConnectionSettings.of(args).check()
    meap.complete(args)
    sft.validate(args)
    CheckpointSettings.of(args).check(args)
    wandb_run.check(args)
    ProbeSettings.of(args).check(args)
    LogSettings.of(args).check()
    bad_steps.check(args)
    hangs.check(args)
    OfficialSettings.of(args).check(args)
    if args.sft:
        raise UsageError("--sft: Megatron's own fine-tuning data is not supported here; use --meap-sft")
    if args.lazy_mpu_init:
        raise UsageError("--lazy-mpu-init: this trainer makes the process groups itself; drop it")
    if args.config_logger_dir:
        raise UsageError("--config-logger-dir: megatron-core 0.19 fails to copy what it logs; drop it (see train.log)")
    if args.fake_process_group:
        raise UsageError("--fake-process-group: ranks would not communicate; --dry-run looks at a job in one process")
    if args.position_embedding_type == "mrope":
        raise UsageError("--position-embedding-type mrope: its positions are for images; use rope")
    _check_full_validation(args)
    blend.check(args)
    if args.dataloader_inter_document_masking and args.pipeline_model_parallel_size > 1 and args.micro_batch_size != 1:
        raise UsageError(
            f"--micro-batch-size {args.micro_batch_size}: Megatron passes packed documents between pipeline stages "
            "only with --micro-batch-size 1 (--meap-sft, or --dataloader-inter-document-masking, with "
            "--pipeline-model-parallel-size)"
        )


def _check_full_validation(args: Namespace) -> None:
    """Refuse flags with which Megatron cannot evaluate whole validation sets, or several of them."""
    if args.full_validation != args.multiple_validation_sets:
        given, other = "--full-validation", "--multiple-validation-sets"
        if args.multiple_validation_sets:
            given, other = other, given
        raise UsageError(f"{given}: megatron-core 0.19 fails without {other}; add it")
    if not args.full_validation:
        return
    for name in ("eval_micro_batch_size", "eval_global_batch_size"):
        if getattr(args, name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')}: Megatron reads whole validation sets (--full-validation) one sample a "
                "rank at a time; drop the flag"
            )


def _refuse_what_this_device_cannot(args: Namespace) -> None:
    """Refuse what cannot work on a CPU, or with the local layers, before it fails deep inside Megatron."""
    if device.is_cpu():
        from megatron_meap.backend.cpu import unsupported

        for flag, reason in unsupported(args):
            look = " (to look at such a run: MEAP_DEVICE=cuda)" if args.dry_run else ""
            raise UsageError(f"{flag}: cannot work on a CPU: {reason}; drop it, or train on a GPU{look}")
    elif not device.plans_for_gpu() and importlib.util.find_spec("pynvml") is None:
        for name in ("log_straggler", "log_device_memory_used"):
            if getattr(args, name):
                raise UsageError(f"--{name.replace('_', '-')}: needs the package nvidia-ml-py; install it, or drop it")
    if args.context_parallel_size > 1 and args.transformer_impl == "local":
        raise UsageError(
            f"--context-parallel-size {args.context_parallel_size}: needs Transformer Engine, whose attention reaches "
            "beyond a rank's part of the sequence; install it (docs/cluster.md), or use tensor parallelism"
        )
    if args.transformer_impl != "local":
        return
    if modules := NEED_TRANSFORMER_ENGINE.intersection(args.recompute_modules or ()):
        raise UsageError(f"--recompute-modules {' '.join(sorted(modules))}: needs Transformer Engine; name others")
    if not args.dataloader_inter_document_masking:
        return
    asked = {
        "--mtp-num-layers": args.mtp_num_layers,
        "--multi-latent-attention": args.multi_latent_attention,
        f"--softmax-type {args.softmax_type}": args.softmax_type != "vanilla",
        "--apply-query-key-layer-scaling": args.apply_query_key_layer_scaling,
    }
    for flag_given in (name for name, value in asked.items() if value):
        raise UsageError(
            f"{flag_given}: its local layers cannot keep documents apart (--meap-sft, "
            "--dataloader-inter-document-masking); needs Transformer Engine"
        )


def _refuse_rounded_gradients(args: Namespace) -> None:
    """Refuse Megatron's fused cross-entropy where it silently rounds gradients; on a CPU it is replaced."""
    native = args.cross_entropy_loss_fusion and args.cross_entropy_fusion_impl == "native"
    if native and not args.bf16 and not device.is_cpu():
        raise UsageError(
            "--cross-entropy-loss-fusion: Megatron's native one rounds the gradient of the logits to bf16; train with "
            "--bf16, or drop it"
        )
