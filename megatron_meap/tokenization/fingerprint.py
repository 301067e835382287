"""The digest that tells one tokenizer from another."""

import hashlib
from pathlib import Path
from typing import Any

from megatron_meap.errors import refusing

_HF_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")


def tokenizer_fingerprint(args: Any) -> str:
    """sha256 of what determines the ids: the content of the tokenizer's files, whatever their names.

    Args:
        args: Megatron-style arguments (`tokenizer_type`, `tokenizer_model`, `vocab_file`, `merge_file`, ...).

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
        for path in _vocabulary_files(Path(name)) if name else ():
            with refusing(f"{path}: cannot be read", OSError):
                digest.update(hashlib.sha256(path.read_bytes()).digest())
        if name and not Path(name).exists():
            digest.update(str(name).encode())  # a name on a hub: there is no local file
    return digest.hexdigest()


def _vocabulary_files(path: Path) -> list[Path]:
    """The files that hold a tokenizer's vocabulary; of a folder the first that is complete on its own."""
    if not path.is_dir():
        return [path] if path.exists() else []
    present = [path / name for name in _HF_VOCABULARIES if (path / name).exists()]
    return present[:1] if present and present[0].name in _HF_VOCABULARIES[:3] else present
