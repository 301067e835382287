"""Reasoning over several needles: kinship sentences that form a chain, as in NeedleBench v2 (arXiv 2407.11963).

Each sentence names a person and an elder relative of hers; all are shuffled through the haystack, and the eldest
ancestor of the youngest is asked for. The sentences here are this project's own.
"""

from itertools import pairwise
from random import Random
from typing import Any

from megatron_meap.evaluation.haystack import bury, generator_of, insert
from megatron_meap.evaluation.options import Options, as_dataset

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


def dataset(**metadata: Any) -> dict[str, Any]:
    """The samples, as lm-eval's `custom_dataset`; see `Options` for the metadata."""
    return as_dataset(samples(Options.from_metadata(metadata)))


def samples(options: Options) -> list[dict[str, Any]]:
    """`options.samples` samples for each context length and number of needles.

    Returns:
        Rows with `prompt`, `answer` (the eldest), `choices` (everybody in the chain but the one asked about) and
        `gold`, `needles`, `length`, `tokens` and `cell`.
    """
    return [
        _sample(options, length, needles, generator_of(options, "kinship", length, needles, i))
        for length in options.max_seq_lengths
        for needles in options.needles
        for i in range(options.samples)
    ]


def _sample(options: Options, length: int, needles: int, generator: Random) -> dict[str, Any]:
    first, last = generator.sample(FIRST, needles + 1), generator.choices(LAST, k=needles + 1)
    people = [" ".join(names) for names in zip(first, last, strict=True)]
    chain = [
        generator.choice(SENTENCES).format(elder=elder, younger=younger, relative=generator.choice(RELATIVES))
        for elder, younger in pairwise(people)
    ]
    generator.shuffle(chain)
    hidden = [(generator.uniform(0, 100), sentence) for sentence in chain]
    eldest, youngest = people[0], people[-1]
    question = (
        f"Question: In the text above, who is the eldest relative that {youngest} can be traced back to?\n"
        f"Answer: The eldest relative that {youngest} can be traced back to is"
    )
    count = options.count

    def build(sentences: Any) -> str:
        return f"{insert(sentences, hidden, count)}\n\n{question}"

    sentences, tokens = bury(build, options, length, generator)
    choices = people[:-1]
    generator.shuffle(choices)
    return {
        "prompt": build(sentences),
        "answer": eldest,
        "choices": [f" {name}" for name in choices],
        "gold": choices.index(eldest),
        "needles": needles,
        "length": length,
        "tokens": tokens,
        "cell": f"length={length} needles={needles}",
    }
