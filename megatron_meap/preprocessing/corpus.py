"""Real text from this machine: a training corpus without network access.

Every Python installation contains some megabytes of English and of code. Three sources are gathered, in this order,
until the size limit is reached: the documentation topics of `help()`, the docstrings of the standard library and of
the installed packages, and their source code. The same installation always gives the same corpus, byte for byte.
"""

import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_meap.errors import UsageError, refuse_to_overwrite
from megatron_meap.files import whole_file

MIN_CHARACTERS = 200
"""Shorter documents (empty `__init__.py` files and the like) are left out."""

MAX_CHARACTERS = 200_000
"""Longer files are nearly always generated tables."""

# Triple-quoted strings; one that begins its line is taken for a docstring. Parsing every file would take a minute.
_TRIPLE_QUOTED = re.compile(r'(^[ \t]*[rRuU]?)?("""|\'\'\')(.*?)\2', re.DOTALL | re.MULTILINE)
_SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "encodings", "pydoc_data", "__pycache__", "_vendor"}


@dataclass(frozen=True)
class CorpusSummary:
    """What `build_corpus` wrote."""

    train_documents: int
    valid_documents: int
    train_bytes: int
    """Bytes of text (UTF-8), without the JSON around it; likewise below."""
    valid_bytes: int


def build_corpus(
    train: str | Path,
    valid: str | Path,
    *,
    max_bytes: int = 20_000_000,
    valid_share: float = 0.02,
    overwrite: bool = False,
) -> CorpusSummary:
    """Write the corpus as two JSON Lines files, with one object with `text` and `source` per line.

    A module's docstrings and source are always on the same side of the split, and no text is written twice.

    Args:
        train: path of the training file.
        valid: path of the validation file.
        max_bytes: upper limit of the text of both together, in bytes of UTF-8.
        valid_share: share of the modules (and topics) that go to validation.
        overwrite: replace existing files.

    Raises:
        UsageError: the limit leaves one of the two files empty, or a path exists or cannot be written.
    """
    if not 0 < valid_share < 1:
        raise UsageError(f"valid_share {valid_share}: give a number between 0 and 1")
    refuse_to_overwrite("--train", train, overwrite)
    refuse_to_overwrite("--valid", valid, overwrite)
    count, size = {True: 0, False: 0}, {True: 0, False: 0}
    seen: set[bytes] = set()
    with whole_file(valid, "w") as valid_file, whole_file(train, "w") as train_file:
        for source, text in documents():
            raw = text.encode()
            digest = hashlib.sha256(raw).digest()
            if digest in seen:
                continue
            if sum(size.values()) + len(raw) > max_bytes:
                break
            seen.add(digest)
            side = _share_of(source) < valid_share
            print(json.dumps({"text": text, "source": source}), file=valid_file if side else train_file)
            count[side] += 1
            size[side] += len(raw)
        if not all(count.values()):
            raise UsageError(f"--max-mb {max_bytes / 1e6:g}: leaves nothing to train on or to validate; raise it")
    return CorpusSummary(count[False], count[True], size[False], size[True])


def _share_of(source: str) -> float:
    """A number in [0, 1) that depends only on the name of the module or topic."""
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:8]) / 2**64


def documents() -> Iterator[tuple[str, str]]:
    """Pairs of (topic or module, text), in the order given at the top of this file."""
    from pydoc_data.topics import topics  # 0.7 MB, needed here only

    for name in sorted(topics):
        if len(topics[name]) >= MIN_CHARACTERS:
            yield f"topic:{name}", topics[name].strip() + "\n"
    modules = list(_modules())
    for docstrings in (True, False):
        for name, path in modules:
            text = _read(path)
            if text and docstrings:
                text = _docstrings(name, text)
            if MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
                yield name, text


def _modules() -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of the standard library, then of the installed packages, each in a fixed mixed order."""
    folders = sysconfig.get_paths()
    standard, installed = Path(folders["stdlib"]), Path(folders["purelib"])
    for root in dict.fromkeys([standard, installed, Path(folders["platlib"])]):
        found = []
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).parts
            inside_other_root = root == standard and "site-packages" in parts
            if not inside_other_root and not _SKIPPED_FOLDERS.intersection(parts):
                found.append((".".join(parts)[: -len(".py")], path))
        # Mixed by name, so that a size limit takes some of every package instead of all of the first.
        yield from sorted(found, key=lambda item: (_share_of(item[0]), item[0]))


def _read(path: Path) -> str:
    """A file's text; empty if it is not UTF-8 or cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _docstrings(name: str, source: str) -> str:
    """The docstrings of one module as one text, their common indentation removed."""
    from inspect import cleandoc

    found = [cleandoc(match.group(3)) for match in _TRIPLE_QUOTED.finditer(source) if match.group(1) is not None]
    found = [text for text in found if len(text) > 20]
    return "\n\n".join([name, *found]) + "\n" if found else ""
