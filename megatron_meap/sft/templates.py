"""A conversation up to one answer as text, rendered by transformers' own `apply_chat_template`, its parts known.

The prompt is what the template writes with `add_generation_prompt=True`, so that training continues exactly the text
with which the model is prompted; the rest, up to the end of the answer, is what the model has to write. If a template
drops the answer's thoughts (`<think>...</think>`), as DeepSeek-R1's does, they are put after the prompt unchanged.
"""

import datetime
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_meap.errors import UsageError, refusing
from megatron_meap.sft.fields import BadConversation
from megatron_meap.sft.marks import Marked, Thoughts, holds_marks, mark, unmark
from megatron_meap.sft.published import TEMPLATES
from megatron_meap.sft.records import Message

_THINK = "<think>"
_THOUGHTS = re.compile(r"(\s*<think>\s*|(?!.*<think>.*</think>))(.*?)(\s*</think>\s*)", re.DOTALL)
"""Thoughts at the start of an answer; the prompt may have opened them, as DeepSeek-R1's does."""
_DATE = re.compile(r"""strftime_now\s*\(\s*(["'])(.*?)\1\s*\)""")
_REWRITTEN = "is rewritten by the chat template, so that the answer cannot be found in its text"
_QUESTION: list[Message] = [{"role": "user", "content": "a"}]


def find_template(name: str | None) -> str | None:
    """Text of a template: a name from `TEMPLATES`, or a file; None (the tokenizer's own) for None.

    Raises:
        UsageError: there is no such template.
    """
    if name is None or name in TEMPLATES:
        return None if name is None else TEMPLATES[name]
    if not Path(name).is_file():
        raise UsageError(
            f"--meap-sft-template {name}: no such template; use {', '.join(TEMPLATES)}, or a file that holds one"
        )
    with refusing(f"--meap-sft-template {name}: cannot be read as text", OSError, UnicodeDecodeError):
        return Path(name).read_text()


@dataclass(frozen=True)
class Rendered:
    """A conversation up to one answer, as text."""

    text: str
    spans: list[tuple[int, int]]
    """Characters that come from messages, including the answer."""
    answer: tuple[int, int]
    """Characters that the model has to write, from the end of the generation prompt to the end of the answer."""


