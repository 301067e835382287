"""Train a SentencePiece tokenizer in the manner of Llama's, with [MASK] where no text can reach it."""

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
"""The first ids of a tokenizer without padding, which are no text: UNK, BOS, EOS and the mask token."""
_BYTES_AND_CONTROLS = 256 + SPECIALS
_LONGEST = 1 << 20  # bytes of a line: SentencePiece leaves longer ones out without a word
# Always pieces, however rare: by its share of the text SentencePiece would leave out the digits of a novel.
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
    normalised: what is encoded comes back as it was (but U+2581, which SentencePiece uses for the space). Every
    printable ASCII character is a piece, in the corpus or not. The mask token is a control symbol, which no text can
    produce. The same corpus always gives the same file.

    Args:
        inputs: as for preprocessing: files, globs or folders.
        output: path of the model.
        vocab_size: number of ids, all of the above included.
        options: how they are read; of the keys there is one.
        max_bytes: text to train on, of all files alike: what a short one leaves, longer ones get.
        mask_token: how the mask token is written.
        pad_token: how a padding token is written; None makes none.
        overwrite: replace a file that is there.

    Returns:
        What it was trained on, in words.

    Raises:
        UsageError: a corpus without text, or too little of it for that many pieces; an output that is there, or a
            directory; a mask or padding token that is another one as well.
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
    lines, used = _sample(find_inputs(inputs), options, max_bytes)
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
            num_threads=1,  # written into the model: another number gives another file
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).split("] ")[-1]
        raise UsageError(f"--vocab-size {vocab_size}: {reason}; give more text, or a smaller vocabulary") from error
    with whole_file(output) as file:
        file.write(model.getvalue())
    return used


def _check_names(mask_token: str, pad_token: str | None) -> None:
    """Refuse names that are another token's, and what a piece may be: a character, or a byte."""
    taken = dict.fromkeys(("<unk>", "<s>", "</s>"), "one of UNK, BOS and EOS")
    for flag, name in (("--mask-token", mask_token), ("--pad-token", pad_token)):
        if name is None:
            continue
        if len(name.strip()) < 2 or re.fullmatch("<0x[0-9A-F]{2}>", name):
            raise UsageError(f"{flag} {name!r}: may not be a single character or a byte; name it such as [MASK]")
        if name in taken:
            raise UsageError(f"{flag} {name}: is {taken[name]} of this tokenizer already; name another")
        taken[name] = f"the token of {flag}"


def _sample(paths: list[str], options: InputOptions, max_bytes: int) -> tuple[list[str], str]:
    """Lines out of every file, the same amount of each as far as it has so much, and what they are, in words."""
    found: dict[str, list[str]] = {path: [] for path in paths}
    left, partly = max_bytes, 0
    for done, path in enumerate(sorted(paths, key=_size)):  # the shortest first: the others share what it leaves
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
    """Lines of the documents, without the newlines: these stay single bytes, as in Llama's tokenizer."""
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
    """A line in parts that SentencePiece takes, cut before a space where there is one, else between two characters."""
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
