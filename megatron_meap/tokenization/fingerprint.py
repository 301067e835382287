"""The digest that tells one tokenizer from another."""

import hashlib
from pathlib import Path
from typing import Any

from megatron_meap.errors import refusing

_HF_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")


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
