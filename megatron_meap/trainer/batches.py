"""From Megatron's datasets to the batches of one rank: the datasets provider and `get_batch`."""

import copy
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.utils import Split
from megatron.core.parallel_state import get_context_parallel_group, get_hybrid_data_context_parallel_groups
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_tokenizer
from megatron.training.datasets.fim_dataset import GPTFIMDatasetConfig
from megatron.training.utils import is_first_or_last_pipeline_stage

from megatron_meap.cluster import connections, disks
from megatron_meap.errors import UsageError
from megatron_meap.meap.dataset import MaskedInputDataset, noise_of
from megatron_meap.meap.settings import masking_of
from megatron_meap.records import read_json
from megatron_meap.sft import data as sft
from megatron_meap.tokenization.mask_token import special_token_ids
from megatron_meap.trainer import preflight, stages
from megatron_meap.trainer.blend import blends
from megatron_meap.trainer.data_plan import of_the_data, planned
from megatron_meap.trainer.documents import GPTDataset, MockGPTDataset, StatelessFIMDataset, WholeRounds

BATCH_KEYS = [
    "attention_mask",
    "cu_seqlens",
    "cu_seqlens_padded",
    "hybrid_cp_group",
    "labels",
    "local_cp_size",
    "loss_mask",
    "max_seqlen",
    "position_ids",
    "tokens",
]
"""Keys that Megatron's batch helpers expect on the rank that loads the data, None if absent."""


