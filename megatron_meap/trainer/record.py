"""One record of what determines a run: written into every checkpoint, and compared before anything is loaded.

`describe` creates it, `differences` compares two. If an entry differs, a run is refused, warned or goes on: the tables
here say which (docs/training.md shows them).
"""

import argparse
import fnmatch
import functools
import re
from argparse import Namespace
from collections.abc import Iterator
from enum import Enum
from importlib import metadata
from typing import Any

import megatron_meap
from megatron_meap.backend import device, native
from megatron_meap.checkpoint import model_arguments
from megatron_meap.meap.settings import MaskSettings
from megatron_meap.sft.flags import SFTSettings
from megatron_meap.tokenization.mask_token import special_id
from megatron_meap.trainer.data_plan import run_samples
from megatron_meap.trainer.data_record import data_record
from megatron_meap.trainer.official import OfficialSettings

ALLOW = "--meap-allow-changed-settings"


class Verdict(Enum):
    """What happens to a run with a setting that differs from its checkpoint's."""

    REFUSED = f"refused, unless {ALLOW}"
    WARNED = "warning"
    FREE = "free"


SAMPLES = (
    "seed",
    "seq_length",
    "split",
    "dataloader_type",
    "eod_mask_loss",
    "reset_position_ids",
    "reset_attention_mask",
    "dataloader_inter_document_masking",
    "mock_data",
    "phase_transition_iterations",
    "fim_*",
)
"""Megatron's settings that determine what a sample is and which of its labels count: refused."""

TRAINED = ("optimizer", "mtp_num_layers", "mtp_loss_scaling_factor", "moe_z_loss_coeff", "mup_*", "qk_clip*", "spec")
"""Settings of what is learned and how, besides all of `MODEL_GROUPS`: refused."""

BESIDE_THE_SCHEDULE = ("lr_warmup_init", "lr_wsd_*", "decoupled_*", "freeze_all_layers")
"""Settings of learning rates that are not in the schedule's state, which is compared separately: a warning."""

BEGINS = ("--*-dropout", "--moe-*")
"""Entries that are compared when a run starts from the weights of another: how the same model is trained."""

MODEL_GROUPS = ("network size", "moe", "mla", "experimental_attention_variant", "heterogeneous architecture")
WARNED_GROUPS = (
    "transformer configuration",
    "regularization",
    "training",
    "mixed precision",
    "RNG and initialization",
    "Transformer-Engine",
    "experimental",
    "data and dataloader",
)
"""Groups of Megatron's flags; those in neither do not matter: where and how a run is logged, saved, laid out."""

FREE = (
    # the layout, and how fast and in what memory the same is computed
    "*parallel*", "tp_comm_*", "*overlap*", "*recompute*", "*fusion*", "*fused*", "*cuda_graph*", "*offload*",
    "inference_*", "*deepep*", "*hybridep*", "*ncclep*", "moe_permute*", "moe_*grouped*", "use_grouped_*",
    "moe_token_dispatcher_type", "moe_flex_*", "moe_paged_*", "moe_per_layer_logging", "*_embedding_wgrad*", "wgrad_*",
    "use_ring_exchange_p2p", "*_comm_stream", "microbatch_*", "*_pipeline_split", "distribute_saved_activations",
    "symmetric_ar_type", "nccl_*", "flash_*", "use_te_*", "use_transformer_engine_op_fuser", "no_persist_layer_norm",
    "clone_scatter_*", "mlp_chunks_*", "config_logger_dir", "cpu_*", "min_offloaded_*", "*_pp_ranks", "use_flash_attn",
    "deterministic_mode", "micro_batch_size", "checkpoint_activations", "pin_*", "use_torch_optimizer_for_cpu_offload",
    "fsdp_*", "megatron_fsdp_*", "enable_experimental", "delay_*", "mtp_standalone", "yaml_cfg",
    "create_attention_mask_in_dataloader",
    # how a run starts and ends, and what checks it
    "perform_initialization", "use_cpu_initialization", "init_*", "embedding_init_*", "data_parallel_random_init",
    "*_rng_tracker", "exit_*", "manual_gc*", "empty_unused_*", "check_*", "gpu_sniff_*", "train_sync_interval",
    "result_rejected_*", "dump_*", "perform_rl_step",
    # how the data is read, and where it lies
    "*data_path", "*data_args_path", "per_dataset_sequences_path", "dataloader_fast*", "dataloader_defer*",
    "data_cache_path", "mmap_bin_files", "num_workers", "num_dataset_builder_threads", "object_storage_*",
    "mid_level_*", "encoder_seq_length", "decoder_seq_length", "encoder_num_layers", "decoder_num_layers",
    "max_position_embeddings", "make_vocab_size_divisible_by",
    # compared by other means: the layers, the schedule, the length of training
    "transformer_impl", "is_hybrid_model", "hybrid_*_pattern", "group_query_attention", "train_iters", "train_samples",
    "weight_decay", "batch_size", "init_model_with_meta_device", "bf16", "fp16",
)  # fmt: skip
"""Patterns of settings that may change without a message."""


