"""Tokenized turns on disk: made once, by one process, and mapped into memory by all processes that train."""

import hashlib
import json
from argparse import Namespace
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from megatron_meap.errors import UsageError, refusing
from megatron_meap.files import CannotWriteError, whole_directory
from megatron_meap.records import read_json
from megatron_meap.sft.conversations import FIX_OR_SKIP, Conversation, read_conversations
from megatron_meap.sft.fields import BadConversation
from megatron_meap.sft.templates import Rendered
from megatron_meap.sft.turns import Turn, TurnEncoder

_VERSION = 4  # of the files' layout and of everything that determines their content
_BATCH = 4_000_000  # characters that are tokenized at once
_SHOWN = 5  # bad lines that are reported individually


@dataclass(frozen=True)
class TurnStore:
    """The turns of some files."""

    ids: npt.NDArray[np.int32]
    """int32 [tokens]: all turns, one after the other."""
    table: npt.NDArray[np.int64]
    """int64 [turns, 4]: first token, tokens of the prompt, tokens of the answer, number of the conversation."""
    conversations: int
    skipped: int
    """Bad lines skipped."""

    def __len__(self) -> int:
        return len(self.table)

    def turn(self, number: int) -> Turn:
        """One turn."""
        start, prompt, answer, _ = self.table[number].tolist()
        end = int(self.table[number + 1, 0]) if number + 1 < len(self.table) else len(self.ids)
        return Turn(self.ids[start:end], prompt, answer)

    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of every turn, int64 [turns]."""
        return np.diff(self.table[:, 0], append=len(self.ids))


def open_store(files: list[str], args: Namespace, digest: str | None = None) -> tuple[TurnStore, str]:
    """The turns of some files with this run's tokenizer and template, and the digest that names them.

    They are tokenized if they are not yet in the cache: `--data-cache-path`, or `cache` beside the first file.

    Args:
        files: JSON Lines or JSON, plain or compressed.
        args: validated.
        digest: if it is already known; to compute it, all files are read.

    Raises:
        UsageError: files that are missing or cannot be read; bad lines, without `--skip-bad-lines`.
    """
    encoder = None if digest else turn_encoder(args)
    digest = digest or digest_of(files, args, encoder)
    named = f".meap-sft-{digest[:16]}-{args.meap_tokenizer_ids[:8]}"  # hidden: files may be named by their folder
    folder = cache_folder(files, args) / named
    try:
        if not (folder / "facts.json").exists():
            _build(files, encoder or turn_encoder(args), folder, args.skip_bad_lines)
        return _opened(folder), digest
    except (OSError, CannotWriteError) as error:
        reason = error.reason if isinstance(error, CannotWriteError) else error.strerror
        raise UsageError(
            f"{folder.parent}: the cache of tokenized conversations cannot be used ({reason}); name a writable "
            "--data-cache-path with enough room"
        ) from error


def _opened(folder: Path) -> TurnStore:
    """What `_tokenize` wrote.

    Raises:
        UsageError: it is damaged.
    """
    remedy = f"remove {folder}, and it is made again"
    shape = dict.fromkeys(("conversations", "skipped", "turns", "tokens"), int)
    facts = read_json(folder / "facts.json", shape, remedy)
    with refusing(f"{folder}: damaged", ValueError, EOFError, remedy=remedy):
        ids, table = np.memmap(folder / "ids.bin", np.int32, "r"), np.load(folder / "turns.npy")
        if (len(ids), table.shape) != (facts["tokens"], (facts["turns"], 4)):
            raise ValueError(f"{len(ids)} tokens where {facts['tokens']} were written")
    return TurnStore(ids, table, facts["conversations"], facts["skipped"])


def cache_folder(files: list[str], args: Namespace) -> Path:
    """Where tokenized turns are kept."""
    return Path(args.data_cache_path) if args.data_cache_path else Path(files[0]).parent / "cache"


def turn_encoder(args: Namespace) -> TurnEncoder:
    """The encoder of this run's conversations.

    Raises:
        UsageError: the tokenizer has no text, no EOS or no chat template.
    """
    from megatron_meap.tokenization.huggingface import tokenizer_of

    tokenizer = tokenizer_of(args)
    if tokenizer is None:
        raise UsageError("--meap-sft: needs a tokenizer; a NullTokenizer has no text")
    history = not args.meap_sft_no_history
    return TurnEncoder(tokenizer, args.meap_sft_template_text, history, args.meap_sft_date)


def digest_of(files: list[str], args: Namespace, encoder: TurnEncoder | None = None) -> str:
    """sha256 of everything that determines the turns: the content of the files, the tokenizer, the template."""
    whole = hashlib.sha256()
    facts: list[Any] = [_VERSION, args.meap_tokenizer_sha256, args.meap_mask_token_id, args.skip_bad_lines]
    facts += (encoder or turn_encoder(args)).facts
    whole.update(json.dumps(facts).encode())
    for name in files:
        with refusing(f"{name}: cannot be read", OSError), open(name, "rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _build(files: list[str], encoder: TurnEncoder, folder: Path, skip_bad: bool) -> None:
    """Tokenize the files into a folder that appears only when it is complete."""
    try:
        with whole_directory(folder) as temporary:
            _tokenize(files, encoder, temporary, skip_bad)
    except FileExistsError:
        if not (folder / "facts.json").exists():  # else another process was faster
            raise


def _tokenize(files: list[str], encoder: TurnEncoder, folder: Path, skip_bad: bool) -> None:
    """Write the turns of all conversations, in order."""
    bad: list[str] = []
    notes = _Notes()

    def skip(error: UsageError) -> None:
        if not skip_bad:
            raise error
        bad.append(str(error))
        if len(bad) <= _SHOWN:
            print(f"skipped: {str(error).removesuffix(f'; {FIX_OR_SKIP}')}", flush=True)

    tokens = 0
    table = array("q")  # the columns of `TurnStore.table`, a turn after the other
    source = (conversation for name in files for conversation in read_conversations(name, skip))
    bar = tqdm(source, desc="tokenizing", unit=" conversations", disable=None, mininterval=1)
    with open(folder / "ids.bin", "wb") as output:
        for batch in _batches(_rendered(bar, encoder, skip, notes)):
            turns = encoder.encode([rendered for _, rendered in batch])
            for (conversation, _), turn in zip(batch, turns, strict=True):
                turn.ids.tofile(output)
                table.extend((tokens, turn.prompt, turn.answer, conversation))
                tokens += len(turn.ids)
    if not table:
        raise UsageError(f"{files[0]}: holds no conversation to train on ({len(bad)} bad lines skipped)")
    if notes.unanswered:
        print(f"note: {notes.unanswered:,} conversations end with a question, which is left out", flush=True)
    if notes.unused:
        print(f"note: fields that are not used: {', '.join(sorted(notes.unused))}", flush=True)
    np.save(folder / "turns.npy", np.frombuffer(table, np.int64).reshape(-1, 4))
    facts = {"conversations": table[-1] + 1, "skipped": len(bad), "turns": len(table) // 4, "tokens": tokens}
    (folder / "facts.json").write_text(json.dumps(facts))


@dataclass
class _Notes:
    """What to report about the conversations."""

    unused: set[str] = field(default_factory=set)
    """Names of fields that change nothing."""
    unanswered: int = 0
    """Conversations that end with a question."""


def _rendered(
    conversations: Iterable[Conversation], encoder: TurnEncoder, bad: Callable[[UsageError], None], notes: _Notes
) -> Iterator[tuple[int, Rendered]]:
    """The turns of all conversations that the template can render, with the conversation's number among them."""
    number = 0
    for conversation in conversations:
        try:
            turns = list(encoder.turns(conversation.messages, conversation.tools))
        except BadConversation as error:
            bad(UsageError(f"{conversation.place}: {error}; {FIX_OR_SKIP}"))
            continue
        notes.unused |= conversation.unused
        notes.unanswered += conversation.ends_unanswered
        yield from ((number, turn) for turn in turns)
        number += 1


def _batches(turns: Iterable[tuple[int, Rendered]]) -> Iterator[list[tuple[int, Rendered]]]:
    """The turns in batches of `_BATCH` characters or a little more."""
    batch: list[tuple[int, Rendered]] = []
    size = 0
    for turn in turns:
        batch.append(turn)
        size += len(turn[1].text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