def datasets_provider(num_samples: list[int | None], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Build the train, validation and test datasets that this rank needs, the train inputs masked.

    Args:
        num_samples: number of samples for each split; None means one epoch.
        vp_stage: virtual pipeline stage, as Megatron passes it.

    Returns:
        The three datasets, None on ranks that load no data; validation may be a list of datasets.
    """
    args = get_args()
    num_samples = planned(args, num_samples)
    provide = _conversations if args.meap_sft else _documents
    train, valid, test = provide(args, num_samples, partial(loads_data, vp_stage))
    if args.full_validation:
        ranks = args.data_parallel_size
        sets = valid if isinstance(valid, list) else [valid]
        names = args.validation_set_names
        if names and len(names) != len(sets):
            raise UsageError(f"--validation-set-names {' '.join(names)}: {len(sets)} sets need as many names")
        valid = [None if dataset is None else WholeRounds(dataset, ranks) for dataset in sets]
        if test is not None and args.rank == 0:
            print(
                "note: the test data is not evaluated: megatron-core 0.19 fails there with --full-validation",
                flush=True,
            )
        test = None
    # All connections of the trainer exist by now.
    connections.watch(args.meap_lost_host_seconds, args.distributed_backend)
    return train, valid, test


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # every rank calls it, not TP rank 0 alone


def _documents(args: Namespace, num_samples: list[int | None], loads_here: Callable[[], bool]) -> list[Any]:
    """Megatron's datasets of documents, their inputs masked."""
    if num_samples[0] is not None:
        num_samples = [of_the_data(args, num_samples[0]), *num_samples[1:]]
    build = partial(_build, args, num_samples, dataset_config(args))
    caches = None
    if not args.mock_data:
        alone = partial(build, lambda: True)
        caches = disks.Caches(partial(preflight.cache_directory, args), partial(preflight.data_facts, args), alone)
    disks.prepare(args, loads_here(), caches)
    built = build(loads_here)
    return [
        [_masked(part, split, args) for part in dataset] if isinstance(dataset, list) else _masked(dataset, split, args)
        for dataset, split in zip(built, (Split.train, Split.valid, Split.test), strict=True)
    ]


def _build(args: Namespace, num_samples: list[int | None], config: GPTDatasetConfig, loads_here: Callable) -> list[Any]:
    """The datasets of documents, clean, on the ranks that load them."""
    kind = MockGPTDataset if args.mock_data else StatelessFIMDataset if args.fim_data else GPTDataset
    if args.meap_data_stages is None:
        return BlendedMegatronDatasetBuilder(kind, num_samples, loads_here, config).build()
    assert num_samples[0] is not None
    assert config.blend_per_split is not None
    train = stages.build(kind, stages.read(args), num_samples[0], config, loads_here)
    others = copy.copy(config)
    others.blend_per_split = [None, *config.blend_per_split[1:]]
    return [train, *BlendedMegatronDatasetBuilder(kind, num_samples, loads_here, others).build()[1:]]


def _conversations(args: Namespace, num_samples: list[int | None], loads_here: Callable[[], bool]) -> list[Any]:
    """The datasets of fine-tuning, whose rows are masked already."""
    build = partial(sft.datasets, args, num_samples)
    caches = disks.Caches(partial(sft.cache_directory, args), partial(sft.data_facts, args), build)
    disks.prepare(args, loads_here(), caches)
    return build() if loads_here() else [None, None, None]


def _masked(dataset: Any, split: Split, args: Namespace) -> Any:
    """Wrap a top-level dataset, unless the split stays clean (ratio 0 is Megatron's own pipeline)."""
    if dataset is None or len(dataset) == 0:  # Megatron's data loader fails on a split without samples (--eval-iters 0)
        return None
    masking = masking_of(args, split.name)
    if masking is None:
        return dataset
    return MaskedInputDataset(
        dataset,
        masking,
        split=split,
        mask_token_id=args.meap_mask_token_id,
        vocab_size=args.meap_tokenizer_vocab_size,
        protected_ids=special_token_ids(get_tokenizer()) if args.meap_protect_special_tokens else (),
        first_index=_samples_before_this_phase(args) if split is Split.train else 0,
        copy_weight=args.meap_copy_weight if split is Split.train else None,
    )


def _samples_before_this_phase(args: Namespace) -> int:
    """Samples of the earlier training phases: Megatron restarts the index at every phase transition."""
    passed = [iteration for iteration in args.phase_transition_iterations or () if iteration <= args.iteration]
    return max(passed, default=0) * args.global_batch_size


def dataset_config(args: Namespace) -> GPTDatasetConfig:
    """Megatron's dataset configuration from its flags, as its own `pretrain_gpt.py` fills it."""
    blend, blend_per_split = blends(args)
    sequences_per_dataset = None
    if args.per_dataset_sequences_path is not None:
        named = {prefix: (int, int) for each in (blend, *(blend_per_split or ())) if each for prefix in each[0]}
        sequences_per_dataset = read_json(
            args.per_dataset_sequences_path, named, "make it for all datasets of this run"
        )
    fields: dict[str, Any] = {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "split": args.split,
        "multiple_validation_sets": args.multiple_validation_sets,
        "full_validation": args.full_validation,
        "num_dataset_builder_threads": args.num_dataset_builder_threads,
        "path_to_cache": None if args.mock_data else str(preflight.cache_directory(args)),  # the one that was checked
        "mmap_bin_files": args.mmap_bin_files,
        "tokenizer": get_tokenizer(),
        "reset_position_ids": args.reset_position_ids,
        "reset_attention_mask": args.reset_attention_mask,
        "eod_mask_loss": args.eod_mask_loss,
        "create_attention_mask": args.create_attention_mask_in_dataloader,
        "object_storage_cache_path": args.object_storage_cache_path,
        "mid_level_dataset_surplus": args.mid_level_dataset_surplus,
        "allow_ambiguous_pad_tokens": args.allow_ambiguous_pad_tokens,
        "fast_cache_load": args.dataloader_fast_cache_load,
        "sequences_per_dataset": sequences_per_dataset,
        "defer_npy_index_mmap": args.dataloader_defer_npy_index_mmap,
        "context_parallel_size": args.context_parallel_size,
        "data_parallel_size": args.data_parallel_size,
        "sequence_parallel_size": args.tensor_model_parallel_size * args.sequence_parallel,
        "hybrid_context_parallel": args.hybrid_context_parallel,
        "inter_document_masking": args.dataloader_inter_document_masking,
    }
    if not args.fim_data:
        return GPTDatasetConfig(**fields)
    return GPTFIMDatasetConfig(
        **fields,
        fim_rate=args.fim_rate,
        fim_spm_rate=args.fim_spm_rate,
        fim_split_sample=args.fim_split_sample,
        fim_fragment_rate=args.fim_fragment_rate,
        fim_no_prefix=args.fim_no_prefix,
        fim_extra_tokens={
            "prefix": args.fim_prefix_token,
            "middle": args.fim_middle_token,
            "suffix": args.fim_suffix_token,
            "pad": args.fim_pad_token,
            "eod": args.fim_eod_token,
        },
    )


def loads_data(vp_stage: int | None = None) -> bool:
    """Whether this rank reads the dataset: tensor-parallel rank 0 of the pipeline stages that see a batch."""
    return mpu.get_tensor_model_parallel_rank() == 0 and needs_batch(vp_stage)


def needs_batch(vp_stage: int | None) -> bool:
    """Whether this (virtual) pipeline stage gets a batch.

    The first, the last and those with multi-token prediction do; with packed sequences all, for the document borders.
    """
    args = get_args()
    return is_first_or_last_pipeline_stage(vp_stage) or _has_mtp(args, vp_stage) or has_packed_sequences(args)


def has_packed_sequences(args: Namespace) -> bool:
    """Whether batches carry `cu_seqlens`, which every pipeline stage needs."""
    return args.dataloader_inter_document_masking


def _has_mtp(args: Namespace, vp_stage: int | None) -> bool:
    if args.mtp_num_layers is None:  # avoids building the configuration at every step
        return False
    from megatron.training.arguments import core_transformer_config_from_args

    config = core_transformer_config_from_args(args)
    return mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def get_batch(
    data_iterator: Iterator | None, vp_stage: int | None, *, training: bool, want_noise: bool
) -> dict[str, Any]:
    """The next micro batch on this rank.

    Args:
        data_iterator: yields samples of [b, s] tensors on tensor-parallel rank 0, None elsewhere.
        vp_stage: virtual pipeline stage of the model chunk.
        training: False during evaluation, whose micro batch size may differ.
        want_noise: also return what was done to the inputs; the last pipeline stage needs it for its report.

    Returns:
        The keys of `BATCH_KEYS`, None for tensors that this stage does not need, and `noise`, uint8 [b, s] or None:
        bits `NOISED` and `COPY`; in fine-tuning `NOISED` marks the *labels* that are noised as inputs, because those
        are learned.
    """
    args = get_args()
    if not needs_batch(vp_stage):
        return dict.fromkeys([*BATCH_KEYS, "noise"])
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    noise = None
    if tp_rank == 0:
        assert data_iterator is not None
        loaded = next(data_iterator)
        batch = {key: loaded[key].cuda(non_blocking=True) if key in loaded else None for key in BATCH_KEYS}
        if want_noise:
            noise = noise_of(loaded, args.meap_mask_token_id).cuda(non_blocking=True)
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens=has_packed_sequences(args),
        is_hybrid_cp=args.hybrid_context_parallel,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size if training else args.eval_micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=_has_mtp(args, vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch["noise"] = None
    if want_noise and batch["labels"] is not None:
        batch["noise"] = _same_on_all_tp_ranks(noise, batch["labels"])
    if has_packed_sequences(args):
        batch = flatten_batch_for_packed_sequences(batch)
        if batch["noise"] is not None:
            batch["noise"] = batch["noise"].reshape(1, -1)
    return get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=args.hybrid_context_parallel,
        cp_group=get_context_parallel_group(),
        hybrid_cp_group_func=get_hybrid_data_context_parallel_groups,
        use_per_sequence_balancing=args.dataloader_inter_document_masking,
    )


def _same_on_all_tp_ranks(noise: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
    """What was done to the inputs of the samples, uint8 [b, s], from tensor-parallel rank 0, which loads them.

    Megatron's own helper sends a fixed set of keys. The tokens do not show it: random replacement leaves no mark, and
    the last of several pipeline stages has no tokens.
    """
    if noise is None:
        noise = torch.zeros(labels.shape, dtype=torch.uint8, device=labels.device)
    if mpu.get_tensor_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            noise, mpu.get_tensor_model_parallel_src_rank(), group=mpu.get_tensor_model_parallel_group()
        )
    return noise
