"""The inputs of a job: all are checked before any work is done, then opened one after the other."""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pickle import PickleBuffer
from typing import Any

from megatron_meap.errors import UsageError, shown
from megatron_meap.preprocessing.documents import BadDocumentError, documents
from megatron_meap.preprocessing.inputs import STDIN, Found
from megatron_meap.preprocessing.readers import InputFile, InputOptions
from megatron_meap.preprocessing.recognition import KINDS, Kind

_SAMPLED_FILES, _SAMPLED_DOCUMENTS, _SAMPLED_CHARACTERS = 8, 64, 16_000
_NAMED_FILES = 3


@dataclass(frozen=True)
class _Look:
    """What is known about a file from opening it."""

    kind: Kind
    compression: str | None
    size: int
    changed_ns: int


class Sources:
    """The input files, in order."""

    def __init__(self, found: Found, options: InputOptions) -> None:
        """Check each file.

        Raises:
            UsageError: one cannot be read, or is not what its name claims.
        """
        self.paths = found.paths
        self._options = options
        self._stdin = InputFile(STDIN, options) if self.paths == [STDIN] else None
        self._looks = [self._look(path) for path in self.paths]
        self.total_bytes = self.bytes_before(len(self.paths))

    def _look(self, path: str) -> _Look:
        file = self._stdin or InputFile(path, self._options)
        try:
            return _look_at(file)
        finally:
            file.close()

    def describe(self, left_out: str) -> None:
        """Print what is read, and warn if it is a mixture of kinds."""
        kinds = Counter(look.kind for look in self._looks)
        parts = []
        for kind, count in kinds.most_common():
            packed = Counter(look.compression for look in self._looks if look.kind == kind and look.compression)
            inside = ", ".join(f"{each} {name}" for name, each in packed.most_common())
            parts.append(f"{count:,} {KINDS[kind]}" + (f" ({inside})" if inside else ""))
        files = (
            "standard input"
            if self._stdin
            else f"{len(self.paths):,} file{'s' * (len(self.paths) != 1)}, {self.total_bytes / 1e6:.1f} MB"
        )
        print(f"input: {files}: {', '.join(parts)}" + (f"; left out: {left_out}" if left_out else ""), file=sys.stderr)
        if self._options.separator and "text" not in kinds:
            print("note: --text-separator changes nothing: there is no plain text among the inputs", file=sys.stderr)
        main = max(kinds, key=lambda kind: (kind != "text", kinds[kind]))
        for kind, count in kinds.items() if len(kinds) > 1 else ():
            if kind == main:
                continue
            some = self.of_kind(kind)
            names = ", ".join(some[:_NAMED_FILES]) + (f" and {count - _NAMED_FILES} more" * (count > _NAMED_FILES))
            whole = ", each of which becomes a document" if kind == "text" and not self._options.separator else ""
            line = f"warning: a mixture: among other kinds {count:,} {KINDS[kind]}{whole}: {names}"
            print(shown(line), file=sys.stderr)

    def of_kind(self, kind: Kind) -> list[str]:
        """Paths of the files of a kind that are not empty."""
        looks = zip(self.paths, self._looks, strict=True)
        return [path for path, look in looks if look.kind == kind and (look.size or self._stdin)]

    def bytes_before(self, index: int) -> int:
        """Size of the files before number `index`."""
        return sum(look.size for look in self._looks[:index])

    def identities(self) -> list[list[Any]]:
        """What identifies a file and its state: path, bytes, and time of its last change (ns)."""
        return [[path, look.size, look.changed_ns] for path, look in zip(self.paths, self._looks, strict=True)]

    def described(self) -> list[dict[str, Any]]:
        """The inputs as a manifest lists them."""
        return [
            {
                "path": path,
                "bytes": None if self._stdin else look.size,
                "kind": look.kind,
                "compression": look.compression,
            }
            for path, look in zip(self.paths, self._looks, strict=True)
        ]

    def sample(self) -> list[str]:
        """Texts from the beginnings of some files, which are spread over all of them."""
        texts: list[str] = []
        step = -(-len(self.paths) // _SAMPLED_FILES)
        share = max(1, _SAMPLED_DOCUMENTS // len(self.paths[::step]))
        for path in self.paths[::step]:
            file = self._stdin or InputFile(path, self._options)
            block = file.first_block()
            found = [
                text[:_SAMPLED_CHARACTERS]
                for document in (documents(file.kind, block, self._options) if block else ())
                if document and not isinstance(document, BadDocumentError)
                for text in document
            ]
            texts += found[:: -(-len(found) // share)] if found else []
            if not self._stdin:
                file.close()
        return texts

    def tasks(self, first: int) -> Iterator[tuple[tuple[int, Kind, int], tuple[Kind, PickleBuffer]]]:
        """((file, kind, input bytes up to here), (kind, block)) for every block, from file number `first` on."""
        before = self.bytes_before(first)
        for index in range(first, len(self.paths)):
            file = self._stdin or InputFile(self.paths[index], self._options)
            try:
                if _look_at(file) != self._looks[index]:
                    raise UsageError(f"{file.name}: changed since the job began; start again when it is complete")
                for block in file.blocks():
                    yield (index, file.kind, before + file.position), (file.kind, PickleBuffer(block))
            finally:
                file.close()
            before += file.size


def _look_at(file: InputFile) -> _Look:
    return _Look(file.kind, file.compression, file.size, file.changed_ns)
