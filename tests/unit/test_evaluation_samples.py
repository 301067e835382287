"""Samples of the generated tasks have the length, depth and position they claim, and are the same for a seed."""

import json
import re
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_meap.errors import UsageError
from megatron_meap.evaluation.suites import make_plan
from megatron_meap.evaluation.tasks import documents, judge, keyvalue, kinship, needle
from megatron_meap.evaluation.tasks.commonsense import piqa
from megatron_meap.evaluation.tasks.options import Options, counter
from tests.fake_models import look_up

QUESTIONS = [
    {
        "question": f"who wrote book {i}",
        "answers": [f"Author{i}"],
        "ctxs": [{"title": f"Book {i}", "text": f"Book {i} was written by Author{i}.", "isgold": True}],
    }
    for i in range(30)
]


@pytest.fixture(scope="module")
def options(character_tokenizer: Path) -> Options:
    return Options(str(character_tokenizer), max_seq_lengths=(1024, 2048), samples=3)


@pytest.fixture
def qa_file(tmp_path: Path) -> Path:
    path = tmp_path / "qa.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)))
    return path


def test_needles_stand_where_they_should(options: Options) -> None:
    samples = needle.samples(options)
    assert [(s["length"], s["depth"]) for s in samples[::3]] == list(product((1024, 2048), (0, 25, 50, 75, 100)))
    count = counter(options.tokenizer)
    for sample in samples:
        context = sample["prompt"].split("\n\n")[0]
        before, found, after = context.partition(f" is {sample['answer']}.")
        assert found
        start = before.rindex("The special magic number")
        depth = 100 * start / (start + len(after) or 1)
        assert abs(depth - sample["depth"]) < 100 * 210 / len(context)  # one sentence, at most 200 characters
        assert count(sample["prompt"]) + 32 == sample["tokens"] <= sample["length"]
        assert sample["tokens"] > sample["length"] - 210
        assert look_up(sample["prompt"]) == sample["answer"] == sample["choices"][sample["gold"]].strip()


CHAT = (
    "{% for message in messages %}</s>{{ 'Question: ' if message.role == 'user' else 'Answer:' }}{{ message.content }}"
    "{% endfor %}{{ '</s>Answer:' if add_generation_prompt }}"
)


@pytest.fixture
def chat_options(options: Options, tmp_path: Path) -> Options:
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    tokenizer.chat_template, tokenizer.bos_token = CHAT, "</s>"
    tokenizer.save_pretrained(tmp_path / "chat")
    return replace(options, tokenizer=str(tmp_path / "chat"), chat_template=True)


def test_a_chat_template_takes_its_part_of_the_context(options: Options, chat_options: Options) -> None:
    around = len("Question: Answer:") + 2  # </s> is one token
    assert chat_options.count("abc") == around + 3
    for samples in (needle.samples, keyvalue.samples, kinship.samples):
        for sample in samples(replace(chat_options, max_seq_lengths=(1024,), samples=1, kv_digits=4)):
            room = sample["tokens"] - len(sample["prompt"]) - around
            assert room in (32, 64)
            assert sample["tokens"] <= 1024
    with pytest.raises(UsageError, match=r"--chat-template: the tokenizer of .* has none"):
        needle.samples(replace(options, chat_template=True))


def test_the_same_seed_gives_the_same_samples(options: Options) -> None:
    for samples in (needle.samples, keyvalue.samples, kinship.samples):
        assert samples(options) == samples(options)
        assert samples(options) != samples(replace(options, seed=5))


