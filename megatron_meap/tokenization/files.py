"""The files of a run's tokenizer, and the same tokenizer from a copy of them."""

import copy
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

_NAMED_BY = ("tokenizer_model", "vocab_file", "merge_file")
_OF_A_DIRECTORY = (
    "tokenizer*.json", "tokenizer.model", "spiece.model", "*.tiktoken", "vocab.json", "merges.txt", "vocab.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.*", "additional_chat_templates/*.jinja",
    "tokenization_*.py", "config.json", "generation_config.json",
)  # fmt: skip
"""Files of a directory that transformers reads for a tokenizer, and those with the ids that end a text."""

ONE_FILE = ("SentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer", "GPTSentencePieceTokenizer")
"""Types of tokenizers (Megatron's names) that consist of one file, named by `tokenizer_model`."""


def files_of(args: Namespace) -> dict[str, Path]:
    """The files, by their places in a copy; none for a tokenizer without local files (on a hub, NullTokenizer).

    Args:
        args: Megatron-style arguments (`tokenizer_model`, `vocab_file`, `merge_file`).
    """
    return {place: path for name in _NAMED_BY for place, path in _files(getattr(args, name, None))}


def missing(args: Namespace) -> list[str]:
    """Files that the arguments name but that do not exist."""
    named = (getattr(args, name, None) for name in _NAMED_BY)
    return [each for each in named if each and not Path(each).exists()]


def at(args: Namespace, folder: Path) -> Namespace:
    """The arguments with their tokenizer in `folder`, which has a copy of the files in their places."""
    changed = copy.copy(args)
    for name in _NAMED_BY:
        if named := getattr(args, name, None):
            file = folder / Path(named).name
            setattr(changed, name, str(file if file.is_file() else folder))
    return changed


def _files(named: str | None) -> Iterator[tuple[str, Path]]:
    """Places and files of what one argument names."""
    path = Path(named or "")
    if path.is_file() and path.name != "tokenizer.json":
        yield path.name, path
    elif named and path.exists():
        folder = path if path.is_dir() else path.parent
        for pattern in _OF_A_DIRECTORY:
            yield from ((str(file.relative_to(folder)), file) for file in sorted(folder.glob(pattern)))
