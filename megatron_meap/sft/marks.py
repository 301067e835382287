"""Marks around the texts of messages, by which the texts are found in the output of a template.

The marks are characters that no text contains (Unicode noncharacters). Without them a marked rendering must equal the
plain one; otherwise the template has done more to the texts than trim them.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from megatron_meap.sft.records import Message

OTHER, ANSWER, THOUGHTS = "\ufdd0\ufdd1", "\ufdd2\ufdd3", "\ufdd4\ufdd5"
"""Opening and closing marks: of all other texts, of the answer's text, of its thoughts."""

_CLOSING = {marks[0]: marks[1] for marks in (OTHER, ANSWER, THOUGHTS)}
_SPLIT = re.compile(f"([{OTHER}{ANSWER}{THOUGHTS}])")
_TEXTS = ("content", "instruction", "input")


class Thoughts(NamedTuple):
    """The thoughts of an answer (a message's `thoughts`), and what is around them if they are in its text."""

    before: str
    text: str
    after: str


@dataclass(frozen=True)
class Marked:
    """A rendering with the marks taken out."""

    text: str
    spans: list[tuple[int, int]]
    """Characters that come from messages."""
    answers: list[tuple[int, int]]
    """Characters of the answer, where the template wrote it: usually one span."""
    thoughts: list[tuple[int, int]]
    """Characters of its thoughts."""


def holds_marks(message: Message) -> bool:
    """Whether a message contains a character that is used as a mark."""
    return any(_SPLIT.search(message.get(name, "")) for name in (*_TEXTS, "reasoning_content"))


def mark(messages: list[Message], trimmed: bool) -> list[Message]:
    """The messages with their texts between marks; with `trimmed` the marks are inside the white space around a text.

    An empty part (Alpaca's input) stays empty, because templates test it.
    """

    def around(text: str, marks: str) -> str:
        core = text.strip() if trimmed else text
        before, _, after = text.partition(core) if core else ("", "", text)
        return before + marks[0] + core + marks[1] + after

    marked = []
    for number, message in enumerate(messages):
        own = (ANSWER, THOUGHTS) if number == len(messages) - 1 and message["role"] == "assistant" else (OTHER, OTHER)
        changed = {
            name: around(message[name], own[0] if name == "content" else OTHER)
            for name in _TEXTS
            if message.get(name) or (name == "content" and "tool_calls" not in message)
        }
        if "thoughts" in message and (said := message["thoughts"]).text:
            changed["thoughts"] = said._replace(text=around(said.text, own[1]))
        marked.append(message | changed)
    return marked


def unmark(text: str) -> Marked | None:
    """Text and places of the messages in a marked rendering; None if a mark was lost."""
    pieces: list[str] = []
    found: dict[str, list[tuple[int, int]]] = {opening: [] for opening in _CLOSING}
    length, start, opened = 0, 0, ""
    for piece in _SPLIT.split(text):
        if piece not in _CLOSING and piece not in _CLOSING.values():
            pieces.append(piece)
            length += len(piece)
        elif not opened and piece in _CLOSING:
            opened, start = piece, length
        elif opened and piece == _CLOSING[opened]:
            found[opened].append((start, length))
            opened = ""
        else:
            return None
    if opened:
        return None
    spans = sorted(span for each in found.values() for span in each)
    return Marked("".join(pieces), spans, found[ANSWER[0]], found[THOUGHTS[0]])
