"""The architecture that is converted, described once: from Megatron's arguments or a Hugging Face config, and back.

Llama-style: RMSNorm, SwiGLU, RoPE (plain, scaled as in Llama 3.1 or by YaRN, or linearly interpolated), grouped-query
attention, tied or untied embeddings, and the extras of `families.py`, including experts; muP's multipliers become part
of the weights. Everything else is refused by name, because a model that differs in one of these would convert without
an error and compute something else.
"""

from argparse import Namespace
from dataclasses import dataclass, field, fields, replace
from typing import Any

from megatron_meap.errors import UsageError, refuse
from megatron_meap.huggingface import experts
from megatron_meap.huggingface.families import FAMILIES, OTHERS, Extras, Family, family_of
from megatron_meap.huggingface.mup import Multipliers
from megatron_meap.huggingface.rope import Yarn

SUPPORTED = "supported are Llama-style models: RMSNorm, SwiGLU, RoPE, grouped-query attention"
# Megatron's --use-rope-scaling has these built in; only the factor can be chosen.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Architecture(Extras):
    """Everything that determines which tensors a model has, and what it computes with them."""

    layers: int
    hidden: int
    ffn: int
    """Width of the feed-forward layer, or of an expert, before the gate doubles it."""
    heads: int
    groups: int
    """Key/value heads."""
    head_dim: int
    vocabulary: int
    """Rows of the embedding, padding included."""
    max_positions: int
    tied: bool
    norm_epsilon: float
    rope_base: int
    rope_scaling: float | None = None
    """Factor of Llama 3.1's scaling."""
    rope_interpolation: int | None = None
    """Factor by which positions are divided."""
    yarn: Yarn | None = None
    multipliers: Multipliers = field(default_factory=Multipliers)
    """Of a model with muP; imported models have none."""

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of the query, key and value projections."""
        return self.heads * self.head_dim, self.groups * self.head_dim, self.groups * self.head_dim


def from_megatron(args: Namespace) -> Architecture:
    """Describe the model of a checkpoint by the arguments that it was trained with.

    Raises:
        UsageError: it is not Llama-style; the message names the first such flag.
    """
    _refuse_megatron(args)
    scaled = getattr(args, "use_rope_scaling", False)
    linear_bias = args.add_bias_linear
    return Architecture(
        layers=args.num_layers,
        hidden=args.hidden_size,
        ffn=args.moe_ffn_hidden_size if getattr(args, "num_experts", None) else args.ffn_hidden_size,
        heads=args.num_attention_heads,
        groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        head_dim=args.kv_channels,
        vocabulary=args.padded_vocab_size,
        max_positions=args.max_position_embeddings,
        tied=not args.untie_embeddings_and_output_weights,
        norm_epsilon=args.layernorm_epsilon,
        rope_base=args.rotary_base,
        rope_scaling=args.rope_scaling_factor if scaled else None,
        rope_interpolation=getattr(args, "rotary_seq_len_interpolation_factor", None),
        yarn=Yarn.from_megatron(args),
        multipliers=Multipliers.from_megatron(args),
        qkv_bias=linear_bias or args.add_qkv_bias,
        output_bias=linear_bias,
        mlp_bias=linear_bias,
        qk_norm=bool(getattr(args, "qk_layernorm", False)),
        no_rope=_layers_without_rope(args),
        window=args.window_size[0] if getattr(args, "window_size", None) else None,
        **experts.from_megatron(args),
    )


def _layers_without_rope(args: Namespace) -> tuple[int, ...]:
    """`--no-rope-freq`, an interval or a list, as `Extras.no_rope`."""
    given = getattr(args, "no_rope_freq", None)
    if isinstance(given, int):
        given = [int((layer + 1) % given == 0) for layer in range(args.num_layers)]
    return tuple(given) if given and any(given) else ()


def _refuse_megatron(args: Namespace) -> None:
    """Refuse a model that is not Llama-style, by the name of what makes the difference."""

    def get(name: str) -> Any:
        return getattr(args, name, None)

    obstacles = [
        (get("hybrid_layer_pattern"), "hybrid models (--hybrid-layer-pattern)"),
        (get("multi_latent_attention"), "multi-latent attention (--multi-latent-attention)"),
        (get("experimental_attention_variant"), "--experimental-attention-variant"),
        (get("heterogeneous_layers_config_path"), "heterogeneous layers (--heterogeneous-layers-config-path)"),
        (get("mtp_num_layers"), "multi-token prediction (--mtp-num-layers)"),
        (get("spec"), "other layer specs (--spec)"),
        (get("normalization") != "RMSNorm", f"--normalization {get('normalization')}"),
        (not get("swiglu"), "an activation other than --swiglu"),
        (
            get("position_embedding_type") not in ("rope", "yarn"),
            f"--position-embedding-type {get('position_embedding_type')}",
        ),
        (get("rotary_percent") not in (None, 1.0), f"--rotary-percent {get('rotary_percent')}"),
        (get("rotary_interleaved"), "--rotary-interleaved"),
        (get("layernorm_zero_centered_gamma"), "--apply-layernorm-1p"),
        (get("apply_residual_connection_post_layernorm"), "--apply-residual-connection-post-layernorm"),
        (get("qk_l2_norm"), "--qk-l2-norm"),
        (get("qk_clip"), "--qk-clip"),
        (get("attention_output_gate"), "--attention-output-gate"),
        (
            get("window_size") and (get("window_size")[0] < 0 or get("window_attn_skip_freq")),
            "a window in some layers only, or without a border (--window-size, --window-attn-skip-freq)",
        ),
        *experts.not_exported(get),
        (get("softmax_type") not in (None, "vanilla"), f"--softmax-type {get('softmax_type')}"),
        (get("glu_linear_offset"), "--glu-linear-offset"),
        (get("activation_func_clamp_value"), "--activation-func-clamp-value"),
        (
            get("hidden_size") % get("num_attention_heads"),
            f"--hidden-size {get('hidden_size')}, not a multiple of --num-attention-heads {get('num_attention_heads')}",
        ),
    ]
    refuse(*((present, f"conversion of {what} is not supported; {SUPPORTED}") for present, what in obstacles))


def from_huggingface(config: Any) -> Architecture:
    """Describe a model by its Hugging Face config, as `AutoConfig.from_pretrained` returns it.

    Raises:
        UsageError: it is not one of `FAMILIES`, or uses what Megatron's model cannot compute.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        why = OTHERS.get(config.model_type, "")
        raise UsageError(
            f"config.json: model_type {config.model_type!r} is not supported{why and f': {why}'}; "
            f"supported are {', '.join(FAMILIES)}"
        )
    rope = dict(config.rope_parameters)
    _refuse_huggingface(config, rope)
    kind = rope.get("rope_type", "default")
    settings = config.to_dict()
    extras = family.read(settings)
    if extras.window is not None and extras.window + 1 >= config.max_position_embeddings:
        extras = replace(extras, window=None)  # it changes nothing
    return Architecture(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=settings[family.width],
        heads=config.num_attention_heads,
        groups=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocabulary=config.vocab_size,
        max_positions=config.max_position_embeddings,
        tied=config.tie_word_embeddings,
        norm_epsilon=config.rms_norm_eps,
        rope_base=int(rope["rope_theta"]),
        rope_scaling=float(rope["factor"]) if kind == "llama3" else None,
        rope_interpolation=int(rope["factor"]) if kind == "linear" else None,
        yarn=Yarn.from_huggingface(rope, config.max_position_embeddings),
        **vars(extras),
    )


