"""Chat templates: Jinja, rendered by transformers' own `apply_chat_template`, with the messages' places known.

A template comes from the tokenizer, by name from here, or from a file. To know which characters of the rendered text
are the template's and which come from messages, every message is rendered between two characters that no text holds
(Unicode noncharacters). Without them the text must be what the plain rendering gives, or the conversation is refused.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_meap.errors import UsageError
from megatron_meap.sft.conversations import BadConversation, Message

_ALPACA_START = (
    "Below is an instruction that describes a task{{ ', paired with an input that provides further context' "
    "if messages[offset].input else '' }}. Write a response that appropriately completes the request."
)
_VICUNA_START = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_WITHOUT_SYSTEM = "{% set offset = 1 if messages[0].role == 'system' else 0 %}"
_SYSTEM_OR = "{% if offset %}{{ messages[0].content }}{% else %}<START>{% endif %}"

TEMPLATES = {
    "alpaca": _WITHOUT_SYSTEM
    + "{{ bos_token }}"
    + _SYSTEM_OR.replace("<START>", _ALPACA_START)
    + "{% for message in messages[offset:] %}{% if message.role == 'user' %}"
    "{{ '\n\n### Instruction:\n' + (message.instruction if message.input else message.content) }}"
    "{{ '\n\n### Input:\n' + message.input if message.input else '' }}{{ '\n\n### Response:\n' }}"
    "{% else %}{{ message.content + eos_token }}{% endif %}{% endfor %}",
    "vicuna": _WITHOUT_SYSTEM
    + "{{ bos_token }}"
    + _SYSTEM_OR.replace("<START>", _VICUNA_START)
    + "{{ ' ' }}{% for message in messages[offset:] %}{% if message.role == 'user' %}"
    "{{ 'USER: ' + message.content + ' ASSISTANT:' }}"
    "{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}",
    "llama-2": _WITHOUT_SYSTEM + "{% for message in messages[offset:] %}{% if message.role == 'user' %}"
    "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' if loop.first and offset else '' %}"
    "{{ bos_token + '[INST] ' + (system + message.content).strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama-3": "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content.strip() + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "chatml": "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}
"""Jinja templates by name, in the published formats."""

_MARKS = "\ufdd0\ufdd1"
_ANSWER_MARKS = "\ufdd2\ufdd3"
_CLOSING = {_MARKS[0]: _MARKS[1], _ANSWER_MARKS[0]: _ANSWER_MARKS[1]}
_SPLIT = re.compile(f"([{_MARKS}{_ANSWER_MARKS}])")


def find_template(name: str | None) -> str | None:
    """Text of the template called so: a name from `TEMPLATES`, or a file; None (the tokenizer's own) for None.

    Raises:
        UsageError: there is no such template.
    """
    if name is None or name in TEMPLATES:
        return None if name is None else TEMPLATES[name]
    if not Path(name).is_file():
        raise UsageError(
            f"--meap-sft-template {name}: no such template; use {', '.join(TEMPLATES)}, or a file that holds one"
        )
    try:
        return Path(name).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--meap-sft-template {name}: cannot be read as text ({error})") from error


@dataclass(frozen=True)
class Rendered:
    """A conversation up to one answer, as text."""

    text: str
    spans: list[tuple[int, int]]
    """Characters that come from messages, the answer among them."""
    answer: tuple[int, int]
    """Characters of the answer, the last message."""


class ChatTemplate:
    """A template and the tokenizer whose special tokens it writes.

    Args:
        tokenizer: of transformers.
        text: Jinja; None for the tokenizer's own template.
    """

    def __init__(self, tokenizer: Any, text: str | None) -> None:
        if text is None and not tokenizer.chat_template:
            raise UsageError(
                "--meap-sft-template: the tokenizer has no chat template of its own; "
                f"name one of {', '.join(TEMPLATES)}"
            )
        self._tokenizer = tokenizer
        self.text: str = tokenizer.chat_template if text is None else text
        try:
            self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        except BadConversation as error:
            raise UsageError(f"--meap-sft-template: not usable: a question and an answer {error}") from error

    def render(self, messages: list[Message]) -> Rendered:
        """Render messages whose last one is the answer.

        Raises:
            BadConversation: the template refuses them, or rewrites their text beyond trimming it.
        """
        if any(_SPLIT.search(message["content"]) for message in messages):
            raise BadConversation("holds a Unicode noncharacter (U+FDD0 to U+FDD3)")
        try:
            plain = self._render(messages)
            for trimmed in (False, True):
                found = _unmarked(self._render(_marked(messages, trimmed)))
                if found is not None and found.text == plain:
                    return found
        except Exception as error:  # a template is a program of the user's: it may raise anything
            raise BadConversation(f"is refused by the chat template: {error}") from error
        raise BadConversation("is rewritten by the chat template, so that the answer cannot be found in its text")

    def _render(self, messages: list[Message]) -> str:
        rendered = self._tokenizer.apply_chat_template(messages, chat_template=self.text, tokenize=False)
        assert isinstance(rendered, str)
        return rendered


def _marked(messages: list[Message], trimmed: bool) -> list[Message]:
    """The messages with their text between marks; `trimmed`: the marks within the white space around it."""

    def mark(text: str, marks: str) -> str:
        core = text.strip() if trimmed else text
        before, _, after = text.partition(core) if core else ("", "", text)
        return before + marks[0] + core + marks[1] + after

    def marked(message: Message, marks: str) -> Message:
        # An absent part (Alpaca's empty input) stays empty: templates ask for it.
        kept = {key for key, value in message.items() if key == "role" or (key != "content" and not value)}
        return {key: value if key in kept else mark(value, marks) for key, value in message.items()}

    return [*(marked(message, _MARKS) for message in messages[:-1]), marked(messages[-1], _ANSWER_MARKS)]


def _unmarked(text: str) -> Rendered | None:
    """Text and places of the messages in a marked rendering; None where marks got lost or the answer is not one."""
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    answers: list[tuple[int, int]] = []
    length, start, opened = 0, 0, ""
    for piece in _SPLIT.split(text):
        if piece not in _CLOSING and piece not in _CLOSING.values():
            pieces.append(piece)
            length += len(piece)
        elif not opened and piece in _CLOSING:
            opened, start = piece, length
        elif opened and piece == _CLOSING[opened]:
            spans.append((start, length))
            if opened == _ANSWER_MARKS[0]:
                answers.append((start, length))
            opened = ""
        else:
            return None
    if opened or len(answers) != 1:
        return None
    return Rendered("".join(pieces), spans, answers[0])
