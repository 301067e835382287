"""The digests that tell one tokenizer from another: of its files, and of the ids that it gives."""

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_meap.errors import refusing
from megatron_meap.tokenization.reference import plain_encode

_HF_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")

_PROBE = (
    "The quick brown fox jumps over the lazy dog. ALL CAPITALS, camelCase, snake_case; I'll, IT'S, don't, e-mail",
    " begins and ends with a space ",
    "two  three   four    many                spaces",
    "\tdef f(x):\n\t\treturn x ** 2\r\n\n\n    # done\n",
    "0 1 12 123 1234 12345 1234567890 3.14159 1,000,000 0x1F 1e-5 50% $9.99 №5 ½ ²",
    "naïve café, Ångström, São Paulo, straße, ŒUVRE; e\u0301 n\u0303 \ufb01 \uff21\u3000",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا بالعالم नमस्ते สวัสดี",
    "東京都は日本の首都です。中文字符，標點；한국어 문장",
    "😀 👍🏽 👩‍👩‍👧 ❤️ 🇫🇷 … — “quoted” ‘so’ €",
    "\u200b\u00a0\u00ad\ufeff\x00\x7f",
    "<s>a</s><unk><pad>[MASK][CLS] [SEP]<|endoftext|><|im_start|>user<0x0A>▁ĠĊ##ing",
    "https://example.org/a_b?c=d&e=%20#f user@example.org C:\\dir\\file.txt {\"k\": [1, null]} <p class='x'>&amp;</p>",
)
"""Texts that show a tokenizer's settings. Never change them: manifests and checkpoints hold their digest."""


def tokenizer_fingerprint(args: Any) -> str:
    """sha256 of what determines the ids: the content of the tokenizer's files, whatever their names.

    Args:
        args: Megatron-style arguments (`tokenizer_type`, `tokenizer_model`, `vocab_file`, `merge_file`, ...). A name on
            the hub gives what the folder of its files gives.

    Raises:
        UsageError: a file cannot be read.
    """
    digest = hashlib.sha256()
    if args.tokenizer_type == "NullTokenizer":
        digest.update(f"null {args.vocab_size}".encode())
    if args.tokenizer_type == "TikTokenizer":
        cut = (args.tiktoken_pattern or "v2", args.tiktoken_num_special_tokens, args.vocab_size, args.special_tokens)
        digest.update(repr(cut).encode())
    for name in (args.tokenizer_model, args.vocab_file, args.merge_file):
        place = Path(name) if name else None
        if place and not place.exists():
            place = _from_hub(name) if args.tokenizer_type == "HuggingFaceTokenizer" else None
        for path in _vocabulary_files(place) if place else ():
            with refusing(f"{path}: cannot be read", OSError):
                digest.update(hashlib.sha256(path.read_bytes()).digest())
        if name and not place:
            digest.update(str(name).encode())  # there is nothing to look into, as loading it will say
    return digest.hexdigest()


def ids_fingerprint(tokenizer: Any) -> str | None:
    """sha256 of the ids that a tokenizer gives to fixed texts; None if it has no vocabulary of text.

    The same vocabulary file can give different ids if other settings differ (tokenizer_config.json). The texts include
    the tokenizer's ordinary added tokens, but not its special ones, whose names are plain text in a corpus.

    Args:
        tokenizer: Megatron's, or the `tokenizer` of a `Reference`.
    """
    if getattr(tokenizer, "library", "") not in ("sentencepiece", "huggingface", "megatron", "tiktoken"):
        return None
    encode = plain_encode(tokenizer)
    added = getattr(tokenizer._tokenizer.tokenizer, "added_tokens_decoder", {})
    ordinary = sorted(token.content for token in added.values() if not token.special)

    def ids_of(text: str) -> list[int] | None:
        try:
            return [int(id) for id in encode(text)]
        except Exception:  # a library may raise anything for a text without a token for it
            return None

    return hashlib.sha256(json.dumps([ids_of(text) for text in (*_PROBE, *ordinary)]).encode()).hexdigest()


def known_to_differ(one: str | None, other: str | None) -> bool:
    """Whether two digests differ; an unknown one (None) does not count as different."""
    return None not in (one, other) and one != other


def _from_hub(name: str) -> Path | None:
    """The folder, in the hub's cache, of the files that transformers takes for a name; None where there is none."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HF_VOCABULARIES)))
    except Exception:  # no such name, no connection, no file: each library below it has errors of its own
        return None


def _vocabulary_files(path: Path) -> list[Path]:
    """The files that hold a tokenizer's vocabulary; of a folder the first that is complete on its own."""
    if not path.is_dir():
        return [path] if path.exists() else []
    present = [path / name for name in _HF_VOCABULARIES if (path / name).exists()]
    return present[:1] if present and present[0].name in _HF_VOCABULARIES[:3] else present
