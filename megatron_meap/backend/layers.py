"""Local transformer layers: PyTorch only, no Transformer Engine and no Apex, on CPU and GPU alike.

Megatron's own local layers materialise the [b, n, s, s] attention scores, refuse packed sequences and refuse
`--sequence-parallel`. These do not: attention uses PyTorch's `scaled_dot_product_attention`, and the norms have the
mark by which Megatron reduces their gradients over the sequence-parallel ranks. Module names and checkpoint keys are
Megatron's.

Shapes, in Megatron's terms: s sequence, b micro batch, n heads, g query groups, d head dimension.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn import functional

from megatron_meap.backend import device, kernels
from megatron_meap.backend.attention import causal_attention


@functools.cache
def _has_varlen() -> bool:
    """Whether this PyTorch has attention over packed sequences (2.10 has)."""
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm over the last dimension, usable with sequence parallelism.

    Args:
        config: `normalization` chooses the kind; `sequence_parallel` marks the parameters.
        hidden_size: size of the last dimension.
        eps: added to the mean square (RMSNorm) or the variance (LayerNorm).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma  # the weight is kept as its distance from 1
        start = torch.zeros if self.zero_centered else torch.ones
        self.weight = torch.nn.Parameter(start(hidden_size, dtype=config.params_dtype))
        self.bias: torch.nn.Parameter | None = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            # Each rank sees only its part of the sequence: Megatron sums the gradients of parameters with this mark.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., hidden size]."""
        weight = self.weight + 1 if self.zero_centered else self.weight
        if self.bias is None:
            return functional.rms_norm(x, (self.hidden_size,), weight, self.eps)
        return functional.layer_norm(x, (self.hidden_size,), weight, self.bias, self.eps)


class CPUNorm(Norm):
    """The same on a CPU, where PyTorch has no kernel for RMSNorm."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., hidden size]."""
        if self.bias is not None:
            return super().forward(x)
        return kernels.rms_norm(x, self.weight + 1 if self.zero_centered else self.weight, self.eps)


class SDPAttention(MegatronModule):
    """Causal attention by PyTorch's `scaled_dot_product_attention`, in memory linear in the sequence length.

    Arguments as in Megatron's `DotProductAttention`; multi-latent attention also gives its head dimensions. Packed
    sequences (`cu_seqlens`) attend only to themselves. A window (`--window-size`) further restricts what a mask or the
    borders allow; Megatron's own local attention replaces them by it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ) -> None:
        super().__init__(config=config)
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(k_channels or config.kv_channels)
        self.window: int | None = None  # positions that are seen before one's own
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            self.window = config.window_size[0] if config.window_size[0] >= 0 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, n, d], or [tokens, n, d] with packed sequences; key and value: the same with g groups.
            attention_mask: bool [b, 1, s, s], True where attention is forbidden; None for the plain causal mask.
            attn_mask_type: overrides the layer's own.
            attention_bias: not supported.
            packed_seq_params: borders of the sequences packed into this one.

        Returns:
            [s, b, n * d], or [tokens, 1, n * d] with packed sequences.
        """
        assert attention_bias is None, "attention bias is not supported by the local layers"
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, n, s, d]
        mask_type = attn_mask_type or self.attn_mask_type
        causal = attention_mask is None and mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        context = self._attend(q, k, v, causal, None if attention_mask is None else ~attention_mask)
        return context.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
        """Attend within each packed sequence: on a GPU with FlashAttention's kernel, otherwise one after the other."""
        if self._has_kernel_for_packed(query):
            from torch.nn.attention import varlen  # it brings the whole compiler along

            q, k, v = (x.reshape(x.shape[0], *x.shape[-2:]) for x in (query, key, value))
            borders, longest = packed.cu_seqlens_q, packed.max_seqlen_q
            attend: Any = varlen.varlen_attn  # by default it returns one tensor
            context = attend(
                q, k, v, borders, borders, longest, longest,
                scale=self.softmax_scale, window_size=(-1 if self.window is None else self.window, 0),
                enable_gqa=query.shape[-2] != key.shape[-2],
            )  # fmt: skip
            return context.reshape(query.shape[0], 1, -1)
        return self._one_by_one(query, key, value, packed.cu_seqlens_q.tolist())

    def _has_kernel_for_packed(self, query: Tensor) -> bool:
        """FlashAttention's limits."""
        suits = query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 256
        return suits and _has_varlen() and not device.is_cpu() and not (self.dropout and self.training)

    def _one_by_one(self, query: Tensor, key: Tensor, value: Tensor, borders: list[int]) -> Tensor:
        q, k, v = (x.reshape(x.shape[0], *x.shape[-2:]).transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        parts = [
            self._attend(q[:, :, start:end], k[:, :, start:end], v[:, :, start:end], causal=True)
            for start, end in itertools.pairwise(borders)
            if end > start
        ]
        context = torch.cat(parts, dim=2)  # [1, n, tokens, d]
        return context[0].transpose(0, 1).reshape(query.shape[0], 1, -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, allowed: Tensor | None = None) -> Tensor:
        """[b, n, s, d] attends to [b, g, s, d]."""
        if self.window is not None:
            near = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril().triu(-self.window)
            allowed = near if allowed is None else allowed & near
            causal = False
        dropout = self.dropout if self.training else 0.0
        arguments: dict[str, Any] = {
            "attn_mask": allowed,
            "dropout_p": dropout,
            "is_causal": causal,
            "scale": self.softmax_scale,
            "enable_gqa": q.shape[1] != k.shape[1],
        }
        if dropout == 0.0 or self.config.sequence_parallel:
            return functional.scaled_dot_product_attention(q, k, v, **arguments)
        with tensor_parallel.get_cuda_rng_tracker().fork():  # every tensor-parallel rank drops its own heads
            return functional.scaled_dot_product_attention(q, k, v, **arguments)


class CPUAttention(SDPAttention):
    """The same on a CPU: in the faster type, and with every head's positions side by side in memory.

    In 32-bit floats a step of attention over 8 x 512 tokens takes 98 ms in this layout, 114 ms in Megatron's, and
    200 ms in bf16 on a processor that multiplies it slowly; 122 ms and 60 ms by products on one that does so fast.
    """

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, allowed: Tensor | None = None) -> Tensor:
        plain = causal and self.window is None and not (self.dropout and self.training) and q.shape[-1] == v.shape[-1]
        if plain and kernels.attends_by_products(q.dtype):
            return causal_attention(q, k, v, self.softmax_scale)
        dtype = kernels.product_type(q.dtype)
        fast_q, fast_k, fast_v = (x.to(dtype).contiguous() for x in (q, k, v))
        return super()._attend(fast_q, fast_k, fast_v, causal, allowed).to(q.dtype)