def test_a_needle_of_the_users_own(options: Options, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The grass is green. The sky is blue. " * 60)
    own = replace(options,
        haystack=str(text), needle="The best thing to do in {key} is to eat a sandwich.", max_seq_lengths=(512,),
        question="The best thing to do in {key} is", answer="eat a sandwich",
    )  # fmt: skip
    sample = needle.samples(own)[0]
    assert sample["choices"] == [" eat a sandwich"]
    assert "The grass is green." in sample["prompt"]
    assert sample["prompt"].count("to eat a sandwich") == 1
    with pytest.raises(UsageError, match="nothing to choose from"):
        needle.dataset(ranked=True, **asdict(own))
    with pytest.raises(UsageError, match="does not hold the answer"):
        needle.samples(replace(own, answer="sleep"))
    with pytest.raises(UsageError, match=r"only \{key\} and \{value\}"):
        needle.samples(replace(own, question="Where is {town}?"))
    with pytest.raises(UsageError, match="holds about"):
        needle.samples(replace(own, max_seq_lengths=(4096,)))
    with pytest.raises(UsageError, match="use longer contexts"):
        needle.samples(replace(own, max_seq_lengths=(64,)))


def test_key_value_pairs_by_position(options: Options) -> None:
    samples = keyvalue.samples(replace(options, kv_digits=4, max_seq_lengths=(512,)))
    pairs = samples[0]["pairs"]
    assert [s["position"] for s in samples[:5]] == [round(i * (pairs - 1) / 4) for i in range(5)]
    for sample in samples:
        keys = re.findall(r'"(\w+)": "(\w+)"', sample["prompt"])
        assert keys[sample["position"]][1] == sample["answer"] == look_up(sample["prompt"])
        assert len(keys) == pairs
        assert sample["tokens"] <= 512
        assert len(sample["choices"]) == 10
        assert sample["choices"][sample["gold"]] == f' "{sample["answer"]}"'
    assert samples[0]["answer"] == samples[4]["answer"]  # one object, asked for one pair at every place
    with pytest.raises(UsageError, match="no room for two"):
        keyvalue.samples(replace(options, max_seq_lengths=(200,)))
    with pytest.raises(UsageError, match="too few"):
        keyvalue.samples(replace(options, kv_digits=2, kv_pairs=200))


def test_the_originals_key_value_file(options: Options, shared_data: Path) -> None:
    path = shared_data / "kv-retrieval-75_keys.jsonl.gz"
    samples = keyvalue.samples(replace(options, kv_file=str(path), samples=2))
    assert [s["position"] for s in samples] == [0, 18, 37, 56, 74] * 2
    assert all(look_up(s["prompt"]) == s["answer"] for s in samples)


def test_kinship_chains_lead_to_the_eldest(options: Options) -> None:
    samples = kinship.samples(options)
    assert [s["needles"] for s in samples[::3]] == [2, 3, 4, 5] * 2
    for sample in samples:
        assert look_up(sample["prompt"]) == sample["answer"]
        assert len(sample["choices"]) == sample["needles"]
        assert sample["tokens"] <= sample["length"]
        assert all(choice.strip() in sample["prompt"] for choice in sample["choices"])


def test_the_eldest_of_a_ranked_chain_is_not_told_by_how_often_it_is_named(options: Options) -> None:
    samples = kinship.samples(replace(options, samples=20), ranked=True)
    guessed = 0.0
    for sample in samples:
        assert look_up(sample["prompt"]) == sample["answer"]
        assert len(sample["choices"]) == 2 * sample["needles"]
        names = [choice.strip() for choice in sample["choices"]]
        counts = [sample["prompt"].count(name) for name in names]
        rarest = [name for name, count in zip(names, counts, strict=True) if count == min(counts)]
        guessed += (sample["answer"] in rarest) / len(rarest)
    assert 0.3 < guessed / len(samples) < 0.7


def test_documents_by_position(options: Options, qa_file: Path) -> None:
    samples = documents.samples(replace(options, qa_file=str(qa_file)), 10)
    assert [s["position"] for s in samples] == [0, 4, 9] * 3
    for sample in samples:
        listed = re.findall(r"^Document \[\d+\].*$", sample["prompt"], re.MULTILINE)
        holding = [i for i, text in enumerate(listed) if re.search(rf"\b{sample['answers'][0]}\.", text)]
        assert len(listed) == 10
        assert holding == [sample["position"]]
        assert sample["answer_tokens"] == len(sample["target"])
    assert "Document" not in documents.samples(replace(options, qa_file=str(qa_file)), 0)[0]["prompt"]
    assert documents.samples(replace(options, qa_file=str(qa_file)), 1)[0]["prompt"].count("Document [") == 1
    assert {s["meap_group"] for s in samples} == {"question 0", "question 1", "question 2"}
    odd = QUESTIONS[0] | {"answers": ["*", "Author0"]}  # nothing is left of * without punctuation
    qa_file.write_text("\n".join(map(json.dumps, [odd, *QUESTIONS[1:]])))
    assert len(documents.samples(replace(options, qa_file=str(qa_file), samples=30), 10)) == 90
    with pytest.raises(UsageError, match="too few documents"):
        documents.samples(replace(options, qa_file=str(qa_file)), 40)


def test_own_distractors_come_first(options: Options, tmp_path: Path) -> None:
    row = QUESTIONS[0] | {
        "ctxs": [
            {"title": "A", "text": "first", "isgold": False, "hasanswer": False},
            {"title": "B", "text": "Author0 too", "isgold": False, "hasanswer": True},
            QUESTIONS[0]["ctxs"][0],
            {"title": "C", "text": "second", "isgold": False, "hasanswer": False},
        ]
    }
    path = tmp_path / "qa.jsonl"
    path.write_text(json.dumps(row))
    (prompt,) = {s["prompt"] for s in documents.samples(replace(options, qa_file=str(path), qa_positions=(1,)), 3)}
    assert re.findall(r"\(Title: (\w+ ?\d?)\)", prompt) == ["A", "Book 0", "C"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q"}', "not a row of lost-in-the-middle (no 'answers'); expected question, answers, and ctxs"),
        ("not json", ":31: not JSON"),
        ('{"question": "q", "answers": ["a"], "ctxs": [{"title": 1, "text": 2}, {"title": 3, "text": 4}]}', "isgold"),
        ('{"question": "q", "answers": [], "ctxs": []}', "must be text"),
        ("[1]", "expected a JSON object"),
    ],
)  # fmt: skip
def test_questions_of_another_format_are_named_by_their_line(
    options: Options, qa_file: Path, line: str, message: str
) -> None:
    qa_file.write_text(qa_file.read_text() + "\n" + line)
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        documents.samples(replace(options, qa_file=str(qa_file)), 10)
    assert f"{qa_file}:31" in str(caught.value)


