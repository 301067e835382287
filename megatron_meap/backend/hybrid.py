"""HybridModel without Transformer Engine: the local stack for attention, MLP and MoE layers.

Megatron moves from GPTModel to HybridModel (`--hybrid-layer-pattern`, one symbol a layer: `*` attention, `-` MLP,
`E` MoE; two GPT blocks are `*-*-`), whose own stack needs Transformer Engine. This one is made of the same local
modules as `layers.local_block_spec`, under Megatron's checkpoint keys. Mamba layers need CUDA kernels and stay with
Megatron's stack.
"""

from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_meap.backend.layers import local_layer_spec, local_modules
from megatron_meap.errors import UsageError

_SYMBOLS = "*-E|"


class LocalHybridStack(HybridStack):
    """Megatron's stack with a final norm that needs no Transformer Engine."""

    def __init__(
        self, config: TransformerConfig, submodules: HybridStackSubmodules, post_layer_norm: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = local_modules().norm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )


def local_stack_spec(model: Any) -> ModuleSpec:
    """Spec of the whole stack, for `HybridModelConfig.hybrid_stack_spec`.

    Args:
        model: Megatron's `HybridModelConfig`.

    Raises:
        UsageError: the pattern asks for a kind of layer that has no local implementation.
    """
    config = model.transformer
    unknown = sorted(set(model.hybrid_layer_pattern) - set(_SYMBOLS))
    if unknown:
        raise UsageError(
            f"--hybrid-layer-pattern {model.hybrid_layer_pattern}: {' '.join(unknown)} needs CUDA kernels; without "
            "Transformer Engine (--dry-run and the planner go without) use * (attention), - (MLP), E (MoE) and | "
            "(pipeline border)"
        )
    return ModuleSpec(
        module=LocalHybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=_attention(local_layer_spec(config)),
            mlp_layer=_feed_forward(local_layer_spec(config), MLPLayer),
            moe_layer=_feed_forward(
                local_layer_spec(config, moe=config.num_moe_experts is not None), MoETransformerLayer
            ),
        ),
    )


def _attention(layer: ModuleSpec) -> ModuleSpec:
    """The attention half of a transformer layer."""
    whole = layer.submodules
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=whole.input_layernorm,
            self_attention=whole.self_attention,
            self_attn_bda=whole.self_attn_bda,
            sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
        ),
    )


def _feed_forward(layer: ModuleSpec, module: type) -> ModuleSpec:
    """The MLP or MoE half of a transformer layer."""
    whole = layer.submodules
    keys = {} if module is MoETransformerLayer else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    return ModuleSpec(
        module=module,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=whole.pre_mlp_layernorm,
            mlp=whole.mlp,
            mlp_bda=whole.mlp_bda,
            sharded_state_dict_keys_map=keys,
        ),
    )
