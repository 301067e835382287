"""The model that Megatron builds: its configuration, for training, planning and conversion alike."""

import contextlib
import copy
from argparse import Namespace
from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.core.transformer.spec_utils import import_module
from megatron.training import get_args
from megatron.training.argument_utils import (
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.training import get_megatron_ddp_config, get_megatron_optimizer_config

from megatron_meap.backend import device
from megatron_meap.backend.hybrid import local_stack_spec
from megatron_meap.backend.layers import local_block_spec
from megatron_meap.errors import UsageError
from megatron_meap.trainer import official
from megatron_meap.trainer.refusals import explained


def model_config(args: Namespace) -> Any:
    """Configuration of the model that Megatron builds; the only place that knows its class."""
    local = args.transformer_impl == "local" and args.spec is None
    if args.hybrid_layer_pattern:
        config = hybrid_config_from_args(args)
        config.hybrid_stack_spec = local_stack_spec(config) if local else config.hybrid_stack_spec
    else:
        config = gpt_config_from_args(args)
        config.transformer_layer_spec = local_block_spec if local else config.transformer_layer_spec
        config.rope_scaling_factor = args.rope_scaling_factor  # megatron-core 0.19 leaves this flag unused
    official.initialise(config.transformer, args)
    if args.use_cpu_initialization and not device.is_cpu() and not args.use_torch_fsdp2:
        config.pre_wrap_hooks.append(_to_the_gpu)
    return config


def _to_the_gpu(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Unlike its older `get_model`, Megatron's builders leave a model on the CPU that was initialised there."""
    return [chunk.cuda(torch.cuda.current_device()) for chunk in chunks]


def check(args: Namespace) -> None:
    """Refuse what Megatron's configuration of the model and of its training refuses.

    Raises:
        UsageError: names the flags.
    """
    if args.num_experts and args.moe_router_topk > args.num_experts:
        raise UsageError(f"--moe-router-topk {args.moe_router_topk}: more than the {args.num_experts} of --num-experts")
    if args.moe_apply_probs_on_input and args.moe_router_topk != 1:  # Megatron says so in the first step
        raise UsageError("--moe-apply-probs-on-input: works with --moe-router-topk 1 only")
    if args.ddp_average_in_collective and args.calculate_per_token_loss:
        raise UsageError(
            "--ddp-average-in-collective: not possible with --calculate-per-token-loss, which --meap-sft sets; drop it"
        )
    if args.spec is not None:
        _check_spec(args.spec)
    with explained(args):
        if not device.plans_for_gpu():
            pretrain_cfg_container_from_args(copy.copy(args), model_config(copy.copy(args)))
            return
        # What is installed there is unknown, and so no error here; `planning` builds with what is installed here.
        get_megatron_ddp_config(args)
        with contextlib.suppress(RuntimeError):  # no Transformer Engine
            get_megatron_optimizer_config(args)


def _check_spec(words: list[str]) -> None:
    """Refuse a module that cannot be imported: Megatron would build its own layers instead."""
    try:
        found = import_module(words)
    except (KeyError, ValueError):
        found = None
    if found is None:
        raise UsageError(f"--spec {' '.join(words)}: not a module that can be imported with a spec in it; name both")


def embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """Ranks of a pipeline with word embeddings: the first, the last if they are tied, and those with MTP layers."""
    args = get_args()
    ranks = {pp_ranks[0], *get_mtp_ranks(pp_ranks, core_transformer_config_from_args(args))}
    if not args.untie_embeddings_and_output_weights:
        ranks.add(pp_ranks[-1])
    return sorted(ranks)
