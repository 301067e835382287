"""Small models with random weights, one for each architecture and variant that is converted."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.2,  # logits of size 1 and more, so that differences show
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
MODELS = {
    "llama-gqa": LlamaConfig(**SMALL, rope_parameters={"rope_type": "default", "rope_theta": 640000.0}),
    "llama-tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama-biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "llama-attention-bias": LlamaConfig(**SMALL, attention_bias=True),
    "llama-mlp-bias-mha": LlamaConfig(**SMALL | {"num_key_value_heads": 4}, mlp_bias=True),
    "llama-3.1": LlamaConfig(**SMALL | {"max_position_embeddings": 32768}, head_dim=32, rope_parameters=LLAMA3),
    "llama-3.2-tied": LlamaConfig(
        **SMALL | {"max_position_embeddings": 32768},
        head_dim=32,
        rope_parameters=LLAMA3 | {"factor": 32.0},
        tie_word_embeddings=True,
    ),
    "llama-linear-rope": LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    ),
    "qwen2-tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2-yarn": Qwen2Config(**SMALL, rope_parameters=YARN),
    "qwen3": Qwen3Config(**SMALL, head_dim=32, use_sliding_window=False),
    "qwen3-tied-biases": Qwen3Config(**SMALL, head_dim=32, tie_word_embeddings=True, attention_bias=True),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "mixtral-window-tied": MixtralConfig(
        **SMALL, num_local_experts=3, num_experts_per_tok=2, sliding_window=32, tie_word_embeddings=True
    ),
    "qwen3-moe": Qwen3MoeConfig(
        **SMALL, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=32, norm_topk_prob=True
    ),
    "qwen3-moe-softmax-over-all": Qwen3MoeConfig(
        **SMALL, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=3, router_aux_loss_coef=0.01
    ),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
    "mistral-window": MistralConfig(**SMALL, sliding_window=32),
    "smollm3": SmolLM3Config(**SMALL | {"num_hidden_layers": 4}, pad_token_id=None, tie_word_embeddings=True),
    "smollm3-biases": SmolLM3Config(
        **SMALL, pad_token_id=None, no_rope_layers=[0, 1], attention_bias=True, mlp_bias=True
    ),
}


def save_random_model(config: Any, tokenizer: Path, folder: Path, seed: int = 0) -> None:
    """A model with random weights, including biases and norms, and 40 more rows than its tokenizer has tokens."""
    known = AutoTokenizer.from_pretrained(str(tokenizer))
    config.vocab_size = len(known) + 40
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    known.save_pretrained(folder)
