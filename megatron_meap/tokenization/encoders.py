"""The fastest library that gives exactly the reference tokenizer's ids."""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import orjson

from megatron_meap.errors import UsageError, one_line
from megatron_meap.tokenization.reference import Reference

Choice = Literal["auto", "gigatoken", "reference"]
Ids = Sequence[int] | np.ndarray


class Encoder(Protocol):
    """Turns text into ids; it can be used in forked workers."""

    name: str

    def encode(self, text: bytes) -> Ids:
        """Ids of a text in UTF-8, without BOS and EOS."""

    def shed(self) -> None:
        """Free memory held by caches."""


class ReferenceEncoder:
    """The tokenizer's own library."""

    def __init__(self, reference: Reference) -> None:
        self.name = f"reference ({reference.library})"
        self._encode = reference.encode

    def encode(self, text: bytes) -> Ids:
        """Ids of a text."""
        return self._encode(text.decode())

    def shed(self) -> None:
        """Nothing to free: these libraries have only small caches."""


class GigatokenEncoder:
    """gigatoken: the same ids, many times faster. Its cache of words grows with the text, so it can be emptied."""

    name = "gigatoken"

    def __init__(self, make: Callable[[], Any], offset: int = 0) -> None:
        """`make` builds the gigatoken tokenizer; `offset` is added to its ids."""
        self._make = make
        self._offset = offset
        self.shed()

    def encode(self, text: bytes) -> Ids:
        """Ids of a text as a numpy array of uint32."""
        ids = self._tokenizer.encode(text)
        return ids + self._offset if self._offset else ids

    def shed(self) -> None:
        """Start with an empty cache."""
        self._tokenizer: Any = None  # frees the old cache before the new tokenizer is created
        self._tokenizer = self._make()


def choose_encoder(reference: Reference, sample: list[str], choice: Choice = "auto") -> tuple[Encoder, str]:
    """The encoder for a job, and one line that says which and why.

    gigatoken is used only if it gives the reference's ids for every text of the sample.

    Raises:
        UsageError: gigatoken was asked for, but does not support this tokenizer or gives other ids.
    """
    plain = ReferenceEncoder(reference)
    if choice == "reference":
        return plain, f"{plain.name}, as asked"
    try:
        fast = gigatoken_encoder(reference)
    except _NotPossibleError as error:
        why = str(error)
    else:
        different = [text for text in sample if not np.array_equal(fast.encode(text.encode()), reference.encode(text))]
        if not different:
            return fast, f"gigatoken, same ids as {reference.library} for all {len(sample)} sampled documents"
        why = f"WARNING: other ids than {reference.library} for {len(different)} of {len(sample)} sampled documents"
    if choice == "gigatoken":
        raise UsageError(f"--encoder gigatoken: {why}; use --encoder auto")
    return plain, f"{plain.name}; gigatoken: {why}"


class _NotPossibleError(Exception):
    """Why gigatoken cannot replace a tokenizer."""


def gigatoken_encoder(reference: Reference) -> GigatokenEncoder:
    """gigatoken for the reference's tokenizer, without its special tokens, so that text never becomes one."""
    try:
        if reference.library == "sentencepiece":
            from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

            definition = orjson.loads(sentencepiece_to_tokenizer_json(reference.model.serialized_model_proto()))
            _refuse_inexact_sentencepiece(definition)
            return _from_json(definition)
        if reference.library in ("huggingface", "megatron") and hasattr(reference.model, "backend_tokenizer"):
            known = getattr(reference.model, "definition", None)  # serialising a large one again takes a while
            return _from_json(orjson.loads(known or reference.model.backend_tokenizer.to_str()))
        if reference.library == "tiktoken":
            return _from_tiktoken(reference)
    except _NotPossibleError:
        raise
    except Exception as error:  # gigatoken may raise any exception for a tokenizer that it does not support
        raise _NotPossibleError(one_line(error)) from error
    raise _NotPossibleError(f"does not support {reference.library} tokenizers")


def _refuse_inexact_sentencepiece(definition: dict[str, Any]) -> None:
    """Refuse models for which gigatoken 0.10 gives other ids in rare texts, which a sample may not contain."""
    if not all(token["special"] for token in definition["added_tokens"]):
        raise _NotPossibleError("is not exact with user-defined symbols")
    steps = [step["type"] for step in definition["normalizer"]["normalizers"]]
    if "Strip" in steps and "Precompiled" not in steps:
        raise _NotPossibleError("is not exact where extra spaces are removed and nothing else is normalised")


def _from_json(definition: dict[str, Any]) -> GigatokenEncoder:
    """From the contents of a tokenizer.json."""
    import gigatoken

    added = [token for token in definition.get("added_tokens") or [] if not token["special"]]
    if any(token[flag] for token in added for flag in ("single_word", "lstrip", "rstrip")):
        raise _NotPossibleError("is not exact with added tokens that only match whole words, or take spaces with them")
    vocabulary = definition["model"]["vocab"]
    known = vocabulary if isinstance(vocabulary, dict) else {}
    if any(known.get(token["content"], token["id"]) != token["id"] for token in added):
        raise _NotPossibleError("is not exact with added tokens that have another id in the vocabulary")
    stripped = orjson.dumps({**definition, "added_tokens": added, "truncation": None, "padding": None})
    return GigatokenEncoder(lambda: gigatoken.Tokenizer.from_json(stripped))


def _from_tiktoken(reference: Reference) -> GigatokenEncoder:
    """From a Megatron tiktoken tokenizer, whose ordinary ids come after its special ones."""
    import base64

    import gigatoken
    from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import _PATTERN_TIKTOKEN_V2

    if reference.model._pat_str != _PATTERN_TIKTOKEN_V2:
        raise _NotPossibleError("does not know this --tiktoken-pattern")
    ranks: dict[bytes, int] = reference.model._mergeable_ranks
    offset = min(ranks.values())
    lines = [base64.b64encode(token) + b" %d\n" % (rank - offset) for token, rank in ranks.items()]

    def make() -> Any:
        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.writelines(lines)
            file.flush()
            return gigatoken.Tokenizer.from_tiktoken(file.name, "nemotron")

    return GigatokenEncoder(make, offset)