def describe(args: Namespace, tokenizer: Any = None) -> dict[str, Any]:
    """The record: what determines the run that these arguments describe, under the names that people know, as JSON.

    Args:
        args: parsed and checked; or those of a checkpoint older than the record, for which it is incomplete.
        tokenizer: the run's; its special tokens are recorded.
    """
    found: dict[str, Any] = {}
    for kind in (MaskSettings, SFTSettings, OfficialSettings):
        found |= kind.deciding(args)
    for name, (flag, _) in _megatrons_flags().items():
        if hasattr(args, name) and _verdict_of(name) is not Verdict.FREE:
            found[flag] = _plain(getattr(args, name))
    if hasattr(args, "padded_vocab_size"):
        found[PADDING] = args.padded_vocab_size
    found["precision"] = next((name for name in ("bf16", "fp16") if getattr(args, name, False)), "fp32")
    if tokenizer is not None:  # a run, not an old checkpoint
        found |= {f"the tokenizer's {name} (its id)": special_id(tokenizer, name) for name in ("eod", "bos", "pad")}
        found |= data_record(args)
        found |= {name: metadata.version(name) for name in ("megatron-core", "torch")}
        found |= {
            "megatron-meap": megatron_meap.__version__,
            "--meap-mask-validation": args.meap_mask_validation,
            "the samples of training": run_samples(args),
        }
        if device.is_cpu() and args.bf16:
            found[KERNELS] = native.state().partition(" (")[0]
        if "muon" in args.optimizer and args.muon_tp_mode == "blockwise":
            found[BLOCKS] = args.tensor_model_parallel_size
    return found


def record_of(args: Namespace) -> dict[str, Any]:
    """The record of a run or a checkpoint; for a checkpoint without one, what its arguments say."""
    return getattr(args, "meap_record", None) or describe(args)


def verdict(entry: str, args: Namespace) -> Verdict:
    """What happens to the run of these arguments if this entry of the record differs."""
    if entry in _NAMED:
        return _NAMED[entry]
    if entry == "--global-batch-size":
        official = getattr(args, "meap_mask_strategy", None) == "official"
        return Verdict.REFUSED if official else Verdict.WARNED
    if entry == "the samples of training":
        return Verdict.REFUSED if args.meap_clean_final_share and args.meap_mask_ratio else Verdict.FREE
    by_flag = {flag: name for name, (flag, _) in _megatrons_flags().items()}
    return _verdict_of(by_flag[entry]) if entry in by_flag else Verdict.REFUSED


def differences(saved: Namespace, args: Namespace, among: tuple[str, ...] = ("*",)) -> Iterator[tuple[Verdict, str]]:
    """Differences between a checkpoint's arguments and a run's, a phrase each, without free entries.

    Args:
        saved: the checkpoint's.
        args: the run's.
        among: patterns of the entries that are compared.

    An entry that one of them lacks is not compared: that one is older than the flag. The settings of the noise count as
    not given if they are missing, because without the flag there was no such noise.
    """
    there, here = record_of(saved), record_of(args)
    if "--meap-mask-ratio" in there:  # a run of ours
        there = {MaskSettings.flag_of(name): getattr(MaskSettings, name) for name in _LATER} | there
    for entry in here:
        if entry not in there or there[entry] == here[entry] or not _matches(entry, among):
            continue
        outcome = verdict(entry, args)
        if outcome is not Verdict.FREE:
            yield outcome, f"{entry} {_short(there[entry])} there, {_short(here[entry])} here"


_LATER = (
    "mask_ratio_min",
    "random_share",
    "kept_share",
    "noised_share",
    "copy_weight",
    "mask_warmup_shape",
    "mask_weights_sha256",
)
"""Settings of the noise that the first checkpoints lack."""

PADDING = "rows of the padded vocabulary"
"""Rows without a token are part of the softmax; their number may depend on the layout."""

BLOCKS = "the parts of each matrix that Muon takes by themselves (--muon-tp-mode blockwise)"
"""They are the parts of the tensor-parallel ranks, so that the layout determines what is learned."""

KERNELS = "on the CPU"
"""Which kernels compute there: they round differently."""

_NAMED = {
    KERNELS: Verdict.WARNED,
    PADDING: Verdict.WARNED,
    BLOCKS: Verdict.WARNED,
    "precision": Verdict.WARNED,
    "megatron-core": Verdict.WARNED,
    "megatron-meap": Verdict.WARNED,
    "torch": Verdict.WARNED,
    "--meap-mask-validation": Verdict.WARNED,
    "the validation data (digests)": Verdict.WARNED,
}


@functools.cache
def _megatrons_flags() -> dict[str, tuple[str, str]]:
    """Megatron's flags and their groups, by the name of the argument."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
    return {
        action.dest: (action.option_strings[0], group.title or "")
        for group in parser._action_groups
        for action in group._group_actions
        if action.option_strings
    }


def _verdict_of(name: str) -> Verdict:
    """The verdict on an argument of Megatron's, by the tables."""
    group = _megatrons_flags()[name][1]
    if _matches(name, (*SAMPLES, *TRAINED)):
        return Verdict.REFUSED
    if _matches(name, BESIDE_THE_SCHEDULE):
        return Verdict.WARNED
    if name in (*model_arguments.SHAPE, *model_arguments.FUNCTION) or _matches(name, FREE):
        return Verdict.FREE
    if group in MODEL_GROUPS:
        return Verdict.REFUSED
    return Verdict.WARNED if group in WARNED_GROUPS else Verdict.FREE


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return _compiled(patterns).match(name) is not None


@functools.cache
def _compiled(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(fnmatch.translate, patterns)))


def _plain(value: Any) -> Any:
    """The value as it is read back from JSON."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _short(value: Any) -> str:
    return (", ".join(map(str, value)) if isinstance(value, list) else str(value)) or "none"
