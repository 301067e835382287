"""From conversations to turns: the token ids of a prompt with its history, an answer, and what ends the answer."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_meap.errors import UsageError
from megatron_meap.sft.conversations import Message
from megatron_meap.sft.templates import ChatTemplate, Rendered

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Turn:
    """One answer of a conversation with all that comes before it."""

    ids: Ids
    """int32 [n]: prompt, answer and its end, clean."""
    prompt: int
    """Tokens before the answer."""
    answer: int
    """Tokens of the answer; those after it end it (EOS, or the template's own marker)."""


class TurnEncoder:
    """Renders and tokenizes turns, as transformers' `apply_chat_template(..., tokenize=True)` does.

    One thing differs: a special token's name within a message is text, not the token. Text never gives the mask
    token, not even the template's.

    Args:
        tokenizer: a fast tokenizer of transformers with its mask token.
        template: text of the chat template; None for the tokenizer's own.
        history: whether a turn's prompt holds the turns before it.
    """

    def __init__(self, tokenizer: Any, template: str | None, history: bool = True) -> None:
        if tokenizer.eos_token_id is None:
            raise UsageError("--meap-sft: the tokenizer has no EOS token, with which answers end; use one that has")
        self._template = ChatTemplate(tokenizer, template)
        self._history = history
        self._eos: int = tokenizer.eos_token_id
        self._begin = tokenizer.bos_token
        backend = tokenizer.backend_tokenizer
        self._backend = type(backend).from_str(backend.to_str())  # a copy: its settings are changed below
        self._backend.no_truncation()
        self._backend.no_padding()
        special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        del special[tokenizer.mask_token]
        self._special = special
        self._special_ids = np.array(sorted(special.values()), np.int32)
        names = sorted([*special, tokenizer.mask_token], key=len, reverse=True)  # the longest that fits is found
        self._names = re.compile("|".join(map(re.escape, names)))

    @property
    def template(self) -> str:
        """The chat template that is used."""
        return self._template.text

    @property
    def facts(self) -> list[Any]:
        """All that decides the ids of a conversation, beside the vocabulary."""
        return [self._template.text, self._history, self._eos, sorted(self._special.items()), self._begin]

    @property
    def end(self) -> int:
        """The token that ends answers: EOS, or the template's own."""
        question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        (turn,) = self.encode([self._template.render([question, answer])])
        return int(turn.ids[-1])

    def turns(self, messages: list[Message]) -> Iterator[Rendered]:
        """The text of every turn of a conversation.

        Without history the prompt of a turn is its question alone; the system prompt goes with the first one.

        Raises:
            BadConversation: the template cannot render it.
        """
        first = 1 if messages[0]["role"] == "system" else 0
        for end in range(first + 2, len(messages) + 1, 2):
            start = 0 if self._history or end == first + 2 else end - 2
            yield self._template.render(messages[start:end])

    def encode(self, rendered: list[Rendered]) -> list[Turn]:
        """Tokenize turns, many at once on all cores."""
        specials = [self._written_specials(each) for each in rendered]
        whole = [each.text for each, found in zip(rendered, specials, strict=True) if found is None]
        self._backend.encode_special_tokens = False
        encoded = iter(self._backend.encode_batch(whole, add_special_tokens=False))
        turns = []
        for each, found in zip(rendered, specials, strict=True):
            if found is None:
                encoding = next(encoded)
                ids, offsets = np.array(encoding.ids, np.int32), encoding.offsets
            else:
                ids, offsets = self._encode_pieces(each.text, found)
            turns.append(self._turn(ids, np.array(offsets, np.int64).reshape(-1, 2), each.answer))
        return turns

    def _written_specials(self, rendered: Rendered) -> list[tuple[int, int]] | None:
        """Places of the special tokens that the template wrote; None where no others stand in the text."""
        found = [match.span() for match in self._names.finditer(rendered.text)]
        own = [
            (start, end)
            for start, end in found
            if rendered.text[start:end] in self._special
            and not any(start < last and first < end for first, last in rendered.spans)
        ]
        return None if own == found else own

    def _encode_pieces(self, text: str, specials: list[tuple[int, int]]) -> tuple[Ids, list[tuple[int, int]]]:
        """Ids and places of a text in which only these special tokens are tokens."""
        self._backend.encode_special_tokens = True
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        position = 0
        for start, end in [*specials, (len(text), len(text))]:
            if position < start:
                encoding = self._backend.encode(text[position:start], add_special_tokens=False)
                ids += encoding.ids
                offsets += [(first + position, last + position) for first, last in encoding.offsets]
            if start < end:
                ids.append(self._special[text[start:end]])
                offsets.append((start, end))
            position = end
        return np.array(ids, np.int32), offsets

    def _turn(self, ids: Ids, offsets: npt.NDArray[np.int64], answer: tuple[int, int]) -> Turn:
        """Cut at the answer: a token that begins before it and reaches into it belongs to it.

        The answer ends with the first special token after it, or with EOS where the template writes none.
        """
        start, end = answer
        first = int(np.argmax(np.append(offsets[:, 1], end + 1) > start))
        after = first + int(np.argmax(np.append(offsets[first:, 0], end) >= end))
        closing = np.flatnonzero(np.isin(ids[after:], self._special_ids))
        ended = ids[: after + int(closing[0]) + 1] if len(closing) else np.append(ids, np.int32(self._eos))
        return Turn(ended, first, after - first)
