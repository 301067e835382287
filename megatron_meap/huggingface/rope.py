"""YaRN (arXiv 2309.00071): rotary positions for longer contexts, in Megatron's flags and in a Hugging Face config."""

import math
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

ORIGINAL, FAST, SLOW = 4096, 32.0, 1.0  # Megatron's defaults; the last two are transformers' as well


@dataclass(frozen=True)
class Yarn:
    """How YaRN changes the frequencies and the attention."""

    factor: float
    """Length of the context divided by that of the original one."""
    original: int
    """Positions of the original context."""
    beta_fast: float
    beta_slow: float
    attention: float
    """Factor of sines and cosines."""
    rounded: bool = True
    """Whether the borders between the frequencies are whole numbers."""

    @classmethod
    def from_megatron(cls, args: Namespace) -> "Yarn | None":
        """From Megatron's arguments; None if they specify other positions."""
        if getattr(args, "position_embedding_type", None) != "yarn":
            return None
        rounded = args.yarn_correction_range_round_to_int
        return cls(
            args.rotary_scaling_factor,
            args.yarn_original_max_position_embeddings or ORIGINAL,
            FAST if args.yarn_beta_fast is None else args.yarn_beta_fast,
            SLOW if args.yarn_beta_slow is None else args.yarn_beta_slow,
            _scale(args.rotary_scaling_factor, args.mscale) / _scale(args.rotary_scaling_factor, args.mscale_all_dim),
            True if rounded is None else rounded,
        )

    @classmethod
    def from_huggingface(cls, rope: dict[str, Any], longest: int) -> "Yarn | None":
        """From a config's `rope_parameters` and `max_position_embeddings`; None if it specifies other positions."""
        if rope.get("rope_type") != "yarn":
            return None
        original = rope.get("original_max_position_embeddings") or longest
        factor = float(rope.get("factor") or longest / original)
        attention = rope.get("attention_factor")
        if attention is None:
            one, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
            given = (one, all_dim) if one and all_dim else (1.0, 0.0)
            attention = _scale(factor, given[0]) / _scale(factor, given[1])
        fast, slow = rope.get("beta_fast") or FAST, rope.get("beta_slow") or SLOW
        return cls(factor, original, fast, slow, float(attention), bool(rope.get("truncate", True)))

    def flags(self) -> dict[str, Any]:
        """Megatron's flags and their values."""
        slope = _scale(self.factor, 1.0) - 1  # of the attention's factor over --mscale
        flags = {
            "--rotary-scaling-factor": self.factor,
            "--yarn-original-max-position-embeddings": self.original,
            "--yarn-beta-fast": self.beta_fast,
            "--yarn-beta-slow": self.beta_slow,
        }
        return flags | ({"--mscale": (self.attention - 1) / slope} if slope else {})

    def config(self) -> dict[str, Any]:
        """The settings of a Hugging Face config."""
        return {
            "rope_type": "yarn",
            "factor": self.factor,
            "original_max_position_embeddings": self.original,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "attention_factor": self.attention,
            "truncate": self.rounded,
        }


def _scale(factor: float, mscale: float) -> float:
    """YaRN's temperature of the attention, as both libraries compute it."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