def _refuse_huggingface(config: Any, rope: dict[str, Any]) -> None:
    """Refuse what Megatron's model would not compute as the config says, by its name."""
    kind = rope.get("rope_type", "default")
    layers = set(getattr(config, "layer_types", None) or ())
    obstacles = [
        (config.hidden_act != "silu", f"hidden_act {config.hidden_act!r}"),
        (getattr(config, "quantization_config", None), "quantized weights"),
        *experts.not_imported(config),
        (layers - {"full_attention"}, f"layer_types {', '.join(sorted(layers))}"),
        (kind not in ("default", "linear", "llama3", "yarn"), f"rope_type {kind!r}"),
        (rope.get("partial_rotary_factor", 1.0) != 1.0, "partial_rotary_factor"),
        (float(rope.get("rope_theta") or 0.5) % 1, f"rope_theta {rope.get('rope_theta')}, not a whole number"),
        (kind == "linear" and rope["factor"] != int(rope["factor"]), "a linear RoPE factor that is not a whole number"),
        (
            kind == "llama3" and any(rope.get(name) != value for name, value in LLAMA3_ROPE.items()),
            f"llama3 RoPE scaling other than Megatron's {LLAMA3_ROPE}",
        ),
    ]
    refuse(*((present, f"config.json: {what} is not supported; {SUPPORTED}") for present, what in obstacles))


