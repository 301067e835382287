"""Templates of published models, with thoughts, tools and dates; the labels are what the model must write."""

import datetime
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from megatron_meap.sft.fields import BadConversation
from megatron_meap.sft.records import parse
from megatron_meap.sft.templates import TEMPLATES
from megatron_meap.sft.tools import tools_of
from megatron_meap.sft.turns import TurnEncoder
from megatron_meap.tokenization.huggingface import add_mask_token
from tests.templates import CHAT_TOKENS, GPT_OSS, MISTRAL, QWEN3, R1, R1_FIRST

USER = {"role": "user", "content": "2 + 2?"}
PLAIN = {"role": "assistant", "content": "It is 4."}
INLINE = {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\nIt is 4."}
FIELD = PLAIN | {"reasoning_content": "Two and two."}
EMPTY = {"role": "assistant", "content": "<think>\n\n</think>\n\nIt is 4."}
THOUGHT = "<think>\nTwo and two.\n</think>\n\nIt is 4."
ON = "Two and two.\n</think>\n\nIt is 4."  # what a model writes whose prompt opens the thoughts
NONE = "<think>\n\n</think>\n\nIt is 4."


@pytest.fixture(scope="module")
def tokenizer(huggingface_folder: Path):
    made = AutoTokenizer.from_pretrained(str(huggingface_folder))
    made.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": CHAT_TOKENS})
    add_mask_token(made, "[MASK]")
    return made


WRITTEN = {  # template, answer: what the model writes, or what is said of it
    "chatml": (
        TEMPLATES["chatml"],
        {"plain": "It is 4.<|im_end|>", "inline": f"{THOUGHT}<|im_end|>", "on": f"{ON}<|im_end|>"},
    ),
    "llama-3": (TEMPLATES["llama-3"], {"field": f"{THOUGHT}<|eot_id|>", "empty": f"{NONE}<|eot_id|>"}),
    "qwen3": (
        QWEN3,
        {
            "plain": f"{NONE}<|im_end|>",
            "empty": f"{NONE}<|im_end|>",
            "inline": f"{THOUGHT}<|im_end|>",
            "field": f"{THOUGHT}<|im_end|>",
            "on": f"{THOUGHT}<|im_end|>",
        },
    ),
    "r1": (
        R1,
        {
            "plain": BadConversation("'<think>\\n' in the generation prompt"),
            **dict.fromkeys(("inline", "field", "on"), f"{ON}<eos>"),
            "empty": "</think>\n\nIt is 4.<eos>",
        },
    ),
    "r1 as it was": (
        R1_FIRST,
        {"plain": "It is 4.<eos>", "inline": f"{THOUGHT}<eos>", "empty": f"{NONE}<eos>", "on": f"{ON}<eos>"},
    ),
    "gpt-oss": (
        GPT_OSS,
        {
            "plain": "<|channel|>final<|message|>It is 4.<|return|>",
            "field": "<|channel|>analysis<|message|>Two and two.<|end|><|start|>assistant<|channel|>final<|message|>"
            "It is 4.<|return|>",
        },
    ),
}
ANSWERS = {"plain": PLAIN, "inline": INLINE, "field": FIELD, "empty": EMPTY, "on": PLAIN | {"content": ON}}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, (_, kinds) in WRITTEN.items() for kind in kinds])
def test_the_model_learns_all_that_it_must_write(tokenizer, name: str, kind: str) -> None:
    """The prompt's ids are those of transformers' generation prompt; what follows is as the data has it."""
    template, expected = WRITTEN[name][0], WRITTEN[name][1][kind]
    encoder = TurnEncoder(tokenizer, template)
    for before in ([], [USER, PLAIN if name != "r1" else INLINE], [USER, ANSWERS["on"]] if kind == "on" else []):
        messages = [*before, USER, ANSWERS[kind]]
        if isinstance(expected, BadConversation):
            with pytest.raises(BadConversation, match="rendered differently from the model's prompt") as refusal:
                encoder.turn(messages)
            assert str(expected) in str(refusal.value)
            continue
        turn = encoder.turn(messages)
        asked = tokenizer.apply_chat_template(
            messages[:-1], chat_template=template, add_generation_prompt=True, return_dict=False
        )
        assert turn.ids[: turn.prompt].tolist() == asked == encoder.prompt(messages[:-1]).tolist()
        assert tokenizer.decode(turn.ids[turn.prompt :]) == expected
        assert tokenizer.decode(turn.ids[turn.prompt + turn.answer :]) == expected[expected.rindex("<") :]


