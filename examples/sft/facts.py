"""Invented people: texts to pretrain on, and questions with distractor documents for fine-tuning and evaluation."""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_meap.evaluation.tasks.documents import Document, closed_book, open_book

DOCUMENTS = 4
"""Documents of a question: one holds the answer, the others are about other people."""

_WORDS = """
    baker judge nurse pilot tailor farmer singer doctor painter sailor teacher lawyer miner poet cook clerk
    Lima Oslo Rome Cairo Delhi Paris Tokyo Quito Accra Dublin Berlin Havana Lisbon Madrid Moscow Nairobi
    apples pears plums figs dates limes mangos grapes melons cherries lemons oranges peaches berries nuts kiwis
    red blue green white black yellow grey brown pink orange purple golden silver beige violet crimson
    cat dog horse goat parrot rabbit turtle pony hamster canary duck sheep mule hen owl donkey
    piano flute drum harp violin guitar organ trumpet cello banjo horn lute oboe viola bugle zither
"""
TRAITS = [line.split() for line in _WORDS.strip().splitlines()]
"""The traits of a person, in this order: job, city, fruit, colour, pet, instrument."""
NAMES = [f"{a}{b}{c}{d}" for a in "BDFGKLMNPRSTVZ" for b in "aeiou" for c in "dnl" for d in "ao"]


@dataclass(frozen=True)
class Person:
    """A person whom one document describes."""

    name: str
    description: str
    """The name and the traits."""

    @property
    def document(self) -> Document:
        """The document as it is in a prompt."""
        return Document(self.name, self.description)


def people(draw: random.Random, count: int) -> list[Person]:
    """That many people who have no trait in common, so that an answer is in one document only."""
    columns = [draw.sample(words, count) for words in (NAMES, *TRAITS)]
    return [Person(name, " ".join([name, *traits])) for name, *traits in zip(*columns, strict=True)]


def question(person: Person) -> str:
    """The question; the answer is the description."""
    return f"who is {person.name}?"


def write_texts(path: Path, seed: int, count: int) -> None:
    """Texts to pretrain on, which describe each person repeatedly, so that a model learns to copy.

    Half of them are only descriptions, the others have documents and answered questions.
    """
    draw = random.Random(seed)
    texts = []
    for number in range(count):
        group = people(draw, draw.randint(2, DOCUMENTS))
        again = draw.choices(group, k=8)
        lines = [each.description for each in [*group, *again]]
        if number % 2:
            asked = [f"{closed_book(question(each))} {each.description}" for each in again[1:]]
            first = open_book(question(again[0]), [each.document for each in group])
            lines = [f"{first} {again[0].description}", *asked]
        texts.append({"text": "\n".join(lines)})
    _write(path, texts)


def write_conversations(path: Path, seed: int, count: int) -> None:
    """Questions to fine-tune on, over 1 to `DOCUMENTS` documents; their prompts are those of the evaluation."""
    draw = random.Random(seed)
    conversations = []
    for _ in range(count):
        group = people(draw, draw.randint(1, DOCUMENTS))
        gold = draw.choice(group)
        prompt = open_book(question(gold), [each.document for each in group])
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": gold.description}]
        conversations.append({"messages": messages, "text": f"{prompt} {gold.description}"})  # for the tokenizer
    _write(path, conversations)


def write_questions(path: Path, seed: int, count: int) -> None:
    """Questions to evaluate on, in the format of lost-in-the-middle: `tools/evaluate.py --qa-file`."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        gold, *others = people(draw, DOCUMENTS)
        documents = [
            {"title": each.name, "text": each.description, "isgold": each is gold, "hasanswer": each is gold}
            for each in (gold, *others)
        ]
        rows.append({"question": question(gold), "answers": [gold.description], "ctxs": documents})
    _write(path, rows)


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
