"""Models with experts instead of feed-forward layers: which parts of Megatron's routing can be converted.

Every token goes to the k experts with the highest logits. Their weights are the softmax over these k, which is the
softmax over all experts rescaled to sum to 1 (Mixtral, Qwen3-MoE with `norm_topk_prob`), or the softmax over all
without rescaling (`--moe-router-pre-softmax`).
"""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron_meap.huggingface.families import Extras

Obstacles = list[tuple[Any, str]]
"""Pairs of a condition that prevents the conversion, and what it is."""


def from_megatron(args: Namespace) -> dict[str, Any]:
    """The extras of a run's model."""
    if not getattr(args, "num_experts", None):
        return {}
    return {
        "experts": args.num_experts,
        "chosen": args.moe_router_topk,
        "softmax_over_all": args.moe_router_pre_softmax,
        "balance": args.moe_aux_loss_coeff,
    }


def flags(model: Extras, ffn: int) -> dict[str, Any]:
    """Megatron's, with their values; `ffn` is the width of an expert."""
    return {
        "--moe-ffn-hidden-size": ffn,
        "--num-experts": model.experts,
        "--moe-router-topk": model.chosen,
        "--moe-router-load-balancing-type": "aux_loss",
        "--moe-aux-loss-coeff": model.balance,
    }


def not_exported(get: Callable[[str], Any]) -> Obstacles:
    """What no model class with experts supports, by the arguments of a run."""
    if not get("num_experts"):
        return []
    balancing, score = get("moe_router_load_balancing_type"), get("moe_router_score_function")
    return [
        (get("moe_layer_freq") not in (1, [1] * get("num_layers")), "experts in some layers only (--moe-layer-freq)"),
        (get("add_bias_linear"), "biases of experts (no --disable-bias-linear)"),
        (get("use_mup"), "muP with experts (--use-mup)"),
        (get("moe_shared_expert_intermediate_size"), "shared experts (--moe-shared-expert-intermediate-size)"),
        (get("moe_latent_size"), "--moe-latent-size"),
        (score != "softmax", f"--moe-router-score-function {score}"),
        (get("moe_router_enable_expert_bias"), "--moe-router-enable-expert-bias"),
        (get("moe_router_topk_scaling_factor"), "--moe-router-topk-scaling-factor"),
        (get("moe_router_num_groups"), "--moe-router-num-groups"),
        (get("moe_apply_probs_on_input"), "--moe-apply-probs-on-input"),
        (get("moe_expert_capacity_factor"), "experts that drop tokens (--moe-expert-capacity-factor)"),
        (get("moe_mlp_glu_interleave_size"), "--moe-mlp-glu-interleave-size"),
        (
            balancing not in ("none", "aux_loss", "seq_aux_loss", "global_aux_loss"),
            f"--moe-router-load-balancing-type {balancing}",
        ),
    ]


def not_imported(config: Any) -> Obstacles:
    """What Megatron's model would not compute as a config with experts says, or what is not converted."""
    obstacles = []
    if config.model_type in ("mixtral", "qwen3_moe"):
        sums_to_one = config.num_experts_per_tok == 1 and getattr(config, "norm_topk_prob", True)
        chosen, there = config.num_experts_per_tok, config.num_local_experts
        obstacles.append((chosen > there, f"more experts per token ({chosen}) than there are ({there})"))
        obstacles.append((sums_to_one, "one expert per token whose weight is always 1 (num_experts_per_tok)"))
    if config.model_type == "qwen3_moe":
        sparse = config.decoder_sparse_step == 1 and not config.mlp_only_layers
        obstacles += [
            (not sparse, "experts in some layers only (mlp_only_layers, decoder_sparse_step)"),
            (config.attention_bias, "attention_bias beside experts"),
            (config.sliding_window, "sliding_window beside experts"),
        ]
    return obstacles
