"""Reasoning over several needles: kinship sentences that form a chain, as in NeedleBench v2 (arXiv 2407.11963).

Each sentence names a person and an elder relative of hers; all are shuffled through the haystack, and the eldest
ancestor of the youngest is asked for. The sentences here are this project's own.

In the log-likelihood form the text contains a second family, as long as the first, and its names are choices as well.
The eldest of a chain is named once and all others twice: without the second family that would give it away.
"""

from itertools import pairwise
from random import Random
from typing import Any

from megatron_meap.evaluation.tasks.haystack import Piece, bury, generator_of, insert
from megatron_meap.evaluation.tasks.options import Options, as_dataset

FIRST = (  # noqa: SIM905
    "Alice Anton Beatrice Boris Clara Conrad Diana David Elena Edgar Flora Felix Greta George Hilda Hugo Irene Ivan "
    "Julia Jonas Karin Kurt Laura Leon Martha Marcus Nora Nathan Olga Oscar Paula Peter Rosa Robert Sonia Simon Teresa "
    "Thomas Vera Victor"
).split()
LAST = (  # noqa: SIM905
    "Adler Baker Carter Dawson Ellis Fisher Graham Harper Irving Jensen Keller Lawson Mercer Norton Osborn Palmer "
    "Quincy Rivers Sawyer Turner Upton Vaughn Walker Yates"
).split()
RELATIVES = ("father", "mother", "grandfather", "grandmother")
SENTENCES = (
    "{elder} is the {relative} of {younger}.",
    "The {relative} of {younger} is {elder}.",
    "{younger} was brought up by {elder}, the {relative} of {younger}.",
)


def dataset(ranked: bool = False, **metadata: Any) -> dict[str, Any]:
    """The samples, as lm-eval's `custom_dataset`.

    Args:
        ranked: they are for the log-likelihood form.
        metadata: see `Options`.
    """
    return as_dataset(samples(Options.from_metadata(metadata), ranked))


def samples(options: Options, ranked: bool = False) -> list[dict[str, Any]]:
    """`options.samples` samples for each context length and number of needles.

    Args:
        options: of all samples.
        ranked: with a second family in the text.

    Returns:
        Rows with `prompt`, `answer` (the eldest), `choices` (everybody named but the youngest of each family) and
        `gold`, `needles`, `length`, `tokens` and `cell`.
    """
    return [
        _sample(options, length, needles, ranked, generator_of(options, "kinship", length, needles, i))
        for length in options.max_seq_lengths
        for needles in options.needles
        for i in range(options.samples)
    ]


def _sample(options: Options, length: int, needles: int, ranked: bool, generator: Random) -> dict[str, Any]:
    size = needles + 1
    count = 2 * size if ranked else size
    first, last = generator.sample(FIRST, count), generator.choices(LAST, k=count)
    people = [" ".join(names) for names in zip(first, last, strict=True)]
    families = [people[i : i + size] for i in range(0, count, size)]
    sentences = [
        generator.choice(SENTENCES).format(elder=elder, younger=younger, relative=generator.choice(RELATIVES))
        for family in families
        for elder, younger in pairwise(family)
    ]
    generator.shuffle(sentences)
    hidden = [(generator.uniform(0, 100), sentence) for sentence in sentences]
    eldest, youngest = families[0][0], families[0][-1]
    question = (
        f"Question: In the text above, who is the eldest relative that {youngest} can be traced back to?\n"
        f"Answer: The eldest relative that {youngest} can be traced back to is"
    )

    def build(piece: Piece) -> str:
        return f"{insert(piece, hidden)}\n\n{question}"

    prompt, tokens = bury(build, options, length, generator)
    choices = [name for family in families for name in family[:-1]]
    generator.shuffle(choices)
    return {
        "prompt": prompt,
        "answer": eldest,
        "choices": [f" {name}" for name in choices],
        "gold": choices.index(eldest),
        "needles": needles,
        "length": length,
        "tokens": tokens,
        "cell": {"length": length, "needles": needles},
    }
