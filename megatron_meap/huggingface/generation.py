"""Text from a model: a Megatron checkpoint of any layout, or a Hugging Face directory.

A Megatron checkpoint is converted in memory, so that there is only one forward pass to trust, that of every exported
model: transformers' own, with its cache, samplers and streaming.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, TextStreamer

from megatron_meap.backend import device
from megatron_meap.checkpoint.reader import open_checkpoint
from megatron_meap.errors import UsageError, refuse, refusing
from megatron_meap.huggingface.generation_config import ending_ids
from megatron_meap.huggingface.training_data import trained_tokenizer
from megatron_meap.huggingface.weights import Source, inspect
from megatron_meap.sft.fields import BadConversation
from megatron_meap.sft.records import Message
from megatron_meap.sft.turns import TurnEncoder
from megatron_meap.tokenization.huggingface import around_text, load_directory, moved, plain_ids
from megatron_meap.trainer import carried


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; greedily where the temperature is 0."""

    max_new_tokens: int = 100
    temperature: float = 1.0
    top_k: int = 0
    """Choose among the k likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability."""
    seed: int | None = None

    def __post_init__(self) -> None:
        refuse(
            (self.max_new_tokens < 1, f"--max-new-tokens {self.max_new_tokens}: must be at least 1"),
            (not self.temperature >= 0, f"--temperature {self.temperature}: must not be negative (0 is greedy)"),
            (self.top_k < 0, f"--top-k {self.top_k}: must not be negative (0 is no limit)"),
            (not 0 < self.top_p <= 1, f"--top-p {self.top_p}: must be above 0 and at most 1"),
        )


class Generator:
    """A model and its tokenizer, ready to continue texts.

    Args:
        path: a Megatron checkpoint (what was given to `--save`) or a Hugging Face directory.
        iteration: of a Megatron checkpoint; the latest if not given.
        tokenizer: a tokenizer file or directory to use instead of the model's own.
    """

    def __init__(self, path: str, iteration: int | None = None, tokenizer: str | None = None) -> None:
        if (Path(path) / "config.json").is_file():
            self.model, self.tokenizer, self.mask_id = _from_huggingface(path, tokenizer)
        else:
            self.model, self.tokenizer, self.mask_id = _from_megatron(path, iteration, tokenizer)
        self._encoder: TurnEncoder | None = None  # made for the first chat
        ends = self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        self._ends: list[int] = ends if isinstance(ends, list) else [] if ends is None else [ends]
        on_gpu = torch.cuda.is_available() and os.environ.get("MEAP_DEVICE") != "cpu" and not device.is_cpu()
        self.model.eval().to("cuda" if on_gpu else "cpu")

    def generate(self, prompt: str, sampling: Sampling, stream: bool = False) -> str:
        """Continue a text.

        Args:
            prompt: taken literally: `[MASK]` or `<s>` in it are ordinary characters.
            sampling: how tokens are chosen; the same seed gives the same text.
            stream: print the text while it is generated.

        Returns:
            The prompt and its continuation.
        """
        tokens = self._encode(prompt)
        streamer = TextStreamer(self.tokenizer, skip_special_tokens=True) if stream else None
        return self.tokenizer.decode(self._continue(tokens, sampling, streamer), skip_special_tokens=True)

    def answer(self, messages: list[Message], sampling: Sampling, stream: bool = False) -> str:
        """Answer the last message of a chat, prompted as in fine-tuning: in the tokenizer's chat template.

        Args:
            messages: a system prompt or none, then user and assistant in turn, the user's question last.
            sampling: how tokens are chosen.
            stream: print the answer while it is generated.
        """
        if self._encoder is None:
            self._encoder = TurnEncoder(self.tokenizer, None)
            self._ends = list(dict.fromkeys([*self._ends, self._encoder.end]))
        try:
            ids = self._encoder.prompt(messages).tolist()
        except BadConversation as error:
            raise UsageError(f"--chat: the conversation {error}") from error
        tokens = torch.tensor([self._fitting(ids)], device=self.model.device)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
        output = self._continue(tokens, sampling, streamer)
        return self.tokenizer.decode(output[len(ids) :], skip_special_tokens=True)

    def _continue(self, tokens: torch.Tensor, sampling: Sampling, streamer: Any) -> torch.Tensor:
        """Ids of the prompt [1, tokens] and its continuation."""
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        with torch.inference_mode():
            return self.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=self._config(sampling, tokens.shape[1]),
                streamer=streamer,
            )[0]

    def _fitting(self, ids: list[int]) -> list[int]:
        """The ids; refused if they leave no space in the context."""
        limit = self.model.config.max_position_embeddings
        if len(ids) >= limit:
            raise UsageError(f"the prompt has {len(ids)} tokens, the model's context only {limit}")
        return ids

    def _encode(self, prompt: str) -> torch.Tensor:
        """Ids of the prompt [1, tokens], without what the tokenizer puts after a text; for no text, how one starts."""
        ids = [*around_text(self.tokenizer)[0], *plain_ids(self.tokenizer, prompt)] if prompt else []
        start = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        if not ids and start is None:
            raise UsageError("--prompt: empty, and the tokenizer has no BOS or EOS token to start from")
        return torch.tensor([self._fitting(ids) or [start]], device=self.model.device)

    def _config(self, sampling: Sampling, prompt_tokens: int) -> GenerationConfig:
        """Transformers' settings: up to the end of the context, and never the mask token."""
        room = self.model.config.max_position_embeddings - prompt_tokens
        if sampling.max_new_tokens > room:
            print(f"the model's context leaves room for {room} new tokens", file=sys.stderr)
        greedy = sampling.temperature == 0
        how = {} if greedy else {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        ends, pad = self._ends or None, self.tokenizer.pad_token_id
        return GenerationConfig(
            max_new_tokens=min(sampling.max_new_tokens, room),
            do_sample=not greedy,
            suppress_tokens=None if self.mask_id is None else [self.mask_id],
            eos_token_id=ends,
            pad_token_id=pad if pad is not None or ends is None else ends[0],
            **how,
        )


def _from_huggingface(path: str, tokenizer: str | None) -> tuple[Any, Any, int | None]:
    """Model, tokenizer and mask id of a Hugging Face directory."""
    with refusing(f"{path}: holds no model that transformers can load"):
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", local_files_only=True)
    # Otherwise transformers would take from there what our flags do not set, such as a repetition penalty.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    loaded = load_directory(Path(tokenizer or path))
    return model, loaded, loaded.mask_token_id


def _from_megatron(path: str, iteration: int | None, tokenizer: str | None) -> tuple[Any, Any, int]:
    """Model, tokenizer and mask id of a Megatron checkpoint."""
    checkpoint = open_checkpoint(path, iteration)
    args = moved(carried.arguments_of(checkpoint), tokenizer)
    loaded = trained_tokenizer(args)
    if loaded is None:
        raise UsageError(f"{path}: was trained without a tokenizer (NullTokenizer), so it has no text to generate")
    source = inspect(checkpoint, loaded)
    model = model_in_memory(source, checkpoint.dtype("embedding.word_embeddings.weight"))
    model.generation_config.eos_token_id = ending_ids(args, loaded) or None
    return model, loaded, loaded.mask_token_id


def model_in_memory(source: Source, dtype: torch.dtype) -> Any:
    """The checkpoint as a transformers model, without a file in between."""
    config = source.config(dtype, None)
    kind = getattr(transformers, config["architectures"][0])
    return kind.from_pretrained(
        None, config=AutoConfig.for_model(**config), state_dict=dict(source.tensors(dtype)), dtype=dtype
    )
