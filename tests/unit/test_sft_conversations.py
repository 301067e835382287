"""Conversations as people write them: the shapes that are taken, and one line for each that is not."""

import gzip
import json
from pathlib import Path

import pytest

from megatron_meap.errors import UsageError
from megatron_meap.sft.conversations import BadConversation, parse, read_conversations

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}

GOOD = {
    "messages": ({"messages": [USER, ASSISTANT]}, [USER, ASSISTANT]),
    "messages with a system prompt": ({"messages": [SYSTEM, USER, ASSISTANT]}, [SYSTEM, USER, ASSISTANT]),
    "several turns": ({"messages": [USER, ASSISTANT] * 3}, [USER, ASSISTANT] * 3),
    "conversations": ({"conversations": [HUMAN, GPT]}, [USER, ASSISTANT]),
    "conversations with a system field": ({"conversations": [HUMAN, GPT], "system": "s"}, [SYSTEM, USER, ASSISTANT]),
    "the official field": ({"conversations": [HUMAN, GPT], "system_prompt": "s"}, [SYSTEM, USER, ASSISTANT]),
    "an empty answer": (
        {"messages": [USER, {"role": "assistant", "content": ""}]},
        [USER, ASSISTANT | {"content": ""}],
    ),
    "alpaca": (
        {"instruction": "i", "input": "x", "output": "a"},
        [{"role": "user", "content": "i\n\nx", "instruction": "i", "input": "x"}, ASSISTANT],
    ),
    "alpaca without input": (
        {"instruction": "i", "output": "a"},
        [{"role": "user", "content": "i", "instruction": "i", "input": ""}, ASSISTANT],
    ),
}

BAD = {
    "no object": (["messages"], "expected an object"),
    "none of the fields": ({"text": "x"}, "none of the fields"),
    "empty": ({"messages": []}, "'messages' is empty"),
    "no list": ({"conversations": "x"}, "'conversations' is a string, not a list"),
    "only a system prompt": ({"messages": [SYSTEM]}, "holds no question and answer"),
    "an answer first": ({"messages": [ASSISTANT, USER]}, "out of order: message 1 is of assistant, expected user"),
    "two questions": ({"messages": [USER, USER, ASSISTANT]}, "out of order: message 2 is of user"),
    "a late system prompt": ({"messages": [USER, ASSISTANT, SYSTEM]}, "out of order: message 3 is of system"),
    "no answer at the end": ({"messages": [USER, ASSISTANT, USER]}, "ends with a question"),
    "an unknown role": ({"messages": [{"role": "tool", "content": "x"}]}, "message 1 has the unknown role 'tool'"),
    "a missing field": ({"conversations": [HUMAN, {"from": "gpt"}]}, "message 2 has no 'value'"),
    "a number": ({"messages": [USER, {"role": "assistant", "content": 3}]}, "message 2 has a number as 'content'"),
    "null": ({"messages": [{"role": "user", "content": None}]}, "message 1 has null as 'content'"),
    "a message that is none": ({"messages": ["hello"]}, "message 1 is a string, not an object"),
    "alpaca without output": ({"instruction": "i"}, "has no 'output'"),
    "alpaca with a list": ({"instruction": "i", "input": ["x"], "output": "a"}, "has a list as 'input'"),
    "a system prompt of another kind": ({"messages": [USER, ASSISTANT], "system": 5}, "a number as 'system'"),
}


@pytest.mark.parametrize("name", GOOD)
def test_shapes(name: str) -> None:
    record, messages = GOOD[name]
    assert parse(record) == messages


@pytest.mark.parametrize("name", BAD)
def test_bad_records_say_what_is_wrong(name: str) -> None:
    record, message = BAD[name]
    with pytest.raises(BadConversation, match=message):
        parse(record)


def test_bad_lines_are_named_and_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = json.dumps({"messages": [USER, ASSISTANT]})
    path.write_text(f'{good}\n\n{{"messages": []}}\nnot json\n{good}\n{{"messages": [')
    bad: list[UsageError] = []
    read = list(read_conversations(str(path), bad.append))
    assert [each.place for each in read] == [f"{path}, line 1", f"{path}, line 5"]
    assert [str(error).partition(":")[0] for error in bad] == [f"{path}, line {number}" for number in (3, 4, 6)]
    assert "not JSON" in str(bad[1])


def test_json_lists_and_compressed_files(tmp_path: Path) -> None:
    records = [{"instruction": "i", "output": "a"}, {"instruction": "i"}]
    plain, packed = tmp_path / "alpaca.json", tmp_path / "alpaca.json.gz"
    plain.write_text("\ufeff" + json.dumps(records, indent=1))
    packed.write_bytes(gzip.compress(json.dumps(records).encode()))
    for path in (plain, packed):
        bad: list[UsageError] = []
        assert len(list(read_conversations(str(path), bad.append))) == 1
        assert str(bad[0]).startswith(f"{path}, entry 2: has no 'output'")


@pytest.mark.parametrize("content", [b"\x1f\x8b damaged", b"[1, 2"])
def test_unreadable_files_are_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=str(path)):
        list(read_conversations(str(path), lambda _: None))
