"""The [MASK] token: find it in a tokenizer, or append it, and make sure that no text can produce it."""

from dataclasses import dataclass
from typing import Any

from megatron_meap.errors import UsageError

MASK_TOKEN = "[MASK]"


@dataclass(frozen=True)
class MaskToken:
    """The mask token of a run."""

    text: str
    """Its name, for people: as text it is never parsed to the id."""

    id: int
    """Its id in the embedding table."""

    added: bool
    """Whether the tokenizer has no such token: its id is then the next one after the vocabulary."""


def resolve_mask_token(tokenizer: Any, text: str = MASK_TOKEN) -> MaskToken:
    """Find the mask token in a Megatron tokenizer, or append it as the next id.

    Appending comes before vocabulary padding: Llama-2's 32,000 pieces give id 32,000, and 32,064 rows with
    `--make-vocab-size-divisible-by 64`. The tokenizer itself is not changed: training only needs the id.

    Args:
        tokenizer: as `megatron.core.tokenizers.utils.build_tokenizer.build_tokenizer` returns it.
        text: the token's name.

    Raises:
        UsageError: the name is empty, or that of an ordinary token, which text can produce, or of a token with another
            purpose.
    """
    if not text.strip():
        raise UsageError(f"--meap-mask-token {text!r}: is empty; name a token, such as {MASK_TOKEN}")
    found, special = _look_up(tokenizer, text)
    if found is None:
        return MaskToken(text, vocabulary_size(tokenizer), added=True)
    for name in ("eod", "bos", "pad", "unk"):
        if special_id(tokenizer, name) == found:
            raise UsageError(
                f"--meap-mask-token: {text!r} is this tokenizer's {name.upper()} token (id {found}); name another one, "
                "which has no other purpose"
            )
    if not special:
        raise UsageError(
            f"--meap-mask-token: {text!r} is an ordinary token of this tokenizer (id {found}), so text can produce it; "
            "name a special (control) token, or one that the tokenizer does not have"
        )
    return MaskToken(text, found, added=False)


def vocabulary_size(tokenizer: Any) -> int:
    """Rows of the embedding that the ids of a Megatron tokenizer need: some Hugging Face vocabularies have gaps."""
    if getattr(tokenizer, "library", "") not in ("huggingface", "megatron"):
        return tokenizer.vocab_size
    inner, size = tokenizer._tokenizer.tokenizer, tokenizer.vocab_size
    backend = getattr(inner, "backend_tokenizer", None)
    if backend and size == backend.get_vocab_size() and None not in map(backend.id_to_token, range(size)):
        return size  # without holes, which is known before a dictionary of a large vocabulary is made
    return max(size, 1 + max(inner.get_vocab().values()))


def token_id(tokenizer: Any, text: str) -> int | None:
    """Id of the token named `text`; None if a Megatron tokenizer has none."""
    return _look_up(tokenizer, text)[0]


def _look_up(tokenizer: Any, text: str) -> tuple[int | None, bool]:
    """Id of a token (None if there is none), and whether text never becomes it."""
    lookup = _LOOKUPS.get(getattr(tokenizer, "library", ""))
    return lookup(tokenizer._tokenizer.tokenizer, text) if lookup else (None, True)


def _in_sentencepiece(processor: Any, text: str) -> tuple[int | None, bool]:
    """Id of a piece, and whether it is a control symbol (text can become user-defined symbols)."""
    piece = processor.piece_to_id(text)
    if processor.id_to_piece(piece) != text:
        return None, False
    return piece, processor.is_control(piece)


def _in_huggingface(tokenizer: Any, text: str) -> tuple[int | None, bool]:
    """Id of a token, and whether it is special (corpora are encoded with special tokens as plain text)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found = backend.token_to_id(text) if backend else tokenizer.get_vocab().get(text)
    return found, found in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[found].special


def _in_tiktoken(encoding: Any, text: str) -> tuple[int | None, bool]:
    """Id of a special token; ordinary ones are looked up by their bytes."""
    if text in encoding.special_tokens_set:
        return encoding.encode_single_token(text), True
    try:
        return encoding.encode_single_token(text), False
    except KeyError:
        return None, False


_LOOKUPS = {
    "sentencepiece": _in_sentencepiece,
    "huggingface": _in_huggingface,
    "megatron": _in_huggingface,
    "tiktoken": _in_tiktoken,
}


def special_id(tokenizer: Any, name: str) -> int | None:
    """Id of `eod`, `bos`, `pad` or `unk`; None if there is none, which Megatron's tokenizers say in several ways."""
    try:
        value = getattr(tokenizer, name)
    except (AttributeError, NotImplementedError, NameError):
        return None
    return value if isinstance(value, int) and value >= 0 else None


def special_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids of EOD, BOS and padding, as far as the tokenizer has them, sorted."""
    found = {special_id(tokenizer, name) for name in ("eod", "bos", "pad")}
    return tuple(sorted(each for each in found if each is not None))


def all_special_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids of all tokens that do not occur in ordinary text, sorted: control symbols, unknown, EOD, BOS, padding, ..."""
    library = getattr(tokenizer, "library", "")
    found = set(special_token_ids(tokenizer))
    if library == "sentencepiece":
        processor = tokenizer._tokenizer.tokenizer
        found |= {
            piece
            for piece in range(processor.get_piece_size())
            if processor.is_control(piece) or processor.is_unknown(piece) or processor.is_unused(piece)
        }
    elif library in ("huggingface", "megatron"):
        inner = tokenizer._tokenizer.tokenizer
        found |= {*inner.all_special_ids, *(id for id, token in inner.added_tokens_decoder.items() if token.special)}
    elif library == "tiktoken":
        encoding = tokenizer._tokenizer.tokenizer
        found |= {encoding.encode_single_token(text) for text in encoding.special_tokens_set}
    return tuple(sorted(found))
