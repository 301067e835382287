"""The model classes of transformers that are a Llama with extras, one per row.

`Extras` is what such a model can have beyond a plain Llama. A row of `FAMILIES` names the class, the extras that it
always has, and the settings of its config for others; reading a config, writing one, and finding the class for a model
all follow from the row.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What a model has beyond a plain Llama."""

    qkv_bias: bool = False
    output_bias: bool = False
    """Bias of the attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of the queries and keys, before they are rotated."""
    no_rope: tuple[int, ...] = ()
    """A 1 for each layer whose positions are not rotated, a 0 for each other; empty where all are."""
    window: int | None = None
    """Number of earlier positions that a token sees; None for all."""
    experts: int = 0
    """Per feed-forward layer; 0 for a dense model."""
    chosen: int = 0
    """Experts that each token goes to."""
    softmax_over_all: bool = False
    """Whether the weights of the chosen experts are those of the softmax over all; otherwise they sum to 1."""
    balance: float = 0.0
    """Coefficient of the training loss that balances the experts."""


class Setting(NamedTuple):
    """How a setting of a Hugging Face config follows from the extras, and the other way round."""

    write: Callable[[Extras], Any]
    read: Callable[[Any], dict[str, Any]]


def _skipped(used: Any) -> tuple[int, ...]:
    """The layers without RoPE, from a config's list, which has a 1 for each layer with it."""
    return () if not used or all(used) else tuple(1 - int(layer) for layer in used)


SETTINGS = {
    "attention_bias": Setting(lambda has: has.output_bias, lambda value: {"qkv_bias": value, "output_bias": value}),
    "mlp_bias": Setting(lambda has: has.mlp_bias, lambda value: {"mlp_bias": value}),
    "no_rope_layers": Setting(
        lambda has: [1 - layer for layer in has.no_rope], lambda value: {"no_rope": _skipped(value)}
    ),
    # Hugging Face counts the token itself, Megatron does not.
    "sliding_window": Setting(
        lambda has: None if has.window is None else has.window + 1,
        lambda value: {"window": None if value is None else value - 1},
    ),
    **dict.fromkeys(  # of published configs, and of transformers 5
        ("num_experts", "num_local_experts"), Setting(lambda has: has.experts, lambda value: {"experts": value})
    ),
    "num_experts_per_tok": Setting(lambda has: has.chosen, lambda value: {"chosen": value}),
    "norm_topk_prob": Setting(lambda has: not has.softmax_over_all, lambda value: {"softmax_over_all": not value}),
    "router_aux_loss_coef": Setting(lambda has: has.balance, lambda value: {"balance": value}),
}


class RoutedNames(NamedTuple):
    """Names of the weights of a layer with experts, below `model.layers.<i>.`."""

    router: str
    expert: str
    """Beginning of an expert's names; its number follows."""
    gate: str
    up: str
    down: str


_EXPERTS = ("num_experts_per_tok", "router_aux_loss_coef", "num_local_experts")


@dataclass(frozen=True)
class Family:
    """A model class of transformers."""

    model_type: str
    class_name: str
    always: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Extras that all its models have."""
    settings: tuple[str, ...] = ()
    """Keys of `SETTINGS`, for other extras."""
    width: str = "intermediate_size"
    """Key of the config for the width of the feed-forward layer, or of an expert."""
    routed: RoutedNames | None = None
    """For a class with experts."""

    def read(self, config: dict[str, Any]) -> Extras:
        """The extras of the model with this config."""
        found = dict(self.always)
        for name in self.settings:
            if name in config:
                found |= SETTINGS[name].read(config[name])
        return Extras(**found)

    def write(self, extras: Extras) -> dict[str, Any]:
        """The settings of the config for these extras, as far as this class supports them."""
        return {name: SETTINGS[name].write(extras) for name in self.settings}


FAMILIES = {
    family.model_type: family
    for family in (  # a model is written as the first that fits
        Family("llama", "LlamaForCausalLM", settings=("attention_bias", "mlp_bias")),
        Family("qwen2", "Qwen2ForCausalLM", {"qkv_bias": True}),
        Family("qwen3", "Qwen3ForCausalLM", {"qk_norm": True}, ("attention_bias",)),
        Family("mistral", "MistralForCausalLM", settings=("sliding_window",)),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            settings=(*_EXPERTS, "sliding_window"),
            routed=RoutedNames("block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", "w2"),
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            {"qk_norm": True},
            (*_EXPERTS, "num_experts", "norm_topk_prob"),
            width="moe_intermediate_size",
            routed=RoutedNames("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj"),
        ),
        Family("smollm3", "SmolLM3ForCausalLM", settings=("attention_bias", "mlp_bias", "no_rope_layers")),
    )
}


_SHARED = "it has experts that every token goes to, which are not converted"
_POST_NORM = "its norms come after attention and MLP, where Megatron Core 0.19 has none"
_TWO_NORMS = "it has norms before and after attention and MLP, where Megatron Core 0.19 has one"
OTHERS = {
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
    "qwen2_moe": _SHARED,
    "deepseek_v2": _SHARED,
    "deepseek_v3": _SHARED,
    "gemma2": _TWO_NORMS,
    "gemma3_text": _TWO_NORMS,
}
"""Why other classes that people ask for are not converted."""


def family_of(model: Extras) -> Family | None:
    """The class to write a model as: the first that has its extras and no others; None if there is none."""
    extras = Extras(**{field.name: getattr(model, field.name) for field in dataclasses.fields(Extras)})
    return next((family for family in FAMILIES.values() if family.read(family.write(extras)) == extras), None)
