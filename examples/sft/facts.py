"""A world of made-up people: text to pretrain on, questions with distractor documents to fine-tune on and to ask."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

SYSTEM = "Answer from the documents."
DOCUMENTS = 5
"""Documents of a question: one holds the answer, the others are about other people."""

_WORDS = """
    baker judge nurse pilot tailor farmer singer doctor painter sailor teacher lawyer miner poet cook clerk
    Lima Oslo Rome Cairo Delhi Paris Tokyo Quito Accra Dublin Berlin Havana Lisbon Madrid Moscow Nairobi
    apples pears plums figs dates limes mangos grapes melons cherries lemons oranges peaches berries nuts kiwis
    red blue green white black yellow grey brown pink orange purple golden silver beige violet crimson
    cat dog horse goat parrot rabbit turtle pony hamster canary duck sheep mule hen owl donkey
    piano flute drum harp violin guitar organ trumpet cello banjo horn lute oboe viola bugle zither
    oak elm ash birch cedar maple willow pine poplar beech larch cypress yew rowan alder hazel
    tea milk cider water coffee juice cocoa wine beer rum soup broth syrup ale mead punch
"""
TRAITS = [line.split() for line in _WORDS.strip().splitlines()]
"""What there is to know of a person, in this order: job, city, fruit, colour, pet, instrument, tree, drink."""
NAMES = [f"{a}{b}{c}{d}" for a in "BDFGKLMNPRSTVZ" for b in "aeiou" for c in "dnl" for d in "ao"]


def people(draw: random.Random, count: int) -> list[str]:
    """Descriptions of that many people who have nothing in common; what is true of them holds in one text only."""
    columns = [draw.sample(words, count) for words in (NAMES, *TRAITS)]
    return [f"{' '.join(words)}." for words in zip(*columns, strict=True)]


def question(group: list[str], gold: int) -> list[dict[str, str]]:
    """A question about person number `gold` of the group, whom the documents describe in this order."""
    documents = "\n".join(f"Document [{number}] {each}" for number, each in enumerate(group, 1))
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"{documents}\nQuestion: {group[gold].split()[0]}?"},
        {"role": "assistant", "content": group[gold]},
    ]


def questions(seed: int, count: int) -> Iterator[tuple[int, list[dict[str, str]]]]:
    """Gold position and messages; the positions take turns."""
    draw = random.Random(seed)
    for number in range(count):
        yield number % DOCUMENTS, question(people(draw, DOCUMENTS), number % DOCUMENTS)


def write_texts(path: Path, seed: int, count: int) -> None:
    """Texts to pretrain on: people described, and some of them described again further on."""
    draw = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(count):
            group = people(draw, draw.randint(2, DOCUMENTS))
            again = draw.choices(group, k=20)
            file.write(json.dumps({"text": "\n".join([*group, *again])}) + "\n")


def write_conversations(path: Path, seed: int, count: int) -> None:
    """Questions to fine-tune on, as JSON lines; `text` is there for the tokenizer to learn their words from.

    They have 1 to `DOCUMENTS` documents: a model this small learns to look up from the short ones first.
    """
    draw = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(count):
            group = people(draw, draw.randint(1, DOCUMENTS))
            messages = question(group, draw.randrange(len(group)))
            system, asked, answer = (message["content"] for message in messages)
            text = f"{system} USER: {asked} ASSISTANT: {answer}"
            file.write(json.dumps({"messages": messages, "text": text}) + "\n")
