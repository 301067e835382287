"""What makes a run's model the same as in a checkpoint: the arguments on which weights or computation depend."""

from argparse import Namespace
from collections.abc import Iterable
from typing import Any

SHAPE = (  # noqa: SIM905
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels normalization swiglu "
    "add_bias_linear add_qkv_bias qk_layernorm position_embedding_type rotary_base "
    "untie_embeddings_and_output_weights num_experts moe_layer_freq moe_ffn_hidden_size "
    "moe_shared_expert_intermediate_size moe_shared_expert_gate moe_router_enable_expert_bias moe_latent_size "
    "multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim"
).split()
"""Arguments that the weights depend on."""

FUNCTION = (  # noqa: SIM905
    "layernorm_epsilon layernorm_zero_centered_gamma use_rope_scaling rope_scaling_factor "
    "rotary_seq_len_interpolation_factor rotary_percent rotary_interleaved no_rope_freq squared_relu openai_gelu "
    "quick_geglu glu_linear_offset activation_func_clamp_value apply_residual_connection_post_layernorm "
    "apply_query_key_layer_scaling qk_l2_norm attention_output_gate softmax_type window_size window_attn_skip_freq "
    "moe_router_topk moe_router_pre_softmax moe_router_score_function moe_router_topk_scaling_factor "
    "moe_router_num_groups moe_router_group_topk moe_apply_probs_on_input moe_expert_capacity_factor "
    "moe_token_drop_policy moe_mlp_glu_interleave_size moe_shared_expert_glu_interleave_size rope_type "
    "rotary_scaling_factor mscale mscale_all_dim yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow "
    "yarn_correction_range_round_to_int use_mup mup_base_hidden_size mup_embedding_mult mup_output_mult "
    "mup_base_head_dim mup_attn_scale_power"
).split()
"""Arguments that do not affect the weights, but change what is computed with them."""

_ONLY_WITH = {
    "rope_scaling_factor": "use_rope_scaling",
    **{n: "num_experts" for n in (*SHAPE, *FUNCTION) if n.startswith("moe_")},
    **dict.fromkeys((*SHAPE[SHAPE.index("q_lora_rank") :], "rope_type"), "multi_latent_attention"),
    **{n: "use_mup" for n in FUNCTION if n.startswith("mup_")},
}


def differences(saved: Namespace, args: Namespace, names: Iterable[str]) -> list[str]:
    """Arguments that differ between a checkpoint and a run, a phrase each.

    An argument that the checkpoint lacks, or that has no effect in both, is not compared.
    """
    found = []
    for name in names:
        switch = _ONLY_WITH.get(name)
        used = switch is None or getattr(saved, switch, None) or getattr(args, switch)
        if used and hasattr(saved, name) and (old := _value(saved, name)) != (new := _value(args, name)):
            found.append(f"{name} {old} there, {new} here")
    return found


def _value(args: Namespace, name: str) -> Any:
    """The effective value of an argument: without `--group-query-attention` each head has its own key and value."""
    grouped = name != "num_query_groups" or getattr(args, "group_query_attention", True)
    return getattr(args, name if grouped else "num_attention_heads")


def take_over(saved: Namespace, args: Namespace) -> None:
    """Set the arguments for weights and computation that Megatron's own `--use-checkpoint-args` leaves out."""
    for name in (*SHAPE, *FUNCTION):
        if hasattr(saved, name) and name != "num_layers":  # which may follow a pattern of this run's own
            setattr(args, name, getattr(saved, name))
