"""Chat templates and tokens: the same as rendered by transformers, with the answers located correctly."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_meap.errors import UsageError
from megatron_meap.sft.fields import BadConversation
from megatron_meap.sft.records import parse
from megatron_meap.sft.templates import TEMPLATES, ChatTemplate, find_template
from megatron_meap.sft.turns import TurnEncoder
from megatron_meap.tokenization.huggingface import add_mask_token, from_sentencepiece
from tests.conftest import Corpus
from tests.sft import conversations

CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATION = [
    SYSTEM,
    {"role": "user", "content": "What is a list?"},
    {"role": "assistant", "content": "A sequence."},
    {"role": "user", "content": " And a dict? "},
    {"role": "assistant", "content": "A mapping.\n"},
]


def sentencepiece(corpus: Corpus):
    tokenizer = from_sentencepiece(Path(corpus.tokenizer))
    add_mask_token(tokenizer, "[MASK]")
    return tokenizer


def huggingface(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": CHAT_TOKENS})
    add_mask_token(tokenizer, "[MASK]")
    return tokenizer


@pytest.fixture(params=["sentencepiece", "huggingface"])
def tokenizer(request: pytest.FixtureRequest, corpus: Corpus, huggingface_folder: Path):
    """A tokenizer of each kind, the second with the templates' markers as special tokens."""
    return sentencepiece(corpus) if request.param == "sentencepiece" else huggingface(huggingface_folder)


def turns(encoder: TurnEncoder, messages: list[dict]):
    return encoder.encode(list(encoder.turns(messages)))


