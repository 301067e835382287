"""From conversations to turns: token ids of a prompt with its history, an answer, and the end of the answer."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_meap.errors import UsageError
from megatron_meap.sft.fields import BadConversation
from megatron_meap.sft.marks import Marked
from megatron_meap.sft.records import Message
from megatron_meap.sft.templates import ChatTemplate, Rendered

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Turn:
    """One answer of a conversation with everything before it."""

    ids: Ids
    """int32 [n]: prompt, answer and its end, clean."""
    prompt: int
    """Tokens of the prompt, up to the end of the generation prompt."""
    answer: int
    """Tokens that the model has to write; the following ones end the answer (EOS, or the template's own marker)."""


class TurnEncoder:
    """Renders and tokenizes turns, as transformers' `apply_chat_template(..., tokenize=True)` does.

    One thing differs: the name of a special token within a message is text, not the token. No text, not even the
    template's, becomes the mask token.

    Args:
        tokenizer: a fast tokenizer of transformers, with its mask token if it has one.
        template: text of the chat template; None for the tokenizer's own.
        history: whether the prompt of a turn contains the turns before it.
        date: for templates that write one (ISO); today if not given.
    """

    def __init__(self, tokenizer: Any, template: str | None, history: bool = True, date: str | None = None) -> None:
        if tokenizer.eos_token_id is None:
            raise UsageError("the tokenizer has no EOS token, with which answers end; use one that has it")
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise UsageError("the tokenizer is not a fast tokenizer of transformers (tokenizer.json); convert it first")
        self._template = ChatTemplate(tokenizer, template, date)
        self._history = history
        self._eos: int = tokenizer.eos_token_id
        self._begin = tokenizer.bos_token
        backend = tokenizer.backend_tokenizer
        self._backend = type(backend).from_str(backend.to_str())  # a copy: its settings are changed below
        self._backend.no_truncation()
        self._backend.no_padding()
        special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        special.pop(tokenizer.mask_token, None)
        self._special = special
        self._special_ids = np.array(sorted(special.values()), np.int32)
        names = [*special, *filter(None, [tokenizer.mask_token])]
        names.sort(key=len, reverse=True)  # so that the longest match is found
        self._names = re.compile("|".join(map(re.escape, names)))

    @property
    def template(self) -> str:
        """The chat template that is used."""
        return self._template.text

    @property
    def date(self) -> str | None:
        """The day that the template writes into the text; None if it writes none."""
        return self._template.date

    @property
    def facts(self) -> list[Any]:
        """Everything that determines the ids of a conversation, besides the vocabulary."""
        return [self._template.text, self._history, self._eos, sorted(self._special.items()), self._begin, self.date]

    @property
    def end(self) -> int:
        """The token that ends answers: EOS, or the template's own."""
        question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        try:
            rendered = self._template.render([question, answer])
        except BadConversation:  # a template whose generation prompt opens thoughts needs some
            rendered = self._template.render([question, answer | {"reasoning_content": "c"}])
        (turn,) = self.encode([rendered])
        return int(turn.ids[-1])

    def turns(self, messages: list[Message], tools: list[Any] | None = None) -> Iterator[Rendered]:
        """The text of every turn to learn; a greeting, which answers no question, is not one.

        Without history the prompt of a turn is only its question; the system prompt belongs to the first turn.

        Raises:
            BadConversation: the template cannot render it.
        """
        calls = json.dumps([tools, [message.get("tool_calls") for message in messages]], ensure_ascii=False)
        if named := self._names.search(calls):
            raise BadConversation(f"has the text {named[0]} in its tools, where it would become the special token")
        questions = [number for number, message in enumerate(messages) if message["role"] == "user"]
        for number, message in enumerate(messages):
            if message["role"] == "assistant" and message.get("learned", True) and number > questions[0]:
                last = max(each for each in questions if each < number)
                start = 0 if self._history or last == questions[0] else last
                yield self._template.render(messages[start : number + 1], tools)

    def prompt(self, messages: list[Message], tools: list[Any] | None = None) -> Ids:
        """Ids, int32 [n], of the model's prompt: the messages, and the beginning of an answer.

        Raises:
            BadConversation: the template cannot render them.
        """
        asked = self._template.prompt(messages, tools)
        specials = self._written_specials(asked)
        if specials is not None:
            return self._encode_pieces(asked.text, specials)[0]
        self._backend.encode_special_tokens = False
        return np.array(self._backend.encode(asked.text, add_special_tokens=False).ids, np.int32)

    def turn(self, messages: list[Message], tools: list[Any] | None = None) -> Turn:
        """The turn of messages, the last of which is the answer.

        Raises:
            BadConversation: the template cannot render it.
        """
        return self.encode([self._template.render(messages, tools)])[0]

    def encode(self, rendered: list[Rendered]) -> list[Turn]:
        """Tokenize many turns at once, on all cores."""
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

    def _written_specials(self, rendered: Rendered | Marked) -> list[tuple[int, int]] | None:
        """Places of the special tokens that the template wrote; None if the text contains no others."""
        found = [match.span() for match in self._names.finditer(rendered.text)]
        own = [
            (start, end)
            for start, end in found
            if rendered.text[start:end] in self._special
            and not any(start < last and first < end for first, last in rendered.spans)
        ]
        return None if own == found else own

    def _encode_pieces(self, text: str, specials: list[tuple[int, int]]) -> tuple[Ids, list[tuple[int, int]]]:
        """Ids and places of a text in which only these special tokens count as tokens."""
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

        The answer ends with the first special token after it, or with EOS if the template writes none.
        """
        start, end = answer
        first = int(np.argmax(np.append(offsets[:, 1], end + 1) > start))
        after = first + int(np.argmax(np.append(offsets[first:, 0], end) >= end))
        closing = np.flatnonzero(np.isin(ids[after:], self._special_ids))
        ended = ids[: after + int(closing[0]) + 1] if len(closing) else np.append(ids, np.int32(self._eos))
        return Turn(ended, first, after - first)
