"""How many bytes of text a token represents, so that losses of different tokenizers can be compared."""

import functools
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_PLAIN_DECODERS = {"Sequence", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}


@functools.lru_cache(maxsize=2)
def text_bytes(tokenizer: Any) -> np.ndarray | None:
    """Bytes in UTF-8 of each token's text, int32 by id; 0 for tokens without text: special tokens, unknown text.

    A space that SentencePiece adds before a text counts as one byte.

    Args:
        tokenizer: Megatron's, or one of transformers.

    Returns:
        The table, or None for a tokenizer of an unknown kind.
    """
    library = getattr(tokenizer, "library", "huggingface")
    inner = tokenizer._tokenizer.tokenizer if hasattr(tokenizer, "library") else tokenizer
    sizes = {
        "sentencepiece": _in_sentencepiece,
        "huggingface": _in_huggingface,
        "megatron": _in_huggingface,
        "tiktoken": _in_tiktoken,
    }.get(library, lambda _: None)(inner)
    if sizes is None:
        return None
    table = np.zeros(max(sizes) + 1, dtype=np.int32)
    table[list(sizes)] = list(sizes.values())
    return table


def _of_piece(piece: str) -> int:
    return 1 if _BYTE.fullmatch(piece) else len(piece.replace(_SPACE, " ").encode())


def _in_sentencepiece(processor: Any) -> dict[int, int]:
    silent = processor.is_control, processor.is_unknown, processor.is_unused
    return {
        id: 0 if any(ask(id) for ask in silent) else _of_piece(processor.id_to_piece(id))
        for id in range(processor.get_piece_size())
    }


def _in_huggingface(tokenizer: Any) -> dict[int, int] | None:
    if not hasattr(tokenizer, "backend_tokenizer"):
        return None
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    decoder = definition["decoder"] or {}
    kinds = {decoder.get("type"), *(each["type"] for each in decoder.get("decoders", ()))}
    byte_level = "ByteLevel" in kinds  # one character per byte
    if not (byte_level or kinds <= _PLAIN_DECODERS):
        return None
    size: Callable[[str], int] = len if byte_level else _of_piece
    silent = {tokenizer.unk_token_id, *tokenizer.all_special_ids}
    sizes = {id: 0 if id in silent else size(token) for token, id in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder.items()
    return sizes | {id: 0 if token.special else len(token.content.encode()) for id, token in added}


def _in_tiktoken(encoding: Any) -> dict[int, int]:
    special = {encoding.encode_single_token(text) for text in encoding.special_tokens_set}
    return {rank: len(token) for token, rank in encoding._mergeable_ranks.items()} | dict.fromkeys(special, 0)