def exported_family(model: Architecture) -> Family:
    """The class of transformers that a model is exported as.

    Raises:
        UsageError: none has all its extras at once.
    """
    if family := family_of(model):
        return family
    has = {each.name: getattr(model, each.name) for each in fields(Extras)}
    raise UsageError(
        f"no model class of transformers has at once {', '.join(name for name, value in has.items() if value)} "
        "(biases that are all zero do not count)"
    )


def not_exported(args: Namespace) -> list[str]:
    """A warning, in one line, if the model of a run cannot be converted."""
    try:
        exported_family(from_megatron(args))
    except UsageError as error:
        return [f"warning: this model cannot be exported to Hugging Face: {error}"]
    return []


def megatron_flags(model: Architecture) -> list[str]:
    """Flags with which Megatron builds this model, without sizes of the training run."""
    pairs: dict[str, Any] = {
        "--num-layers": model.layers,
        "--hidden-size": model.hidden,
        "--ffn-hidden-size": model.ffn,
        "--num-attention-heads": model.heads,
        "--num-query-groups": model.groups,
        "--kv-channels": model.head_dim,
        "--max-position-embeddings": model.max_positions,
        "--position-embedding-type": "yarn" if model.yarn else "rope",
        "--rotary-base": model.rope_base,
        "--normalization": "RMSNorm",
        "--norm-epsilon": model.norm_epsilon,
        "--attention-dropout": 0.0,  # Megatron's default is 0.1, no such model was trained with any
        "--hidden-dropout": 0.0,
    }
    if model.rope_scaling is not None:
        pairs["--rope-scaling-factor"] = model.rope_scaling
    if model.rope_interpolation is not None:
        pairs["--rotary-seq-len-interpolation-factor"] = model.rope_interpolation
    if model.yarn is not None:
        pairs |= model.yarn.flags()
    if model.no_rope:
        pairs["--no-rope-freq"] = str(list(model.no_rope)).replace(" ", "")
    if model.window is not None:
        pairs["--window-size"] = f"{model.window},0"
    if model.experts:
        pairs |= experts.flags(model, model.ffn)
    switches = {
        "--group-query-attention": True,
        "--swiglu": True,
        "--use-rope-scaling": model.rope_scaling is not None,
        "--untie-embeddings-and-output-weights": not model.tied,
        "--disable-bias-linear": not (model.output_bias or model.mlp_bias),
        "--add-qkv-bias": model.qkv_bias and not (model.output_bias or model.mlp_bias),
        "--qk-layernorm": model.qk_norm,
        "--moe-router-pre-softmax": model.softmax_over_all,
        "--no-yarn-correction-range-round-to-int": model.yarn is not None and not model.yarn.rounded,
    }
    flags = [text for flag, value in pairs.items() for text in (flag, str(value))]
    return flags + [flag for flag, wanted in switches.items() if wanted]


def huggingface_config(model: Architecture, dtype: str, token_ids: dict[str, int | None]) -> dict[str, Any]:
    """Contents of config.json, for the model class of `family_of`.

    RoPE is written in the old form (`rope_theta`, `rope_scaling`), which vLLM and transformers 4 read, and in the new
    one (`rope_parameters`).

    Args:
        model: its `vocabulary` is the number of rows exported.
        dtype: of the weights, as in `float32`, `bfloat16`.
        token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`.
    """
    family = exported_family(model)
    scaling = None
    if model.rope_scaling is not None:
        scaling = {"rope_type": "llama3", "factor": model.rope_scaling, **LLAMA3_ROPE}
    elif model.rope_interpolation is not None:
        scaling = {"rope_type": "linear", "factor": float(model.rope_interpolation)}
    elif model.yarn is not None:
        scaling = model.yarn.config()
    return {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        family.width: model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.groups,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": float(model.rope_base),
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": float(model.rope_base), **(scaling or {"rope_type": "default"})},
        "tie_word_embeddings": model.tied,
        "vocab_size": model.vocabulary,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": dtype,
        **family.write(model),
        **token_ids,
    }