def test_bad_files_and_options(options: Options, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"document": ""}\n')
    calls = {
        "no such file": lambda: piqa(tokenizer=options.tokenizer, piqa_file=str(tmp_path / "missing.jsonl")),
        "broken.jsonl:1: expected": lambda: judge.samples(replace(options, summaries_file=str(broken))),
        "not a row of lost-in-the-middle": lambda: keyvalue.samples(replace(options, kv_file=str(broken))),
        "--qa-file: needed": lambda: documents.samples(options, 10),
        "expected a JSON object with the field text": lambda: needle.samples(replace(options, haystack=str(broken))),
        "must lie between 0 and 100": lambda: Options.from_metadata({"tokenizer": "x", "depths": [120]}),
        "need a tokenizer": lambda: Options.from_metadata({}),
        "no tokenizer that transformers can load": lambda: counter(str(tmp_path)),
        "a model's context is only 100": lambda: make_plan("quick", [], {"max_seq_lengths": [200]}, 100),
        "--qa-file: needed for meap_multidoc10": lambda: make_plan(None, ["meap_multidoc10"], {}, 4096),
        "nothing to run": lambda: make_plan(None, [], {}, 4096),
    }
    for message, call in calls.items():
        with pytest.raises(UsageError, match="(?i)" + re.escape(message)):
            call()


def test_suites_say_what_they_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEAP_JUDGE_URL", raising=False)
    plan = make_plan("paper", [], {"summaries_file": "x.jsonl"}, 8192)
    assert plan.left_out["meap_multidoc10"] == "needs --qa-file"
    assert plan.left_out["meap_faithfulness"] == "needs --judge-url and --judge-model"
    assert plan.metadata["max_seq_lengths"] == [1024, 2048, 4096, 8192]
    assert {"hellaswag", "winogrande", "arc_challenge", "meap_needle"} <= set(plan.tasks)


def test_long_documents_are_shortened(options: Options, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"document": "word " * n}) for n in (20, 1000)))
    short, long = judge.samples(replace(options, summaries_file=str(path), max_seq_lengths=(512,)))
    assert not short["shortened"]
    assert long["shortened"]
    assert long["tokens"] <= 512
