"""Question answering over many documents by the gold document's position (Liu et al. 2023, arXiv 2307.03172).

Files are those of lost-in-the-middle: JSON Lines with `question`, `answers` and `ctxs`, each `{title, text, isgold,
hasanswer}`. Where a row has fewer documents than asked for (the file `nq-open-oracle` has the gold one only), gold
documents of other questions that hold none of its answers stand in: random distractors, which are easier than
retrieved ones.
"""

from dataclasses import dataclass
from random import Random
from typing import Any

from megatron_meap.errors import UsageError, refusing
from megatron_meap.evaluation.tasks.files import rows
from megatron_meap.evaluation.tasks.haystack import generator_of
from megatron_meap.evaluation.tasks.keyvalue import positions
from megatron_meap.evaluation.tasks.options import GENERATED_TOKENS, Options, as_dataset
from megatron_meap.evaluation.tasks.scoring import normalise

ORIGINAL_POSITIONS = {10: (0, 4, 9), 20: (0, 4, 9, 14, 19), 30: (0, 4, 9, 14, 19, 24, 29)}


@dataclass(frozen=True)
class Document:
    """A passage."""

    title: str
    text: str

    def mentions(self, answers: list[str]) -> bool:
        """Whether it holds one of the answers, both normalised."""
        text = normalise(f"{self.title} {self.text}")
        return any(normalised in text for normalised in map(normalise, answers) if normalised)


@dataclass(frozen=True)
class Question:
    """A row of the file."""

    question: str
    answers: list[str]
    gold: Document
    others: list[Document]
    """The row's own documents that hold no answer, in the file's order."""


def dataset(documents: int | None = None, **metadata: Any) -> dict[str, Any]:
    """Questions over `documents` documents, for each gold position, as lm-eval's `custom_dataset`.

    Args:
        documents: 1 is the oracle, only the gold document; 0 is closed book.
        metadata: see `Options`.
    """
    options = Options.from_metadata(metadata)
    return as_dataset(samples(options, documents if documents is not None else options.qa_documents))


def samples(options: Options, documents: int) -> list[dict[str, Any]]:
    """`options.samples` questions, each asked with the gold document at every position.

    Returns:
        Rows with `prompt`, `answers`, `target` (the first answer after a space), `answer_tokens`, `documents`,
        `position` (from 0; -1 for none), `tokens`, `cell` and `meap_group` (the question).

    Raises:
        UsageError: no file is given, or it has another format, or too few documents.
    """
    if options.qa_file is None:
        raise UsageError("--qa-file: needed for the document tasks; give a lost-in-the-middle file")
    questions = read_file(options.qa_file)
    chosen = generator_of(options, "qa").sample(questions, min(options.samples, len(questions)))
    found = []
    for i, question in enumerate(chosen):
        distractors = _distractors(question, questions, documents - 1, generator_of(options, "qa", i))
        for position in _positions(options, documents):
            found.append(_sample(options, question, distractors, documents, position) | {"meap_group": f"question {i}"})
    return found


def _positions(options: Options, documents: int) -> tuple[int, ...] | list[int]:
    if documents < 2:
        return (documents - 1,)
    chosen = options.qa_positions or ORIGINAL_POSITIONS.get(documents) or positions(documents, 5)
    if not all(0 <= position < documents for position in chosen):
        raise UsageError(f"--qa-positions {list(chosen)}: must lie between 0 and {documents - 1}")
    return chosen


def _sample(
    options: Options, question: Question, distractors: list[Document], documents: int, position: int
) -> dict[str, Any]:
    prompt = closed_book(question.question)
    if documents > 0:
        ordered = [*distractors[: max(position, 0)], question.gold, *distractors[max(position, 0) :]]
        prompt = open_book(question.question, ordered)
    count = options.count
    target = f" {question.answers[0]}"
    return {
        "prompt": prompt,
        "answers": question.answers,
        "target": target,
        "answer_tokens": max(1, count(prompt + target) - count(prompt)),
        "documents": documents,
        "position": position,
        "tokens": count(prompt) + GENERATED_TOKENS,
        "cell": {"position": position} if documents > 1 else None,
    }


def open_book(question: str, documents: list[Document]) -> str:
    """The original's prompt over documents."""
    listed = "\n".join(f"Document [{i}](Title: {one.title}) {one.text}" for i, one in enumerate(documents, 1))
    return (
        "Write a high-quality answer for the given question using only the provided search results (some of which "
        f"might be irrelevant).\n\n{listed}\n\n{closed_book(question)}"
    )


def closed_book(question: str) -> str:
    """The original's prompt without documents."""
    return f"Question: {question}\nAnswer:"


def _distractors(question: Question, questions: list[Question], count: int, generator: Random) -> list[Document]:
    """The row's own distractors if they suffice; otherwise random gold documents of other rows as well."""
    found = question.others[: max(count, 0)]
    taken = {question.gold, *found}
    for _ in range(50 * max(count, 0)):
        if len(found) >= count:
            break
        other = generator.choice(questions).gold
        if other not in taken and not other.mentions(question.answers):
            found.append(other)
            taken.add(other)
    if len(found) < count:
        raise UsageError(f"--qa-file: holds too few documents without an answer of {question.question!r} for {count}")
    return found


def read_file(path: str) -> list[Question]:
    """Questions of a lost-in-the-middle file.

    Raises:
        UsageError: it cannot be read, is empty, or a line is of another format.
    """
    found = [_parse(place, row) for place, row in rows(path, "--qa-file")]
    if not found:
        raise UsageError(f"--qa-file {path}: is empty")
    return found


def _parse(place: str, row: dict[str, Any]) -> Question:
    problem = f"--qa-file {place}: not a row of lost-in-the-middle"
    expected = "expected question, answers, and ctxs with title, text, isgold"
    with refusing(problem, KeyError, TypeError, ValueError, AttributeError, remedy=expected):
        answers, contexts = row["answers"], row["ctxs"]
        documents = [(Document(str(one["title"]), str(one["text"])), one) for one in contexts]
        gold = next((document for document, one in documents if one.get("isgold")), None)
        if gold is None and len(documents) == 1:
            gold = documents[0][0]
        if not isinstance(row["question"], str) or not answers or not all(isinstance(a, str) and a for a in answers):
            raise ValueError("question and answers must be text")
        if gold is None:
            raise ValueError("no document has isgold")
    others = [one for one, given in documents if one != gold and not given.get("hasanswer")]
    return Question(row["question"], list(answers), gold, others)