class ChatTemplate:
    """A template and the tokenizer whose special tokens it writes.

    `text` is the template; `strftime_now` in it always gives the same day.

    Args:
        tokenizer: of transformers.
        text: Jinja; None for the tokenizer's own template (the one called `default`, if it has several).
        date: for the template's `strftime_now` (ISO); today if not given.
    """

    def __init__(self, tokenizer: Any, text: str | None, date: str | None = None) -> None:
        own: Any = tokenizer.chat_template
        own = own.get("default") if isinstance(own, dict) else own
        if text is None and not own:
            raise UsageError(
                "the tokenizer has no chat template; name one of "
                f"{', '.join(TEMPLATES)}, or a file, with --meap-sft-template in fine-tuning, which keeps it"
            )
        named = "the tokenizer's chat template" if text is None else "--meap-sft-template"
        self._tokenizer = tokenizer
        self.text: str = own if text is None else text
        day = datetime.date.fromisoformat(date) if date else datetime.date.today()
        self.date = day.isoformat() if "strftime_now" in self.text else None
        """The day that is written into the text; None if the template does not use it."""
        self._dated = _DATE.sub(lambda call: repr(day.strftime(call[2])), self.text)
        if re.search(r"strftime_now\s*\(", self._dated):
            raise UsageError(f"{named}: its strftime_now is called with more than one string; write it out")
        self._knows_thoughts = any(name in self.text for name in ("reasoning_content", "thinking"))
        try:
            if self._found([*_QUESTION, {"role": "assistant", "content": "b"}], None) is None:
                raise BadConversation(_REWRITTEN)
        except BadConversation as error:
            raise UsageError(f"{named}: not usable: a question and an answer {error}") from error

    def prompt(self, messages: list[Message], tools: list[Any] | None = None) -> Marked:
        """The prompt of the model: the messages, and the beginning of an answer.

        Raises:
            BadConversation: the template refuses them.
        """
        messages = _split(messages)
        self._check_tools(messages, tools)
        plain = self._render(messages, tools, generation=True)
        for trimmed in (False, True):
            marked = unmark(self._render(mark(messages, trimmed), tools, generation=True))
            if marked is not None and marked.text == plain:
                return marked
        raise BadConversation(_REWRITTEN)

    def render(self, messages: list[Message], tools: list[Any] | None = None) -> Rendered:
        """Render messages, the last of which is the answer.

        Raises:
            BadConversation: the template refuses them, drops a part, or rewrites their text beyond trimming it.
        """
        messages = _split(messages)
        self._check_tools(messages, tools)
        thoughts = messages[-1].get("thoughts")
        found = self._found(messages, tools)
        if thoughts is not None and (found is None or self._drops(thoughts, found)):
            return self._behind_prompt(messages, thoughts, tools)
        if found is None:
            raise BadConversation(_REWRITTEN)
        if len(found.spans) < sum(bool(each["content"]) for each in messages):
            raise BadConversation("has a message that the chat template leaves out")
        prompt = self._render(messages[:-1], tools, generation=True)
        if not found.text.startswith(prompt):
            raise BadConversation(_not_continued(prompt, found.text))
        return Rendered(found.text, found.spans, (len(prompt), self._end(found, messages, tools)))

    def _found(self, messages: list[Message], tools: list[Any] | None) -> Marked | None:
        """The places of the messages in the output of the template; None if it changes them."""
        plain = self._render(messages, tools)
        wanted = 1 if messages[-1]["content"] or "tool_calls" not in messages[-1] else 0
        for trimmed in (False, True):
            found = unmark(self._render(mark(messages, trimmed), tools))
            if found is not None and found.text == plain and len(found.answers) == wanted:
                return found
        return None

    def _drops(self, thoughts: Thoughts, found: Marked) -> bool:
        """Whether the answer was rendered without its thoughts."""
        if thoughts.text:
            return not found.thoughts
        return not self._knows_thoughts and not found.text[: found.answers[0][0]].endswith("".join(thoughts))

    def _behind_prompt(self, messages: list[Message], thoughts: Thoughts, tools: list[Any] | None) -> Rendered:
        """The generation prompt, then thoughts and answer unchanged, for a template that drops the thoughts."""
        bare = {name: value for name, value in messages[-1].items() if name != "thoughts"}
        found = self._found([*messages[:-1], bare], tools)
        prompt = unmark(self._render(mark(messages[:-1], False), tools, generation=True))
        if found is None or prompt is None or "tool_calls" in bare:
            raise BadConversation("has thoughts (<think>, reasoning_content) that the chat template drops")
        start, end = found.answers[0]
        place = len(prompt.text)
        before = "" if prompt.text.rstrip().endswith(_THINK) else thoughts.before
        written = f"{before}{thoughts.text}{thoughts.after}{found.text[start:end]}"
        texts = (place + len(before), place + len(written))
        return Rendered(prompt.text + written + found.text[end:], [*prompt.spans, texts], (place, texts[1]))

    def _end(self, found: Marked, messages: list[Message], tools: list[Any] | None) -> int:
        """Where the answer ends: after its text, or after its calls of tools."""
        if "tool_calls" not in messages[-1]:
            return found.answers[0][1]
        said = {"role": "assistant", "content": "b"}
        plain = unmark(self._render(mark([*messages[:-1], said], False), tools))
        ending = plain.text[plain.answers[0][1] :] if plain is not None and len(plain.answers) == 1 else ""
        if not ending or not found.text.endswith(ending):
            raise BadConversation("calls a tool, and the chat template ends it differently from an answer")
        return len(found.text) - len(ending)

    def _check_tools(self, messages: list[Message], tools: list[Any] | None) -> None:
        """Refuse tools, and calls of tools, that the template leaves out."""
        if tools and self._render(_QUESTION, tools, True) == self._render(_QUESTION, None, True):
            raise BadConversation("offers 'tools', which the chat template leaves out")
        calls = [call for message in messages for call in message.get("tool_calls", [])]
        if not calls:
            return
        text = self._render(messages, tools)
        if "tool_calls" not in self.text or not all(call["function"]["name"] in text for call in calls):
            raise BadConversation("calls tools ('tool_calls'), which the chat template leaves out")

    def _render(self, messages: list[Message], tools: list[Any] | None, generation: bool = False) -> str:
        try:
            rendered = self._tokenizer.apply_chat_template(
                [self._shown(message) for message in messages],
                chat_template=self._dated,
                tools=tools,
                add_generation_prompt=generation,
                tokenize=False,
            )
        except Exception as error:  # a template is the user's program: it may raise anything
            reason = " ".join(str(error).split())
            raise BadConversation(f"is refused by the chat template: {reason}") from error
        assert isinstance(rendered, str)
        return rendered

    def _shown(self, message: Message) -> Message:
        """A message for the template: thoughts in a separate field if the template uses one, otherwise in the text.

        Empty thoughts are left to a template that uses such a field.
        """
        shown = {name: value for name, value in message.items() if name not in ("thoughts", "learned")}
        if "thoughts" not in message:
            return shown
        thoughts = message["thoughts"]
        if not self._knows_thoughts:
            return shown | {"content": "".join(thoughts) + message["content"]}
        return shown | (dict.fromkeys(("reasoning_content", "thinking"), thoughts.text) if thoughts.text else {})


def _split(messages: list[Message]) -> list[Message]:
    """The messages with their thoughts, from a separate field or from the start of the text, as `Thoughts`.

    Raises:
        BadConversation: a message contains one of the characters that are used as marks.
    """
    if any(map(holds_marks, messages)):
        raise BadConversation("holds a Unicode noncharacter (U+FDD0 to U+FDD5)")
    split = []
    for message in messages:
        found = _THOUGHTS.match(message["content"]) if message["role"] == "assistant" else None
        if "reasoning_content" in message:
            bare = {name: value for name, value in message.items() if name != "reasoning_content"}
            said = Thoughts(f"{_THINK}\n", message["reasoning_content"].strip("\n"), "\n</think>\n\n")
            split.append(bare | {"thoughts": said})
        elif found is not None:
            split.append(
                message | {"content": message["content"][found.end() :], "thoughts": Thoughts(*found.groups())}
            )
        else:
            split.append(message)
    return split


def _not_continued(prompt: str, text: str) -> str:
    """How an answer is rendered differently from its generation prompt."""
    same = next((place for place, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(text))
    asked, written = prompt[same : same + 40], text[same : same + 40]
    return (
        f"is rendered differently from the model's prompt: {asked!r} in the generation prompt, {written!r} in the "
        "conversation; change the template, or give the answers what it expects (such as their thoughts)"
    )
