"""lm-eval's Hugging Face model, prompted in the tokenizer's chat template with exactly the ids of fine-tuning.

lm-eval renders a prompt to text and tokenizes prompt and answer together: white space at the end of the template moves
into the scored text, and some tokenizers add a BOS that training does not have. Here the prompt is the ids of the
generation prompt, and the ids that follow it in training are scored.
"""

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from megatron_meap.errors import UsageError
from megatron_meap.sft.fields import BadConversation
from megatron_meap.sft.records import Message
from megatron_meap.sft.turns import TurnEncoder


class ChatHFLM(HFLM):
    """`HFLM` whose chats are encoded as `TurnEncoder` does."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._encoder = TurnEncoder(self.tokenizer, None)
        self._chats: dict[str, list[Message]] = {}  # by their rendered text, which is all that lm-eval passes on

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat, remembered so that its ids can be found."""
        text = super().apply_chat_template(chat_history, add_generation_prompt)
        if add_generation_prompt:
            chat = [{"role": each["role"], "content": each["content"]} for each in chat_history]
            self._chats[text] = self._taken(chat)
        return text

    def _taken(self, chat: list[Message]) -> list[Message]:
        """The chat, without its system prompt if the template takes none (Gemma's): lm-eval drops it as well."""
        try:
            self._encoder.prompt(chat)
            return chat
        except BadConversation as error:
            if any(message["role"] == "system" for message in chat):
                return self._taken([message for message in chat if message["role"] != "system"])
            raise UsageError(f"--chat-template: a prompt {error}") from error

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of the generation prompt, and of the answer without the space that separates it from a plain prompt."""
        if context not in self._chats:  # an answer that has already begun, or a task without a chat
            whole = self.tok_encode(context + continuation, add_special_tokens=False)
            begun = self.tok_encode(context, add_special_tokens=False)
            return begun, whole[len(begun) :]
        messages, answer = self._chats[context], continuation.lstrip()
        try:
            turn = self._encoder.turn([*messages, {"role": "assistant", "content": answer}])
        except BadConversation:  # the template renders an answer differently from its generation prompt (DeepSeek-R1's)
            return self._prompt(context), self.tokenizer.encode(answer, add_special_tokens=False)
        ids = turn.ids.tolist()
        return ids[: turn.prompt], ids[turn.prompt : turn.prompt + turn.answer]

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of prompts to continue, padded; cut from the left if they are too long."""
        ids = [self._prompt(text)[-(left_truncate_len or 0) :] for text in strings]
        padded = self.tokenizer.pad({"input_ids": ids}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def _prompt(self, text: str) -> list[int]:
        if text in self._chats:
            return self._encoder.prompt(self._chats[text]).tolist()
        return self.tok_encode(text, add_special_tokens=False)
