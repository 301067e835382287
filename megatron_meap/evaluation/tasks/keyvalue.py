"""Key-value retrieval by position, in the format of lost-in-the-middle (Liu et al. 2023, arXiv 2307.03172)."""

import uuid
from collections.abc import Iterator
from random import Random
from typing import Any

from megatron_meap.errors import UsageError, refusing
from megatron_meap.evaluation.tasks.files import rows
from megatron_meap.evaluation.tasks.haystack import generator_of
from megatron_meap.evaluation.tasks.options import Options, Unsuitable, as_dataset

GENERATED_TOKENS = 64
"""Room for the answer: a UUID takes some 35 tokens of Llama 2."""

CHOICES = 10
"""Values of the same object to choose among in the log-likelihood form, or fewer where it has fewer."""

Pairs = list[tuple[str, str]]


def dataset(**metadata: Any) -> dict[str, Any]:
    """The samples, as lm-eval's `custom_dataset`; see `Options` for the metadata."""
    return as_dataset(samples(Options.from_metadata(metadata)))


def samples(options: Options) -> list[dict[str, Any]]:
    """`options.samples` objects, each with the pair that is asked for at every position.

    Returns:
        Rows with `prompt`, `answer`, `choices`, `choice_tokens`, `gold`, `pairs` (their number), `position` (the gold
        pair's index from 0), `tokens` (of the prompt and the room for the answer), `cell`, `meap_group` (the object).

    Raises:
        UsageError: a context length too short for two pairs, or a file of another format.
    """
    return [
        _sample(options, pairs, gold, position, generator_of(options, "choices", number, position))
        | {"meap_group": f"object {number}"}
        for number, (pairs, gold) in enumerate(_objects(options))
        for position in positions(len(pairs), options.kv_positions)
    ]


def positions(length: int, count: int) -> list[int]:
    """`count` indices spread evenly from the first to the last of `length` places."""
    if count == 1:
        return [0]
    return sorted({round(i * (length - 1) / (count - 1)) for i in range(count)})


def _objects(options: Options) -> Iterator[tuple[Pairs, int]]:
    """Pairs of each object, and the index of the one that is asked for."""
    if options.kv_file is not None:
        found = list(read_file(options.kv_file))
        yield from generator_of(options, "kv file").sample(found, min(options.samples, len(found)))
        return
    sizes = [options.kv_pairs] if options.kv_pairs else [_fitting(options, n) for n in options.max_seq_lengths]
    for size in dict.fromkeys(sizes):
        for i in range(options.samples):
            generator = generator_of(options, "kv", size, i)
            yield random_pairs(size, options.kv_digits, generator), generator.randrange(size)


def read_file(path: str) -> Iterator[tuple[Pairs, int]]:
    """Objects of a file of the original's: `ordered_kv_records`, `key` and `value`.

    Raises:
        UsageError: a line of another format.
    """
    for place, row in rows(path, "--kv-file"):
        expected = "expected ordered_kv_records (a list of pairs) and key, value of one of them"
        problem = f"--kv-file {place}: not a row of lost-in-the-middle"
        with refusing(problem, KeyError, TypeError, ValueError, remedy=expected):
            pairs = [(str(key), str(value)) for key, value in row["ordered_kv_records"]]
            gold = pairs.index((row["key"], row["value"]))
        yield pairs, gold


def random_pairs(size: int, digits: int | None, generator: Random) -> Pairs:
    """Distinct random keys with distinct values: hexadecimal digits, or UUIDs if no number of digits is given."""
    if digits is not None and 16**digits < 2 * size:
        raise UsageError(f"--kv-digits {digits}: too few for {size} different keys and values; give more")
    words: dict[str, None] = {}
    while len(words) < 2 * size:
        bits = generator.getrandbits(128)
        words[str(uuid.UUID(int=bits, version=4)) if digits is None else f"{bits:032x}"[:digits]] = None
    texts = list(words)
    return list(zip(texts[:size], texts[size:], strict=True))


def _fitting(options: Options, length: int) -> int:
    """The largest number of pairs whose prompts are sure to fit into a context."""
    count = options.count

    def tokens(size: int) -> int:
        pairs = random_pairs(size, options.kv_digits, generator_of(options, "fit", size))
        return count(prompt(pairs, pairs[0][0], options.kv_instruction)) + GENERATED_TOKENS

    low, each = tokens(2), max(1, (tokens(10) - tokens(2)) / 8)
    # Random digits take more or fewer tokens: a twentieth of the context is left for that.
    size = int(2 + (0.95 * length - low) / each)
    if options.kv_digits is not None:
        size = min(size, 16**options.kv_digits // 2)
    if size < 2:
        raise Unsuitable(
            f"context length {length}: has no room for two key-value pairs; use longer ones, or shorter values "
            "(--kv-digits)"
        )
    return size


def prompt(pairs: Pairs, key: str, instruction: bool = True) -> str:
    """The question: in the original's words, or as a JSON object followed by the key once more."""
    lines = ",\n ".join(f'"{one}": "{value}"' for one, value in pairs)
    if not instruction:
        return f'{{{lines}}}\n"{key}": "'
    return (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        f'JSON data:\n{{{lines}}}\n\nKey: "{key}"\nCorresponding value:'
    )


def _sample(options: Options, pairs: Pairs, gold: int, position: int, generator: Random) -> dict[str, Any]:
    """One object with the pair that is asked for moved to a position."""
    others = pairs[:gold] + pairs[gold + 1 :]
    ordered = [*others[:position], pairs[gold], *others[position:]]
    key, answer = pairs[gold]
    text = prompt(ordered, key, options.kv_instruction)
    wrong = generator.sample([value for _, value in others], min(CHOICES - 1, len(others)))
    values = [answer, *wrong]
    generator.shuffle(values)
    # A choice is what follows the prompt: with the instruction a space and the quoted value.
    choices = [f' "{value}"' if options.kv_instruction else value for value in values]
    return {
        "prompt": text,
        "answer": answer,
        "choices": choices,
        "choice_tokens": options.count.each(choices),
        "gold": values.index(answer),
        "pairs": len(pairs),
        "position": position,
        "tokens": options.count(text) + GENERATED_TOKENS,
        "cell": {"pairs": len(pairs), "position": position},
    }
