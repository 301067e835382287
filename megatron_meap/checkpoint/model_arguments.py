"""What makes a run's model the one in a checkpoint: the arguments that its weights, or what it computes, need."""

from argparse import Namespace
from collections.abc import Iterable

SHAPE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "normalization",
    "swiglu",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "position_embedding_type",
    "rotary_base",
    "untie_embeddings_and_output_weights",
    "num_experts",
    "multi_latent_attention",
)
"""Arguments that the weights depend on."""

FUNCTION = (
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "use_rope_scaling",
    "rope_scaling_factor",
    "rotary_seq_len_interpolation_factor",
    "rotary_percent",
    "rotary_interleaved",
    "no_rope_freq",
    "squared_relu",
    "openai_gelu",
    "quick_geglu",
    "glu_linear_offset",
    "activation_func_clamp_value",
    "apply_residual_connection_post_layernorm",
    "apply_query_key_layer_scaling",
    "qk_l2_norm",
    "attention_output_gate",
    "softmax_type",
    "window_size",
    "window_attn_skip_freq",
    "moe_router_topk",
    "moe_router_pre_softmax",
    "moe_router_score_function",
    "moe_router_topk_scaling_factor",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_apply_probs_on_input",
    "rotary_scaling_factor",
    "mscale",
    "mscale_all_dim",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
    "use_mup",
    "mup_base_hidden_size",
    "mup_embedding_mult",
    "mup_output_mult",
    "mup_base_head_dim",
    "mup_attn_scale_power",
)
"""Arguments that the weights do not show, but that change what is computed with them."""

_ONLY_WITH = {
    "rope_scaling_factor": "use_rope_scaling",
    **{n: "num_experts" for n in FUNCTION if n.startswith("moe_")},
    **{n: "use_mup" for n in FUNCTION if n.startswith("mup_")},
}


def differences(saved: Namespace, args: Namespace, names: Iterable[str]) -> list[str]:
    """Those arguments that differ between a checkpoint and a run, a phrase each.

    An argument that the checkpoint does not know, and one without effect in both, is not compared.
    """
    found = []
    for name in names:
        switch = _ONLY_WITH.get(name)
        used = switch is None or getattr(saved, switch, None) or getattr(args, switch)
        if used and hasattr(saved, name) and (old := getattr(saved, name)) != (new := getattr(args, name)):
            found.append(f"{name} {old} there, {new} here")
    return found


def take_over(saved: Namespace, args: Namespace) -> None:
    """Set what Megatron's own `--use-checkpoint-args` leaves out: all that changes what the model computes."""
    for name in FUNCTION:
        if hasattr(saved, name):
            setattr(args, name, getattr(saved, name))
