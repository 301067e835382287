"""One JSON record as a list of messages, from any of the usual forms.

`messages` (role, content), `conversations` (from, value, or role, content), Alpaca's and Dolly's fields, and `prompt`
with `completion`. A field that changes the conversation is honoured or refused by name; others are reported.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_meap.sft.fields import BadConversation, kind, text
from megatron_meap.sft.tools import calls_of

Message = dict[str, Any]
"""`role` (system, user, assistant or tool) and `content`; further, where they are given, `reasoning_content`,
`tool_calls`, `tool_call_id`, `name`; `instruction` and `input` of an Alpaca question, for its template; and `learned`,
False for an answer that is not to be trained on."""

_ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name of it
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
_SHAPES = "'messages', 'conversations', 'prompt' and 'completion', or Alpaca's 'instruction' and 'output'"
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_WEIGHTS = ("weight", "train", "training", "loss", "trainable")
_MASKS = ("mask", "masked", "loss_mask", "train_detail", "train_on_input")
_THINKING = re.compile(r"\s*<think>.*?(</think>|\Z)", re.DOTALL)
_NOTHING = "which would teach to say nothing; leave it out, or make it context with a weight of 0"
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_REFUSED_IN_RECORD = (
    *(*_MEDIA, *_WEIGHTS, *_THOUGHTS, *_MASKS, "documents", "history", "rejected"),
    *("chat_template", "chat_template_kwargs", "enable_thinking"),
)
_REFUSED_IN_MESSAGE = (*_MEDIA, *_MASKS, "refusal", "prefix", "tools", "channel", "recipient", "reasoning_details")
_NOT_EVEN_FALSE = ("enable_thinking",)


def parse(record: Any) -> list[Message]:
    """Messages of one JSON record.

    Raises:
        BadConversation: none of the shapes, roles out of order, missing fields, values of another kind, or a field that
            would change the conversation and is not supported.
    """
    if not isinstance(record, dict):
        raise BadConversation(f"expected an object with {_SHAPES}, got {kind(record)}")
    read = next((reader for name, reader in _READERS.items() if record.get(name) is not None), None)
    if read is None:
        if named := [name for name in _READERS if name in record]:
            raise BadConversation(f"has null as {named[0]!r}, not {'a string' if named[0] in _TEXTS else 'a list'}")
        raise BadConversation(f"has none of the fields {_SHAPES}")
    messages = read(record)
    _refuse(record, [name for name in _REFUSED_IN_RECORD if not (name == "history" and read is _alpaca)])
    _put_system(record, messages)
    _check_order(messages)
    return messages


def unused(record: dict) -> set[str]:
    """Names of the fields, of the record and of its messages, that change nothing; they are reported."""
    shape = next((name for name in _READERS if record.get(name) is not None), "")
    known = {shape, *_FIELDS.get(shape, ()), *_REFUSED_IN_RECORD, "system", "system_prompt", "tools", "functions"}
    found = {name for name in record if name not in known and not (name in _READERS and record[name] is None)}
    entries = record.get("messages") or record.get("conversations") or []
    of_messages = {*_REFUSED_IN_MESSAGE, *_WEIGHTS, *_THOUGHTS, "role", "content", "from", "value", "name"}
    of_messages |= {"tool_calls", "tool_call_id", "function_call"}
    return found | {f"messages' {name}" for entry in entries for name in entry if name not in of_messages}


def _listed(record: dict, field: str) -> list[Message]:
    """Messages of a list of objects."""
    entries = record[field]
    if not isinstance(entries, list):
        raise BadConversation(f"'{field}' is {kind(entries)}, not a list")
    if not entries:
        raise BadConversation(f"'{field}' is empty")
    messages = []
    for number, entry in enumerate(entries, 1):
        try:
            messages.append(_message(entry, *(_names(entry) if field == "conversations" else ("role", "content"))))
        except BadConversation as error:
            raise BadConversation(f"message {number} {error}") from None
    return messages


def _names(entry: Any) -> tuple[str, str]:
    """The names of role and content in an entry of `conversations`: there are two conventions."""
    return ("role", "content") if isinstance(entry, dict) and "role" in entry else ("from", "value")


def _message(entry: Any, role_key: str, content_key: str) -> Message:
    """One message of a list."""
    if not isinstance(entry, dict):
        raise BadConversation(f"is {kind(entry)}, not an object")
    said = text(entry, role_key)
    if said.lower() not in _ROLES:
        raise BadConversation(f"has the unknown {role_key} {said!r}; known are {', '.join(_ROLES)}")
    role = _ROLES[said.lower()]
    _refuse(entry, _REFUSED_IN_MESSAGE)
    calls = calls_of(entry, said, content_key)
    if calls and role != "assistant":
        raise BadConversation(f"of {said} has 'tool_calls', which only an assistant makes")
    message: Message = {"role": role}
    if said == "function_call" or (calls and entry.get(content_key) is None):
        message["content"] = ""
    else:
        message["content"] = _content(entry, content_key)
    if calls:
        message["tool_calls"] = calls
    for name in ("name", "tool_call_id"):
        if entry.get(name) is not None:
            message[name] = text(entry, name)
    for name in _THOUGHTS:
        if entry.get(name):
            if role != "assistant" or "reasoning_content" in message:
                raise BadConversation(f"has {name!r}, which only an assistant has, and once")
            message["reasoning_content"] = text(entry, name)
    if not _learned(entry, role):
        message["learned"] = False
    return message


def _content(entry: dict, name: str) -> str:
    """A message's text, which may come in parts."""
    if not isinstance(entry.get(name), list):
        return text(entry, name)
    texts = []
    for part in entry[name]:
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            found = part.get("type") if isinstance(part, dict) else kind(part)
            raise BadConversation(f"has a part of the type {found!r} in {name!r}; only text can be trained on")
        texts.append(text(part, "text"))
    return "".join(texts)


