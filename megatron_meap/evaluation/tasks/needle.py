"""Needle in a haystack: one sentence hidden in a long text, asked for at its end; context length by depth."""

import string
from random import Random
from typing import Any

from megatron_meap.errors import UsageError
from megatron_meap.evaluation.tasks.haystack import Piece, bury, generator_of, insert
from megatron_meap.evaluation.tasks.options import Options, Unsuitable, as_dataset

KEYS = (  # noqa: SIM905
    "Amsterdam Athens Auckland Baghdad Bangkok Barcelona Beijing Berlin Bogota Boston Brussels Budapest Cairo Caracas "
    "Chicago Copenhagen Dakar Delhi Dublin Geneva Hamburg Havana Helsinki Istanbul Jakarta Karachi Kyoto Lagos Lima "
    "Lisbon London Madrid Manila Melbourne Mexico Milan Montreal Moscow Munich Nairobi Naples Osaka Oslo Paris Prague "
    "Quito Rome Santiago Seoul Singapore Stockholm Sydney Tehran Tokyo Toronto Vancouver Venice Vienna Warsaw Zurich"
).split()
CHOICES = 10
"""Numbers to choose among in the log-likelihood form: chance is 1 in 10."""


def dataset(ranked: bool = False, **metadata: Any) -> dict[str, Any]:
    """The samples, as lm-eval's `custom_dataset`; see `Options` for the metadata.

    Args:
        ranked: they are for the log-likelihood form.
        metadata: see `Options`.
    """
    options = Options.from_metadata(metadata)
    if ranked and "{value}" not in options.answer:
        raise Unsuitable(f"--answer {options.answer!r}: without {{value}} there is nothing to choose from")
    return as_dataset(samples(options))


def samples(options: Options) -> list[dict[str, Any]]:
    """`options.samples` samples for each context length and depth.

    Returns:
        Rows with `prompt`, `answer`, `choices` and `gold` (the answer's index among them), `length`, `depth` (percent),
        `tokens` (of the prompt and the room for the answer) and `cell` (see `scoring`).

    Raises:
        UsageError: a template that cannot be filled, a haystack that is too short, no room for a needle.
    """
    return [
        _sample(options, length, depth, generator_of(options, "needle", length, depth, i))
        for length in options.max_seq_lengths
        for depth in options.depths
        for i in range(options.samples)
    ]


def _sample(options: Options, length: int, depth: float, generator: Random) -> dict[str, Any]:
    numbers = generator.sample(range(1_000_000, 10_000_000), CHOICES)
    words = {"key": generator.choice(KEYS), "value": str(numbers[0])}
    needle, question, answer = (
        _fill(template, words, flag)
        for template, flag in (
            (options.needle, "--needle"),
            (options.question, "--question"),
            (options.answer, "--answer"),
        )
    )
    if answer.lower() not in needle.lower():
        raise UsageError(f"--needle {needle!r}: does not hold the answer {answer!r}; change one of the two")

    def build(piece: Piece) -> str:
        return f"{insert(piece, [(depth, needle)])}\n\n{question}"

    prompt, tokens = bury(build, options, length, generator)
    choices = list(dict.fromkeys(_fill(options.answer, {**words, "value": str(n)}, "--answer") for n in numbers))
    generator.shuffle(choices)
    return {
        "prompt": prompt,
        "answer": answer,
        "choices": [f" {choice}" for choice in choices],
        "gold": choices.index(answer),
        "length": length,
        "depth": depth,
        "tokens": tokens,
        "cell": {"length": length, "depth": depth},
    }


def _fill(template: str, words: dict[str, str], flag: str) -> str:
    """A template with its {key} and {value}."""
    try:
        return string.Formatter().vformat(template, (), words)
    except (KeyError, IndexError, ValueError) as error:
        raise UsageError(f"{flag} {template!r}: only {{key}} and {{value}} can stand in braces") from error
