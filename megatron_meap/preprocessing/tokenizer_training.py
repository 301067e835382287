"""Train a SentencePiece tokenizer like Llama's, with a [MASK] that no text can produce."""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_meap.errors import UsageError, refuse_to_overwrite
from megatron_meap.files import whole_file
from megatron_meap.preprocessing.documents import BadDocumentError, documents
from megatron_meap.preprocessing.inputs import STDIN, find_inputs
from megatron_meap.preprocessing.readers import InputFile, InputOptions
from megatron_meap.tokenization.mask_token import MASK_TOKEN

SPECIALS = 4
"""The first ids of a tokenizer without padding, which are not text: UNK, BOS, EOS and the mask token."""
_BYTES_AND_CONTROLS = 256 + SPECIALS
_LONGEST = 1 << 20  # bytes of a line: SentencePiece silently ignores longer ones
# Always pieces, however rare: in a novel, SentencePiece would find digits too rare to include.
_REQUIRED = "".join(map(chr, range(ord("!"), ord("~") + 1)))

_OPTIONS = InputOptions()  # JSON lines and the like, under the key `text`


def train_tokenizer(
    inputs: list[str],
    output: str | Path,
    *,
    vocab_size: int,
    options: InputOptions = _OPTIONS,
    max_bytes: int = 50_000_000,
    mask_token: str = MASK_TOKEN,
    pad_token: str | None = None,
    overwrite: bool = False,
) -> str:
    """Train a byte-fallback BPE model and write it to `output` (a `.model` file).

    Ids: 0 UNK, 1 BOS, 2 EOS, then padding if asked for, then the mask token, then the bytes and the pieces. No text is
    normalised: decoding gives exactly what was encoded (except U+2581, which SentencePiece uses for the space). Every
    printable ASCII character is a piece, even if the corpus does not have it. The mask token is a control symbol, which
    no text can produce. The same corpus always gives the same file.

    Args:
        inputs: as for preprocessing: files, globs or folders.
        output: path of the model.
        vocab_size: number of ids, all of the above included.
        options: how they are read, with a single key.
        max_bytes: text to train on, the same from every file; what short ones lack comes from longer ones.
        mask_token: text of the mask token.
        pad_token: text of a padding token; None: there is none.
        overwrite: replace an existing file.

    Returns:
        What it was trained on, in words.

    Raises:
        UsageError: the corpus has no text, or too little for that many pieces; the output exists or is a directory;
            the mask or padding token is also another token; the output is an input.
    """
    import sentencepiece

    if str(output).endswith("/") or Path(output).is_dir():
        raise UsageError(
            f"--output {output}: is a directory; name the .model file, such as {Path(output) / 'tokenizer.model'}"
        )
    refuse_to_overwrite("--output", output, overwrite)  # data and checkpoints may have been made with it
    _check_names(mask_token, pad_token)
    least = _BYTES_AND_CONTROLS + (pad_token is not None) + len(_REQUIRED) + 1  # and the space
    if vocab_size < least:
        raise UsageError(
            f"--vocab-size {vocab_size}: at least {least}, for the bytes, printable ASCII and the special tokens alone"
        )
    paths = find_inputs(inputs)
    if any(Path(output).exists() and path != STDIN and os.path.samefile(path, output) for path in paths):
        raise UsageError(f"--output {output}: is one of the inputs; name another file")
    lines, used = _sample(paths, options, max_bytes)
    if not lines:
        raise UsageError(f"--input {' '.join(inputs)}: no text in it; give a corpus")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            required_chars=_REQUIRED,
            split_digits=True,
            control_symbols=[mask_token],
            pad_id=-1 if pad_token is None else 3,
            pad_piece=pad_token or "<pad>",
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=True,
            max_sentence_length=_LONGEST,
            num_threads=1,  # it is stored in the model: another number gives another file
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).split("] ")[-1]
        larger = "is smaller than" in reason  # than the characters of the text
        remedy = "name a larger one" if larger else "give more text, or a smaller vocabulary"
        raise UsageError(f"--vocab-size {vocab_size}: {reason}; {remedy}") from error
    with whole_file(output) as file:
        file.write(model.getvalue())
    return used


def _check_names(mask_token: str, pad_token: str | None) -> None:
    """Refuse the names of other tokens, what could be a piece (a character or a byte), and what cannot be typed."""
    taken = dict.fromkeys(("<unk>", "<s>", "</s>"), "one of UNK, BOS and EOS")
    for flag, name in (("--mask-token", mask_token), ("--pad-token", pad_token)):
        if name is None:
            continue
        if len(name.strip()) < 2 or not name.isprintable() or re.fullmatch("<0x[0-9A-F]{2}>", name):
            raise UsageError(
                f"{flag} {name!r}: must be printable, and not a single character or a byte; name it such as [MASK]"
            )
        if name in taken:
            raise UsageError(f"{flag} {name}: is {taken[name]} of this tokenizer already; name another")
        taken[name] = f"the token of {flag}"


def _sample(paths: list[str], options: InputOptions, max_bytes: int) -> tuple[list[str], str]:
    """Lines from every file, the same amount from each that has so much, and a description of them."""
    found: dict[str, list[str]] = {path: [] for path in paths}
    left, partly = max_bytes, 0
    for done, path in enumerate(sorted(paths, key=_size)):  # the shortest first: the others share what it does not use
        share = left / (len(paths) - done)
        for line in _lines(path, options):
            found[path].append(line)
            size = len(line.encode())
            share, left = share - size, left - size
            if share <= 0:
                partly += 1
                break
    used = f"{(max_bytes - left) / 1e6:.1f} MB of text from {len(paths):,} file{'s' * (len(paths) != 1)}"
    used += f", {partly:,} of which only in part (--max-mb)" * bool(partly)
    return [line for path in paths for line in found[path]], used


def _size(path: str) -> int:
    return 0 if path == STDIN else os.stat(path).st_size


def _lines(path: str, options: InputOptions) -> Iterator[str]:
    """Lines of the documents, without their newlines, which stay single bytes as in Llama's tokenizer."""
    seen = 0
    with contextlib.closing(InputFile(path, options)) as file:
        for block in file.blocks():
            for document in documents(file.kind, block, options):
                seen += 1
                if isinstance(document, BadDocumentError):
                    raise UsageError(f"{path}:{seen}: {document}")
                for line in document[0].splitlines() if document else ():
                    if line:
                        yield from _cut(line.encode())


def _cut(line: bytes) -> Iterator[str]:
    """A line in parts short enough for SentencePiece, split before a space if possible, else between characters."""
    start = 0
    while len(line) - start > _LONGEST:
        end = line.rfind(b" ", start + 1, start + _LONGEST + 1)
        if end < 0:
            end = start + _LONGEST
            while line[end] & 0xC0 == 0x80:  # within a character
                end -= 1
        yield line[start:end].decode()
        start = end
    yield line[start:].decode()