def _learned(entry: dict, role: str) -> bool:
    """Whether an answer is to be trained on: weights, by any of their names, are 0 or 1."""
    learned = True
    for name in _WEIGHTS:
        value = entry.get(name)
        if value is None:
            continue
        if value not in (0, 1):  # False and True among them
            raise BadConversation(f"has {name!r} {value!r}; an answer is trained on (1, true) or not (0, false)")
        if value and role != "assistant":
            raise BadConversation(f"of {role} has {name!r} {value!r}, but only answers are trained on")
        learned &= bool(value)
    return learned


def _alpaca(record: dict) -> list[Message]:
    """A question and its answer, Alpaca's or Dolly's; its parts stay separate for the template that needs them."""
    answer_name = "response" if "output" not in record and "response" in record else "output"
    given_name = "context" if record.get("input") is None and "context" in record else "input"
    instruction, answer = text(record, "instruction"), _answer(record, answer_name)
    given = text(record, given_name) if record.get(given_name) is not None else ""
    messages: list[Message] = []
    for pair in record.get("history") or []:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(each, str) for each in pair)):
            raise BadConversation("has a 'history' that is not a list of pairs of strings, question and answer")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    content = "\n\n".join(filter(None, (instruction, given)))
    question = {"role": "user", "content": content, "instruction": instruction, "input": given}
    return [*messages, question, {"role": "assistant", "content": answer}]


def _completion(record: dict) -> list[Message]:
    """A prompt and its completion: two strings, or two lists of messages; only the completion is trained on."""
    name = "response" if record.get("completion") is None and "response" in record else "completion"
    if record.get("label") is False:
        raise BadConversation("has 'label' false, which marks an unwanted completion; leave it out")
    if isinstance(record["prompt"], list):
        before = [message | {"learned": False} for message in _listed(record, "prompt")]
        before = [message if message["role"] == "assistant" else _without(message, "learned") for message in before]
        if not isinstance(record.get(name), list):
            return [*before, {"role": "assistant", "content": _answer(record, name)}]
        return before + _listed(record, name)
    question, answer = text(record, "prompt"), _answer(record, name)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _without(message: Message, name: str) -> Message:
    return {key: value for key, value in message.items() if key != name}


_READERS: dict[str, Callable[[dict], list[Message]]] = {
    "messages": partial(_listed, field="messages"),
    "conversations": partial(_listed, field="conversations"),
    "instruction": _alpaca,
    "prompt": _completion,
}
_FIELDS = {
    "instruction": ("output", "response", "input", "context", "history"),
    "prompt": ("completion", "response"),
}
"""Further fields of a form, besides the one by which it is recognised."""
_TEXTS = ("instruction", "prompt")


def _put_system(record: dict, messages: list[Message]) -> None:
    """Make a system prompt in a field of its own the first message."""
    given = {name: text(record, name) for name in ("system", "system_prompt") if record.get(name)}
    for name, content in given.items():
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": content})
        elif messages[0]["content"] != content:
            raise BadConversation(f"has {name!r} beside another system prompt; which of them is meant?")


def _refuse(fields: dict, names: Any) -> None:
    """Refuse fields that would change the conversation, unless they are empty."""
    for name in names:
        value = fields.get(name)
        says = value not in (None, 1) if name in _WEIGHTS else value or (name in _NOT_EVEN_FALSE and value is not None)
        if says:
            raise BadConversation(f"has {name!r}, which is not supported here; take it out if it is not meant")


def _answer(fields: dict, name: str) -> str:
    answer = text(fields, name)
    if _says_nothing(answer):
        raise BadConversation(f"has an empty {name!r}, {_NOTHING}")
    return answer


def _says_nothing(answer: str) -> bool:
    """Whether an answer has nothing visible in it, apart from its thoughts."""
    said = _THINKING.sub("", answer, count=1)
    return not any(each.isprintable() and not each.isspace() for each in said)


def _check_order(messages: list[Message]) -> None:
    """A system prompt or none, a greeting or none, then user and assistant in turn, with no empty answer.

    What follows the last answer is not trained on, so it may be a question (or a tool's result).
    Between an assistant's call of tools and its next message come the tools' results.
    """
    first = 1 if messages and messages[0]["role"] == "system" else 0
    greets = [each["role"] for each in messages[first : first + 2]] == ["assistant", "user"] and len(
        messages
    ) > first + 2
    previous = messages[first] if greets else None
    start = first + bool(greets)
    for number, message in enumerate(messages[start:], start + 1):
        expected = _expected(previous)
        if message["role"] not in expected:
            raise BadConversation(
                f"roles out of order: message {number} is of {message['role']}, expected {' or '.join(expected)}"
            )
        previous = message
    if len(messages) == first:
        raise BadConversation("holds no question and answer")
    answers = {number: each for number, each in enumerate(messages[start:], start + 1) if each["role"] == "assistant"}
    if not answers:
        raise BadConversation("ends with a question that has no answer")
    learned = {number: each for number, each in answers.items() if each.get("learned", True)}
    if not learned:
        raise BadConversation("has no answer to train on: all have the weight 0")
    for number, each in learned.items():
        if not each.get("tool_calls") and _says_nothing(each["content"]):
            raise BadConversation(f"has an empty answer as message {number}, {_NOTHING}")


def _expected(previous: Message | None) -> tuple[str, ...]:
    """Roles that may follow a message."""
    if previous is not None and previous["role"] == "assistant":
        return ("tool",) if previous.get("tool_calls") else ("user",)
    if previous is not None and previous["role"] == "tool":
        return ("assistant", "tool")
    return ("user",) if previous is None else ("assistant",)
