"""muP's multipliers, which no model class of transformers has: an export multiplies the weights with them."""

import math
from argparse import Namespace
from dataclasses import dataclass

import torch

from megatron_meap.errors import UsageError


@dataclass(frozen=True)
class Multipliers:
    """Factors that a model with muP applies while it computes; 1 for no effect."""

    embedding: float = 1.0
    output: float = 1.0
    attention: float = 1.0
    """Of the scores, beside the usual 1 / sqrt(head dimension)."""

    @classmethod
    def from_megatron(cls, args: Namespace) -> "Multipliers":
        """As Megatron's `TransformerConfig` derives them from its arguments."""
        if not getattr(args, "use_mup", False):
            return cls()
        width = args.hidden_size / (args.mup_base_hidden_size or args.hidden_size)
        output = 1 / width if args.mup_output_mult == 1.0 else args.mup_output_mult
        base = 1.0 if args.mup_base_head_dim is None else math.sqrt(args.mup_base_head_dim)
        scale = base / args.kv_channels**args.mup_attn_scale_power
        return cls(args.mup_embedding_mult, output, scale * math.sqrt(args.kv_channels))

    def of(self, name: str, qk_norm: bool) -> float:
        """The factor of one of Hugging Face's weights, by its name."""
        if name == "model.embed_tokens.weight":
            return self.embedding
        if name == "lm_head.weight":
            return self.output
        # A norm of the queries would undo a factor in their projection.
        queries = ".self_attn.q_norm." if qk_norm else ".self_attn.q_proj."
        return self.attention if queries in name else 1.0

    def check(self, dtype: torch.dtype) -> None:
        """Refuse a type in which the multiplied weights would be rounded again.

        Raises:
            UsageError: says which multipliers.
        """
        odd = {name: value for name, value in vars(self).items() if math.frexp(value)[0] != 0.5}
        if odd and dtype != torch.float32:
            said = ", ".join(f"{name} {value:.6g}" for name, value in odd.items())
            raise UsageError(
                f"--dtype: muP's multipliers ({said}) are not powers of two, and {dtype} would round the weights that "
                "are multiplied with them once more; export with --dtype float32"
            )
