"""How answers are scored: the `process_results` of the task files.

Every sample belongs to a cell of the task's grid (`{"length": 4096, "depth": 50.0}`, `{"position": 9}`, ...). Each
metric is reported over all samples and, under its name and the cell's, over each cell.
"""

import re
import string
from typing import Any

Cell = dict[str, float]
"""A sample's place in the grid of its task: numbers by name, the slowest first."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def contains(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 if the first line of the generated text contains the answer, ignoring case.

    A base model may go on after the answer; further lines, where it could list one guess after another, do not count.
    """
    return _with_cell(doc, {"acc": float(doc["answer"].lower() in _first_line(results[0]).lower())})


def ranked(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Whether the right choice is the likeliest, and how likely the answer is.

    Args:
        doc: `gold` is the index of the right choice; see `likeliest`.
        results: log-likelihood of each choice (nats) and whether greedy decoding would write it.

    Returns:
        `acc`; `logprob`, the log-likelihood of the right choice; `greedy`, 1 where greedy decoding writes it.
    """
    likelihoods = [likelihood for likelihood, _ in results]
    gold = doc["gold"]
    best = likeliest(doc, likelihoods)
    return _with_cell(
        doc, {"acc": float(best == gold), "logprob": likelihoods[gold], "greedy": float(results[gold][1])}
    )


def likeliest(doc: dict[str, Any], likelihoods: list[float]) -> int:
    """Index of the likeliest choice; per token if the sample has `choice_tokens`, the length of each.

    By the sum over tokens, shorter choices would be likelier whatever the prompt says.
    """
    lengths = doc.get("choice_tokens", [1] * len(likelihoods))
    return max(range(len(likelihoods)), key=lambda choice: likelihoods[choice] / lengths[choice])


def subspan(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Lost-in-the-middle's `best_subspan_em` over the first line of the answer."""
    return _with_cell(doc, {"best_subspan_em": best_subspan_em(_first_line(results[0]), doc["answers"])})


def gold_logprob(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Log-likelihood of the gold answer (nats), whole and per token, and whether greedy decoding writes it."""
    likelihood, greedy = results[0]
    return _with_cell(
        doc, {"logprob": likelihood, "logprob_per_token": likelihood / doc["answer_tokens"], "greedy": float(greedy)}
    )


def best_subspan_em(prediction: str, answers: list[str]) -> float:
    """1 if any answer is part of the prediction, both normalised (Liu et al. 2023, arXiv 2307.03172)."""
    normalised = normalise(prediction)
    # An answer that is only punctuation would be part of everything.
    return float(any(answer in normalised for answer in map(normalise, answers) if answer))


def normalise(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _first_line(text: str) -> str:
    """The first line that is not empty: chat models begin with line ends."""
    return text.strip().partition("\n")[0]


def cell_name(cell: Cell | None) -> str:
    """A cell as text: `length=4096 depth=50`; empty for None."""
    numbers = ((name, f"{value:g}" if isinstance(value, float) else value) for name, value in (cell or {}).items())
    return " ".join(f"{name}={number}" for name, number in numbers)


def _with_cell(doc: dict[str, Any], metrics: dict[str, float]) -> dict[str, float]:
    cell = cell_name(doc.get("cell"))
    return metrics | ({f"{name} {cell}": value for name, value in metrics.items()} if cell else {})
