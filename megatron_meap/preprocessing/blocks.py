"""A worker's task: turn a block of input into the token ids of its documents."""

import os
from collections.abc import Buffer, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_meap.errors import UsageError
from megatron_meap.preprocessing.documents import BadDocumentError, documents
from megatron_meap.preprocessing.readers import InputOptions
from megatron_meap.preprocessing.recognition import Kind
from megatron_meap.tokenization.encoders import Encoder, Ids
from megatron_meap.tokenization.reference import Reference

CACHE_BYTES = 384 << 20
"""Memory that the caches of all workers may take in total."""

CHECKED_CHARACTERS = 2000
"""Characters of each block that are compared with the reference tokenizer: about 1% of the work."""


@dataclass
class KeyTokens:
    """The documents of one block for one key."""

    tokens: Buffer = b""
    """Ids of all documents in order, in the dataset's dtype."""

    lengths: Buffer = b""
    """Tokens of each document, int32."""

    documents: int = 0
    empty: int = 0
    """Number of documents without tokens, which are left out."""

    text_bytes: int = 0
    largest: int = -1
    """Largest id; -1 if there are no documents."""


@dataclass
class EncodedBlock:
    """A worker's answer."""

    keys: list[KeyTokens]
    positions: int = 0
    """Number of lines, rows or pieces in the block."""

    separated: bool = False
    """Whether the plain-text separator occurs in the block."""

    bad: list[tuple[int, str]] = field(default_factory=list)
    """(position, reason) of everything that is not a document."""


class BlockEncoder:
    """Encodes blocks; every forked worker has a copy of one instance."""

    def __init__(
        self,
        reference: Reference,
        encoder: Encoder,
        options: InputOptions,
        *,
        prefix: Sequence[int],
        suffix: Sequence[int],
        dtype: type[np.number],
        workers: int,
    ) -> None:
        """`prefix` and `suffix` are the ids to put before and after every document."""
        self._reference = reference
        self._encoder = encoder
        self._options = options
        self._prefix = np.array(prefix, dtype)
        self._suffix = np.array(suffix, dtype)
        self._dtype = dtype
        self._cache_bytes = CACHE_BYTES // workers
        self._baseline = 0

    def __call__(self, task: tuple[Kind, bytes]) -> EncodedBlock:
        """Encode one block (kind, bytes)."""
        kind, block = task
        ids: list[list[Ids]] = [[] for _ in self._options.keys]
        answer = EncodedBlock([KeyTokens() for _ in self._options.keys])
        if kind == "text" and self._options.separator:
            answer.separated = self._options.separator.encode() in block
        checked = False
        for position, texts in enumerate(documents(kind, block, self._options)):
            answer.positions = position + 1
            try:
                if isinstance(texts, BadDocumentError):
                    raise texts
                raw = [text.encode() for text in texts or ()]
                encoded = [self._encode(text) for text in raw]
            except BadDocumentError as error:
                answer.bad.append((position, str(error)))
                continue
            for key, text, found, tokens in zip(ids, raw, encoded, answer.keys, strict=False):
                tokens.text_bytes += len(text)
                if len(found):
                    key.append(found)
                else:
                    tokens.empty += 1
            if texts and not checked:
                self._check_exact(texts[0][:CHECKED_CHARACTERS])
                checked = True
        for tokens, key in zip(answer.keys, ids, strict=True):
            self._join(key, tokens)
        self._bound_memory()
        return answer

    def _encode(self, text: bytes) -> Ids:
        try:
            return self._encoder.encode(text)
        except ValueError as error:
            raise BadDocumentError(f"the tokenizer refuses it: {error}") from None

    def _check_exact(self, text: str) -> None:
        """Compare part of every block with the reference: the comparison at the start covers only a sample."""
        if not np.array_equal(self._encoder.encode(text.encode()), self._reference.encode(text)):
            raise UsageError(
                f"{self._encoder.name} gives other ids than {self._reference.library} for the text {text[:60]!r}...; "
                "run again with --encoder reference"
            )

    def _join(self, found: list[Ids], tokens: KeyTokens) -> None:
        """Join all documents of a key into one array, each with its prefix and suffix."""
        if not found:
            return
        kind = found[0].dtype if isinstance(found[0], np.ndarray) else np.int64
        before, after = self._prefix.astype(kind), self._suffix.astype(kind)
        joined = np.concatenate([part for ids in found for part in (before, ids, after)])
        tokens.largest = self._checked(joined)
        tokens.tokens = joined.astype(self._dtype)
        tokens.lengths = np.array([len(ids) for ids in found], np.int32) + np.int32(len(before) + len(after))
        tokens.documents = len(found)

    def _checked(self, ids: np.ndarray) -> int:
        """The largest id; refuse ids outside the vocabulary, and the mask token, which text must never produce."""
        least, largest = (0 if ids.dtype.kind == "u" else int(ids.min())), int(ids.max())
        if least < 0 or largest >= self._reference.vocab_size:
            raise UsageError(
                f"token id {least if least < 0 else largest} is outside the tokenizer's vocabulary of "
                f"{self._reference.vocab_size}; check --vocab-size and the tokenizer files"
            )
        mask = self._reference.mask
        if mask and not mask.added and (ids == mask.id).any():
            raise UsageError(
                f"the text produces the mask token {mask.text!r} (id {mask.id}); name another with --meap-mask-token"
            )
        return largest

    def _bound_memory(self) -> None:
        """Empty the encoder's caches once this process has grown by its share of `CACHE_BYTES`."""
        size = _resident_bytes()
        if not self._baseline:
            self._baseline = size
        elif size - self._baseline > self._cache_bytes:
            self._encoder.shed()
            self._baseline = _resident_bytes()


def _resident_bytes() -> int:
    """Resident memory of this process; 0 if the system does not report it."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
