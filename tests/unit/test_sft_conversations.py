"""Conversations as people write them: the accepted formats, and one line for each other one."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_meap.errors import UsageError
from megatron_meap.sft.conversations import read_conversations
from megatron_meap.sft.fields import BadConversation
from megatron_meap.sft.records import parse, unused
from megatron_meap.sft.tools import tools_of

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
GREETING = {"role": "assistant", "content": ""}
SYSTEM = {"role": "system", "content": "s"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}

GOOD = {
    "messages": ({"messages": [USER, ASSISTANT]}, [USER, ASSISTANT]),
    "messages with a system prompt": ({"messages": [SYSTEM, USER, ASSISTANT]}, [SYSTEM, USER, ASSISTANT]),
    "several turns": ({"messages": [USER, ASSISTANT] * 3}, [USER, ASSISTANT] * 3),
    "conversations": ({"conversations": [HUMAN, GPT]}, [USER, ASSISTANT]),
    "conversations with a system field": ({"conversations": [HUMAN, GPT], "system": "s"}, [SYSTEM, USER, ASSISTANT]),
    "the official field": ({"conversations": [HUMAN, GPT], "system_prompt": "s"}, [SYSTEM, USER, ASSISTANT]),
    "an empty answer as context": (
        {"messages": [USER, ASSISTANT | {"content": "", "weight": 0}, USER, ASSISTANT]},
        [USER, ASSISTANT | {"content": "", "learned": False}, USER, ASSISTANT],
    ),
    "an empty greeting": ({"messages": [GREETING, USER, ASSISTANT]}, [GREETING, USER, ASSISTANT]),
    "a question at the end": ({"conversations": [HUMAN, GPT, HUMAN]}, [USER, ASSISTANT, USER]),
    "alpaca": (
        {"instruction": "i", "input": "x", "output": "a"},
        [{"role": "user", "content": "i\n\nx", "instruction": "i", "input": "x"}, ASSISTANT],
    ),
    "alpaca without input": (
        {"instruction": "i", "output": "a"},
        [{"role": "user", "content": "i", "instruction": "i", "input": ""}, ASSISTANT],
    ),
    "conversations with role and content": ({"conversations": [USER, ASSISTANT]}, [USER, ASSISTANT]),
    "a greeting": ({"messages": [SYSTEM, ASSISTANT, USER, ASSISTANT]}, [SYSTEM, ASSISTANT, USER, ASSISTANT]),
    "other names of the roles": (
        {"messages": [SYSTEM | {"role": "developer"}, USER | {"role": "User"}, ASSISTANT | {"role": "model"}]},
        [SYSTEM, USER, ASSISTANT],
    ),
    "parts of text": (
        {"messages": [USER | {"content": [{"type": "text", "text": "q"}]}, ASSISTANT]},
        [USER, ASSISTANT],
    ),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, [USER, ASSISTANT]),
    "prompt and completion as messages": (
        {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
        [USER, ASSISTANT | {"learned": False}, USER, ASSISTANT],
    ),
    "dolly": (
        {"instruction": "i", "context": "x", "response": "a", "category": "qa"},
        [{"role": "user", "content": "i\n\nx", "instruction": "i", "input": "x"}, ASSISTANT],
    ),
    "alpaca with a history": (
        {"instruction": "i", "output": "a", "history": [["q", "a"]]},
        [USER, ASSISTANT, {"role": "user", "content": "i", "instruction": "i", "input": ""}, ASSISTANT],
    ),
    "the same system prompt twice": ({"messages": [SYSTEM, USER, ASSISTANT], "system": "s"}, [SYSTEM, USER, ASSISTANT]),
    "thoughts of their own": (
        {"messages": [USER, ASSISTANT | {"reasoning": "r"}]},
        [USER, ASSISTANT | {"reasoning_content": "r"}],
    ),
    "fields that say nothing": (
        {"messages": [USER | {"tool_calls": None}, ASSISTANT | {"weight": 1, "refusal": None}], "images": []},
        [USER, ASSISTANT],
    ),
    "an empty instruction": (
        {"instruction": "", "input": "q", "output": "a"},
        [USER | {"instruction": "", "input": "q"}, ASSISTANT],
    ),
    "a weight of axolotl's": (
        {"messages": [USER, ASSISTANT | {"training": False}, USER, ASSISTANT]},
        [USER, ASSISTANT | {"learned": False}, USER, ASSISTANT],
    ),
    "weights": (
        {"messages": [USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT | {"train": True}]},
        [USER, ASSISTANT | {"learned": False}, USER, ASSISTANT],
    ),
    "function calls of ShareGPT": (
        {
            "conversations": [
                HUMAN,
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "o"},
                GPT,
            ]
        },
        [
            USER,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
            },
            {"role": "tool", "content": "o"},
            ASSISTANT,
        ],
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
    "no answer at all": ({"messages": [SYSTEM, USER]}, "ends with a question that has no answer"),
    "two questions at the end": ({"messages": [USER, ASSISTANT, USER, USER]}, "out of order: message 4 is of user"),
    "an unknown role": (
        {"messages": [{"role": "narrator", "content": "x"}]},
        "message 1 has the unknown role 'narrator'",
    ),
    "a missing field": ({"conversations": [HUMAN, {"from": "gpt"}]}, "message 2 has no 'value'"),
    "a number": ({"messages": [USER, {"role": "assistant", "content": 3}]}, "message 2 has a number as 'content'"),
    "null": ({"messages": [{"role": "user", "content": None}]}, "message 1 has null as 'content'"),
    "a message that is none": ({"messages": ["hello"]}, "message 1 is a string, not an object"),
    "alpaca without output": ({"instruction": "i"}, "has no 'output'"),
    "alpaca with a list": ({"instruction": "i", "input": ["x"], "output": "a"}, "has a list as 'input'"),
    "an image": (
        {"messages": [USER | {"content": [{"type": "image_url"}]}, ASSISTANT]},
        "part of the type 'image_url'",
    ),
    "images beside": ({"messages": [USER, ASSISTANT], "images": ["x.png"]}, "has 'images', which is not supported"),
    "two system prompts": ({"messages": [SYSTEM, USER, ASSISTANT], "system": "t"}, "'system' beside another system"),
    "half a weight": ({"messages": [USER, ASSISTANT | {"weight": 0.5}]}, "message 2 has 'weight' 0.5"),
    "a question to train on": ({"messages": [USER | {"train": True}, ASSISTANT]}, "message 1 of user has 'train' True"),
    "nothing to train on": ({"messages": [USER, ASSISTANT | {"loss": False}]}, "no answer to train on"),
    "a conversation without weight": ({"messages": [USER, ASSISTANT], "weight": 0}, "has 'weight', which is not"),
    "thoughts of a user": ({"messages": [USER | {"thinking": "x"}, ASSISTANT]}, "message 1 has 'thinking', which only"),
    "a history beside messages": ({"messages": [USER, ASSISTANT], "history": [["q", "a"]]}, "has 'history', which is"),
    "a history that is none": ({"instruction": "i", "output": "a", "history": ["q"]}, "'history' that is not a list"),
    "a call without an answer": (
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}, USER]},
        "message 3 is of user, expected tool",
    ),
    "a call of nothing": ({"messages": [USER, ASSISTANT | {"tool_calls": [{}]}]}, "message 2 calls a tool without the"),
    "masks beside": ({"messages": [USER, ASSISTANT], "loss_mask": [0, 1]}, "has 'loss_mask', which is not supported"),
    "masks of parts": ({"messages": [USER, ASSISTANT | {"train_detail": [{}]}]}, "message 2 has 'train_detail'"),
    "a switch that is off": ({"messages": [USER, ASSISTANT], "enable_thinking": False}, "has 'enable_thinking', which"),
    "a pair of preference": ({"messages": [USER, ASSISTANT], "rejected": "b"}, "has 'rejected', which is not"),
    "a completion that is not wanted": ({"prompt": "q", "completion": "a", "label": False}, "has 'label' false"),
    "functions that are none": ({"messages": [USER, ASSISTANT], "functions": 5}, "has a number as 'functions'"),
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
        _ = parse(record), tools_of(record)


@pytest.mark.parametrize(
    "nothing", ["", " ", "\n\t\r\u3000", "<think>\nr\n</think>\n\n", "<think>cut off", [{"text": " "}]]
)
def test_an_answer_without_text_is_refused_by_its_name(nothing: Any) -> None:
    """In every shape, the first answer or a later one: it would teach to say nothing."""
    empty = ASSISTANT | {"content": nothing}
    records: dict[str, Any] = {
        "message 2": {"messages": [USER, empty, USER, ASSISTANT]},
        "message 4": {"messages": [USER, ASSISTANT, USER, empty | {"reasoning_content": "r"}]},
        "message 2 ": {"prompt": [USER], "completion": [empty]},
    }
    if isinstance(nothing, str):
        records |= {
            "message 3": {"system": "s", "conversations": [HUMAN, GPT | {"value": nothing}]},
            "'output'": {"instruction": "i", "input": "x", "output": nothing},
            "'response'": {"instruction": "i", "response": nothing},
            "'completion'": {"prompt": "q", "completion": nothing},
            " message 2": {"instruction": "i", "output": "a", "history": [["q", nothing]]},
        }
    for name, record in records.items():
        with pytest.raises(BadConversation, match=rf"has an empty .*{name.strip()}, which"):
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


@pytest.mark.parametrize("inside", ["", '"role": "system", '])
def test_a_key_that_occurs_twice_is_named(tmp_path: Path, inside: str) -> None:
    """Parsers take the last one, so that a conversation, or a part of one, would be lost without a word."""
    good = json.dumps({"messages": [USER, ASSISTANT]})
    twice = good.replace('"role": "user"', inside + '"role": "user"') if inside else f"{good[:-1]}, {good[1:]}"
    path, bad = tmp_path / "data.jsonl", list[UsageError]()
    path.write_text(f"{good}\n{twice}\n" + "[" * 1000 + "]" * 1000 + f'\n{{"n": {"9" * 5000}}}\n')
    assert len(list(read_conversations(str(path), bad.append))) == 1
    assert "line 2: the key" in str(bad[0])
    assert "occurs twice" in str(bad[0])
    assert len(bad) == 3
    path.write_text(f"[{twice}]")
    with pytest.raises(UsageError, match=r"data.jsonl: the key '\w+' occurs twice in an object; give each key once"):
        list(read_conversations(str(path), bad.append))


def test_json_lists_and_compressed_files(tmp_path: Path) -> None:
    records = [{"instruction": "i", "output": "a"}, {"instruction": "i"}]
    plain, packed = tmp_path / "alpaca.json", tmp_path / "alpaca.json.gz"
    plain.write_text("\ufeff" + json.dumps(records, indent=1))
    packed.write_bytes(gzip.compress(json.dumps(records).encode()))
    for path in (plain, packed):
        bad: list[UsageError] = []
        assert len(list(read_conversations(str(path), bad.append))) == 1
        assert str(bad[0]).startswith(f"{path}, entry 2: has no 'output'")


def test_parquet_is_read_like_json(tmp_path: Path) -> None:
    """Rows of several shapes share columns, so that what a row does not say is null."""
    import pyarrow
    import pyarrow.parquet

    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    records = [
        {"messages": [USER, ASSISTANT | {"weight": 1}], "source": "x"},
        {"messages": [USER, call, {"role": "tool", "content": "o"}, ASSISTANT]},
        {"messages": []},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "data.parquet")
    bad: list[UsageError] = []
    read = list(read_conversations(str(tmp_path / "data.parquet"), bad.append))
    assert [each.messages for each in read] == [parse(record) for record in records[:2]]
    assert [sorted(each.unused) for each in read] == [["source"], []]
    assert [str(error).partition(":")[0] for error in bad] == [f"{tmp_path}/data.parquet, row 3"]


def test_fields_that_change_nothing_are_told() -> None:
    record = {"messages": [USER | {"id": 1}, ASSISTANT], "category": "x", "prompt_id": 5, "tools": []}
    assert unused(record) == {"category", "prompt_id", "messages' id"}
    assert unused(record | {"prompt": "q", "instruction": None, "output": "a"}) >= {"prompt", "output"}
    assert "instruction" not in unused(record | {"instruction": None})
    assert tools_of(record) is None


NO_FILE = {
    "damaged": b"\x1f\x8b\x08 damaged",
    "no list": b"[1, 2",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 1\n",
    "pretty-printed": json.dumps({"messages": [USER, ASSISTANT]}, indent=1).encode(),
}


@pytest.mark.parametrize("content", NO_FILE.values(), ids=NO_FILE)
def test_unreadable_files_are_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=str(path)):
        list(read_conversations(str(path), lambda _: None))