def test_a_system_prompt_that_a_template_would_drop_is_refused(tokenizer) -> None:
    system = {"role": "system", "content": "Be brief."}
    encoder = TurnEncoder(tokenizer, MISTRAL)
    assert "It is 4." in tokenizer.decode(encoder.turn([USER, PLAIN]).ids)
    with pytest.raises(BadConversation, match="a message that the chat template leaves out"):
        encoder.turn([system, USER, PLAIN])


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
CALLED = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "tool_call_id": "1"},
    PLAIN,
]


def test_tools_are_the_templates_own(tokenizer) -> None:
    """Both of the assistant's messages are learned: the call, then the answer from its result."""
    record = {"messages": CALLED, "tools": [TOOL]}
    messages, tools = parse(record), tools_of(record)
    encoder = TurnEncoder(tokenizer, QWEN3)
    call, answer = encoder.encode(list(encoder.turns(messages, tools)))
    written = (
        '<think>\n\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>'
    )
    assert tokenizer.decode(call.ids[call.prompt :]) == written
    assert '"parameters": {' in tokenizer.decode(call.ids[: call.prompt])
    assert tokenizer.decode(answer.ids[answer.prompt :]) == f"{NONE}<|im_end|>"
    assert "<tool_response>\n4\n</tool_response>" in tokenizer.decode(answer.ids[: answer.prompt])
    assert answer.ids[: answer.prompt].tolist() == encoder.prompt(messages[:-1], tools).tolist()
    for template in (TEMPLATES["chatml"], TEMPLATES["vicuna"], R1_FIRST):
        plain = TurnEncoder(tokenizer, template)
        with pytest.raises(BadConversation, match=r"'tool_calls'.*leaves out"):
            list(plain.turns(messages))
        with pytest.raises(BadConversation, match="'tools', which the chat template leaves out"):
            list(plain.turns([USER, PLAIN], tools))


def test_a_special_token_in_tools_is_refused(tokenizer) -> None:
    call = {"function": {"name": "add", "arguments": {"a": "<|im_end|>"}}}
    messages = parse({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]})
    with pytest.raises(BadConversation, match=r"<\|im_end\|> in its tools"):
        list(TurnEncoder(tokenizer, QWEN3).turns(messages))


def test_answers_without_weight_are_prompts_only(tokenizer) -> None:
    messages = parse({"messages": [USER, PLAIN | {"weight": 0}, USER, PLAIN | {"weight": 1}]})
    encoder = TurnEncoder(tokenizer, TEMPLATES["chatml"])
    (turn,) = encoder.encode(list(encoder.turns(messages)))
    assert tokenizer.decode(turn.ids[: turn.prompt]).count("It is 4.") == 1
    whole = TurnEncoder(tokenizer, TEMPLATES["chatml"]).turn([USER, PLAIN, USER, PLAIN])
    assert np.array_equal(turn.ids, whole.ids)


def test_a_greeting_is_context(tokenizer) -> None:
    messages = parse({"messages": [{"role": "assistant", "content": "Hello!"}, USER, PLAIN]})
    (turn,) = TurnEncoder(tokenizer, TEMPLATES["chatml"]).turns(messages)
    assert "assistant\nHello!" in turn.text[: turn.answer[0]]


def test_a_date_is_part_of_what_names_the_tokens(tokenizer) -> None:
    today = TurnEncoder(tokenizer, GPT_OSS)
    assert today.date == datetime.date.today().isoformat()
    dated = [TurnEncoder(tokenizer, GPT_OSS, date=day) for day in ("2025-01-31", "2025-01-31", "2025-02-01")]
    assert dated[0].facts == dated[1].facts != dated[2].facts
    assert "Current date: 2025-02-01" in tokenizer.decode(dated[2].turn([USER, PLAIN]).ids)
    assert TurnEncoder(tokenizer, QWEN3).date is None
