"""Megatron's own model in one process on the CPU: the reference of a conversion, and what an import saves.

Importing this module imports Megatron: `device.prepare`, or `cpu.install` on a machine whose GPUs are not to be
used, must have run. The model is built by the same code as in training (`trainer.model`) and its checkpoints
are read and written by Megatron's own `dist_checkpointing`, in a world of one process.
"""

import contextlib
import copy
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, distributed

from megatron_meap.trainer.arguments import LOCAL_LAYERS
from megatron_meap.trainer.model import model_config

# Arguments of a training run that a single process on CPU cannot, or need not, follow.
ALONE: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_layout": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
    "tp_comm_overlap": False,
    "overlap_p2p_comm": False,
    "recompute_granularity": None,
    "fp8": None,
    "fp4": None,
    "cuda_graph_impl": "none",
    "use_cpu_initialization": True,
    "perform_initialization": False,
    **LOCAL_LAYERS,
}


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """A world of one process, with all of Megatron's groups, which ends with the block."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        yield
    finally:
        parallel_state.destroy_model_parallel()
        distributed.destroy_process_group()


def build(args: Namespace, dtype: torch.dtype) -> GPTModel:
    """The model of a run, its weights not yet set, in evaluation mode; within `one_process`.

    Args:
        args: Megatron's arguments, from a command line or a checkpoint.
        dtype: of the weights.
    """
    alone = copy.copy(args)
    vars(alone).update(ALONE)
    alone.params_dtype, alone.bf16, alone.fp16 = dtype, dtype == torch.bfloat16, dtype == torch.float16
    config = model_config(alone)
    builder = config.get_builder_cls()(config)
    return builder.build_model(ProcessGroupCollection.use_mpu_process_groups()).eval()


def load(directory: Path, dtype: torch.dtype) -> tuple[GPTModel, Namespace]:
    """A checkpoint's model, loaded by Megatron, and the checkpoint's arguments; within `one_process`."""
    args = dist_checkpointing.load_common_state_dict(str(directory))["args"]
    model = build(args, dtype)
    loaded = dist_checkpointing.load({"model": _sharded(model)}, str(directory), strict=StrictHandling.RAISE_UNEXPECTED)
    model.load_state_dict(loaded["model"], strict=False)  # not strict: what is missing is extra state, left out above
    return model, args


def save(model: GPTModel, args: Namespace, directory: Path) -> None:
    """Write a checkpoint of only the model, with the hashes of its files; within `one_process`."""
    directory.mkdir()
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 0, "model": model.sharded_state_dict()}
    metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}  # as Megatron's trainer saves
    dist_checkpointing.save(state, str(directory), content_metadata=metadata, verify_integrity=True)


def _sharded(model: GPTModel) -> dict[str, Any]:
    """What to load: the weights, without the extra state of Transformer Engine's modules."""
    return {name: part for name, part in model.sharded_state_dict().items() if not isinstance(part, ShardedObject)}


@torch.inference_mode()
def logits(model: GPTModel, tokens: Tensor) -> Tensor:
    """Logits [b, s, vocabulary] of token ids [b, s]."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model(tokens, positions, None)