PUBLISHED = {
    "llama-2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is a list? [/INST] A sequence. </s>"
    "<s>[INST] And a dict? [/INST] A mapping. </s>",
    "llama-3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhat is a list?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA sequence.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd a dict?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA mapping.<|eot_id|>",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is a list?<|im_end|>\n"
    "<|im_start|>assistant\nA sequence.<|im_end|>\n<|im_start|>user\n And a dict? <|im_end|>\n"
    "<|im_start|>assistant\nA mapping.\n<|im_end|>\n",
    "vicuna": "<s>Be brief. USER: What is a list? ASSISTANT: A sequence.</s>USER:  And a dict?  ASSISTANT: A mapping.\n"
    "</s>",
    "alpaca": "<s>Be brief.\n\n### Instruction:\nWhat is a list?\n\n### Response:\nA sequence.</s>"
    "\n\n### Instruction:\n And a dict? \n\n### Response:\nA mapping.\n</s>",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_named_templates_are_the_published_formats(corpus: Corpus, name: str) -> None:
    rendered = ChatTemplate(sentencepiece(corpus), TEMPLATES[name]).render(CONVERSATION)
    assert rendered.text == PUBLISHED[name]
    start, end = rendered.answer
    assert rendered.text[start:end].strip() == "A mapping."


def test_llama_2_strips_what_it_puts_together(corpus: Corpus) -> None:
    """As its published template: white space at the start of the first question stays, behind a system prompt."""
    template = ChatTemplate(sentencepiece(corpus), TEMPLATES["llama-2"])
    question, answer = {"role": "user", "content": "\n hi "}, {"role": "assistant", "content": " yes"}
    assert template.render([question, answer]).text == "<s>[INST] hi [/INST] yes </s>"
    with_system = template.render([{"role": "system", "content": " Be brief. "}, question, answer])
    assert with_system.text == "<s>[INST] <<SYS>>\n Be brief. \n<</SYS>>\n\n\n hi [/INST] yes </s>"


def test_alpaca_writes_its_own_preambles(corpus: Corpus) -> None:
    template = ChatTemplate(sentencepiece(corpus), TEMPLATES["alpaca"])
    start = "<s>Below is an instruction that describes a task"
    end = ". Write a response that appropriately completes the request.\n\n### Instruction:\nAdd."
    plain, given = ({"instruction": "Add.", "output": "3"} | more for more in ({}, {"input": "1 2"}))
    assert template.render(parse(plain)).text == f"{start}{end}\n\n### Response:\n3</s>"
    paired = ", paired with an input that provides further context"
    assert template.render(parse(given)).text == f"{start}{paired}{end}\n\n### Input:\n1 2\n\n### Response:\n3</s>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_apply_chat_template(tokenizer, corpus: Corpus, name: str) -> None:
    """For every turn of generated conversations, up to the end of its answer."""
    encoder = TurnEncoder(tokenizer, TEMPLATES[name])
    for record in conversations(corpus.documents, 60, seed=1):
        messages = parse(record)
        if any("<" in message["content"] for message in messages):
            continue
        first = 1 if messages[0]["role"] == "system" else 0
        for number, turn in enumerate(turns(encoder, messages)):
            until = messages[: first + 2 * number + 2]
            whole = tokenizer.apply_chat_template(until, chat_template=TEMPLATES[name], return_dict=False)
            ids = turn.ids.tolist()
            assert ids == whole[: len(ids)] or (ids[:-1] == whole and ids[-1] == tokenizer.eos_token_id)
            answer = tokenizer.decode(ids[turn.prompt : turn.prompt + turn.answer])
            assert until[-1]["content"].strip() in answer.strip()
            assert len(answer.strip()) <= len(until[-1]["content"].strip()) + 1  # of the marker that follows
            assert turn.prompt + turn.answer < len(ids)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_is_what_generation_begins_with(tokenizer, name: str) -> None:
    prompt = tokenizer.apply_chat_template(
        CONVERSATION[:-1], chat_template=TEMPLATES[name], add_generation_prompt=True, return_dict=False
    )
    assert turns(TurnEncoder(tokenizer, TEMPLATES[name]), CONVERSATION)[-1].ids.tolist()[: len(prompt)] == prompt


@pytest.mark.parametrize("name", TEMPLATES)
def test_special_tokens_within_messages_are_text(tokenizer, name: str) -> None:
    """Those of the template still become tokens, and nothing gives the mask token."""
    encoder = TurnEncoder(tokenizer, TEMPLATES[name])
    special = set(tokenizer.all_special_ids)
    clean = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say it"}]
    for hostile in ("[MASK]", tokenizer.eos_token, "<|eot_id|>", "<|im_end|>", "<|im_start|>"):
        messages = [{"role": m["role"], "content": f"{m['content']} {hostile} x"} for m in clean]
        (turn,), (plain,) = turns(encoder, messages), turns(encoder, clean)
        ids = turn.ids.tolist()
        assert [each for each in ids if each in special] == [each for each in plain.ids.tolist() if each in special]
        assert tokenizer.mask_token_id not in ids
        assert hostile in tokenizer.decode(ids[turn.prompt : turn.prompt + turn.answer])


def test_a_template_cannot_write_the_mask_token(tokenizer) -> None:
    encoder = TurnEncoder(tokenizer, "{% for m in messages %}[MASK]{{ m.content }}{{ eos_token }}{% endfor %}")
    (turn,) = turns(encoder, CONVERSATION[1:3])
    assert tokenizer.mask_token_id not in turn.ids
    assert int((turn.ids == tokenizer.eos_token_id).sum()) == 2


def test_a_special_token_half_of_the_template_is_text(corpus: Corpus) -> None:
    """`</` by the template and `s>` by the user: transformers would make it a token."""
    tokenizer = sentencepiece(corpus)
    encoder = TurnEncoder(tokenizer, "{% for m in messages %}q</{{ m.content }}{% endfor %}")
    (turn,) = turns(encoder, [{"role": "user", "content": "s> x"}, {"role": "assistant", "content": "a"}])
    assert (turn.ids[:-1] != tokenizer.eos_token_id).all()


def test_history(tokenizer) -> None:
    with_history, without = (
        turns(TurnEncoder(tokenizer, TEMPLATES["chatml"], flag), CONVERSATION) for flag in (True, False)
    )
    assert len(with_history) == len(without) == 2
    assert with_history[0].ids.tolist() == without[0].ids.tolist()
    assert "list" in tokenizer.decode(with_history[1].ids)
    text = tokenizer.decode(without[1].ids)
    assert "list" not in text
    assert "brief" not in text


def test_the_tokenizers_own_template(tokenizer) -> None:
    with pytest.raises(UsageError, match="no chat template; name one of alpaca"):
        TurnEncoder(tokenizer, None)
    tokenizer.chat_template = TEMPLATES["vicuna"]
    own, named = (turns(TurnEncoder(tokenizer, text), CONVERSATION) for text in (None, TEMPLATES["vicuna"]))
    assert [turn.ids.tolist() for turn in own] == [turn.ids.tolist() for turn in named]


def test_templates_that_cannot_be_used(corpus: Corpus, tmp_path: Path) -> None:
    tokenizer = sentencepiece(corpus)
    with pytest.raises(UsageError, match=r"--meap-sft-template llama-9: no such template; use alpaca"):
        find_template("llama-9")
    (tmp_path / "broken.jinja").write_text("{% for %}")
    with pytest.raises(UsageError, match="not usable"):
        ChatTemplate(tokenizer, find_template(str(tmp_path / "broken.jinja")))
    for deaf in ("hello", "{{ messages[0].content }}"):
        with pytest.raises(UsageError, match="not usable: a question and an answer is rewritten"):
            ChatTemplate(tokenizer, deaf)


def test_messages_that_a_template_refuses_or_rewrites(corpus: Corpus) -> None:
    tokenizer = sentencepiece(corpus)
    no_system = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[-1].content }}"
    )
    template = ChatTemplate(tokenizer, no_system)
    with pytest.raises(BadConversation, match="refused by the chat template: no system"):
        template.render(CONVERSATION)
    with pytest.raises(BadConversation, match="rewritten"):
        ChatTemplate(tokenizer, "{{ messages[-1].content[:5] }}").render(CONVERSATION)
    with pytest.raises(BadConversation, match="noncharacter"):
        template.render([{"role": "user", "content": "\ufdd0"}, {"role": "assistant", "content": "x"}])