class CPUSwiGLU(MLP):
    """Megatron's MLP with SwiGLU and without biases in one autograd step; every other MLP is Megatron's own."""

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_: Any) -> tuple[Tensor, Any]:
        """[s, b, h] to [s, b, h], and no bias."""
        config = self.config
        swiglu = config.gated_linear_unit and config.activation_func is functional.silu
        if not swiglu or config.add_bias_linear or config.glu_linear_offset or config.activation_func_clamp_value:
            return super().forward(hidden_states, per_token_scale)
        return self.linear_fc2(kernels.swiglu(self.linear_fc1(hidden_states)[0]))


class Modules(NamedTuple):
    """What a layer is made of, where it is not made of Megatron's own modules."""

    norm: type[Norm]
    attention: type[SDPAttention]
    mlp: type[MLP]


_MODULES = Modules(Norm, SDPAttention, MLP)
_CPU_MODULES = Modules(CPUNorm, CPUAttention, CPUSwiGLU)
_named: ContextVar[Modules | None] = ContextVar("modules", default=None)


def local_modules() -> Modules:
    """The modules for this device, or those given by `made_of`."""
    return _named.get() or (_CPU_MODULES if device.is_cpu() else _MODULES)


@contextlib.contextmanager
def made_of(modules: Modules) -> Iterator[None]:
    """Within the block, layers are specified with these modules."""
    token = _named.set(modules)
    try:
        yield
    finally:
        _named.reset(token)


def local_block_spec(model: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Megatron's local layer spec for a GPT model, dense or MoE, with this module's attention and norms.

    Args:
        model: Megatron's `GPTModelConfig`; this function is its `transformer_layer_spec`.
        vp_stage: virtual pipeline stage, as Megatron passes it.
    """
    config = model.transformer
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=False,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
    )
    modules = local_modules()
    replaced = {id(spec): _with_local_modules(spec, config, modules) for spec in block.layer_specs}
    layer_specs = [replaced[id(spec)] for spec in block.layer_specs]
    return TransformerBlockSubmodules(layer_specs=layer_specs, layer_norm=modules.norm)


def local_layer_spec(config: TransformerConfig, moe: bool = False) -> ModuleSpec:
    """Spec of one whole transformer layer, attention and MLP (or experts, where `moe`)."""
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if moe else None,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
    )
    return _with_local_modules(spec, config, local_modules())


def _wants_megatrons_attention(config: TransformerConfig) -> bool:
    """Whether the user asks for something that only Megatron's unfused attention can do."""
    return (
        config.attention_backend == AttnBackend.local
        or config.softmax_type != "vanilla"
        or config.apply_query_key_layer_scaling
    )


def _with_local_modules(spec: ModuleSpec, config: TransformerConfig, modules: Modules) -> ModuleSpec:
    """A copy of a layer spec with our modules for the norms, the core attention and the dense MLP."""
    layer = spec.submodules
    attention, mlp = layer.self_attention, layer.mlp
    inner: dict[str, Any] = {} if _wants_megatrons_attention(config) else {"core_attention": modules.attention}
    if config.qk_layernorm and not config.qk_l2_norm:
        names = ("q_layernorm", "kv_layernorm") if config.multi_latent_attention else ("q_layernorm", "k_layernorm")
        inner |= dict.fromkeys(names, modules.norm)
    keys = dict(layer.sharded_state_dict_keys_map)
    if getattr(mlp, "func", None) == MLP.as_mlp_submodule:
        mlp = functools.partial(modules.mlp.as_mlp_submodule, **mlp.keywords)
    else:  # a mixture of experts, where Transformer Engine keeps the norm, and its checkpoint key, apart from the MLP
        keys.pop("pre_mlp_layernorm.", None)
    return dataclasses.replace(
        spec,
        submodules=dataclasses.replace(
            layer,
            input_layernorm=modules.norm,
            pre_mlp_layernorm=modules.norm,
            mlp=mlp,
            sharded_state_dict_keys_map=keys,
            self_attention=dataclasses.replace(
                attention, submodules=dataclasses.replace(attention.submodules, **inner)
            ),
        ),
    )
