"""The tokenizer that training uses, for preprocessing.

Megatron's own `build_tokenizer` creates it, so that ids agree with training. Two kinds avoid importing Megatron, which
takes seconds (a test compares both with Megatron's tokenizers): a plain SentencePiece model, to whose library Megatron
passes the text unchanged, and Hugging Face tokenizers (`without_torch`).

Text is never parsed for special tokens: a document that contains `</s>` or `[MASK]` as text gets ordinary ids.
"""

import argparse
import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_meap.errors import UsageError, one_line
from megatron_meap.tokenization import without_torch
from megatron_meap.tokenization.mask_token import MASK_TOKEN, MaskToken, resolve_mask_token, special_id, vocabulary_size

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
TOKENIZER_TYPES = (*SENTENCEPIECE_TYPES, "HuggingFaceTokenizer", "TikTokenizer", "GPT2BPETokenizer", "NullTokenizer")


@dataclass(frozen=True)
class Reference:
    """A tokenizer, and the properties of it on which a dataset depends."""

    library: str
    """`sentencepiece`, `huggingface`, `megatron` (GPT2BPETokenizer), `tiktoken` or `null-text`."""

    encode: Callable[[str], Sequence[int]]
    """Ids of only the text: no BOS, no EOS, special tokens as plain text."""

    vocab_size: int
    """Without a mask token that is appended."""

    prefix: tuple[int, ...]
    """Ids that the tokenizer itself puts before every text (Hugging Face post-processors may)."""

    suffix: tuple[int, ...]
    """Ids that the tokenizer itself puts after every text."""

    bos: int | None
    eod: int | None
    unk: int | None
    model: Any
    """The library's own tokenizer object."""

    tokenizer: Any
    """An object with `detokenize(ids)`: Megatron's tokenizer, or a stand-in for it."""

    mask: MaskToken | None
    """The mask token; None for a NullTokenizer."""


def add_tokenizer_flags(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add Megatron-LM's tokenizer flags, with its names and defaults (declared here: importing its parser is slow)."""
    group = parser.add_argument_group("tokenizer, as for training")
    group.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, required=required)
    group.add_argument("--tokenizer-model", help="SentencePiece .model, Hugging Face folder, or tiktoken JSON file")
    group.add_argument("--vocab-file", help="vocabulary of a BPE tokenizer")
    group.add_argument("--merge-file", help="merges of a BPE tokenizer")
    group.add_argument("--vocab-size", type=int, help="size of a NullTokenizer, or to truncate a tiktoken vocabulary")
    group.add_argument("--tokenizer-special-tokens", dest="special_tokens", nargs="+", help="TikTokenizer only")
    group.add_argument("--tiktoken-pattern", choices=["v1", "v2"])
    group.add_argument("--tiktoken-num-special-tokens", type=int, default=1000)
    group.add_argument("--tokenizer-hf-no-use-fast", action="store_true")
    group.add_argument("--tokenizer-hf-no-include-special-tokens", action="store_true")
    group.add_argument("--trust-remote-code", action="store_true")
    group.add_argument("--null-tokenizer-eod-id", type=int)
    group.add_argument("--meap-mask-token", default=MASK_TOKEN, help=f"text of the mask token (default: {MASK_TOKEN})")


def load_reference(args: Any) -> Reference:
    """Load the tokenizer that Megatron-style arguments name (`tokenizer_type`, `tokenizer_model`, ...).

    Raises:
        UsageError: missing or wrong flags, or files that are not a tokenizer.
    """
    if args.tokenizer_type not in TOKENIZER_TYPES:
        raise UsageError(f"--tokenizer-type {args.tokenizer_type}: use one of {', '.join(TOKENIZER_TYPES)}")
    _check_files(args)
    light = None
    if args.tokenizer_type in SENTENCEPIECE_TYPES:
        light = _sentencepiece(args.tokenizer_model)
    elif args.tokenizer_type == "HuggingFaceTokenizer":
        light = without_torch.load(args)
    megatron = light or _megatron_tokenizer(args)
    model: Any = getattr(megatron._tokenizer, "tokenizer", None)
    encode = plain_encode(megatron)
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    if megatron.library in ("huggingface", "megatron") and not args.tokenizer_hf_no_include_special_tokens:
        prefix, suffix = around(model("a")["input_ids"], encode("a"))
    mask = None if megatron.library == "null-text" else resolve_mask_token(megatron, args.meap_mask_token)
    return Reference(
        megatron.library,
        encode,
        mask.id if mask and mask.added else vocabulary_size(megatron),
        prefix,
        suffix,
        bos=special_id(megatron, "bos"),
        eod=special_id(megatron, "eod"),
        unk=special_id(megatron, "unk"),
        model=model,
        tokenizer=megatron,
        mask=mask,
    )


def plain_encode(tokenizer: Any) -> Callable[[str], Sequence[int]]:
    """`Reference.encode` of a Megatron tokenizer."""
    model = getattr(tokenizer._tokenizer, "tokenizer", None)
    if tokenizer.library == "tiktoken":
        return model.encode_ordinary  # type: ignore[union-attr]
    if tokenizer.library == "sentencepiece":
        return model.encode_as_ids  # type: ignore[union-attr]
    if tokenizer.library in ("huggingface", "megatron"):
        return _huggingface_encode(model)
    return tokenizer.tokenize


def refuse_a_file(args: Any) -> None:
    """Refuse a file, such as tokenizer.json, if transformers needs its folder."""
    if args.tokenizer_type == "HuggingFaceTokenizer" and Path(args.tokenizer_model or "").is_file():
        folder = Path(args.tokenizer_model).parent
        raise UsageError(
            f"--tokenizer-model {args.tokenizer_model}: a file; a HuggingFaceTokenizer is named by its folder, {folder}"
        )


def _check_files(args: Any) -> None:
    """Check that the files that a tokenizer type needs are named and exist."""
    refuse_a_file(args)
    kind = args.tokenizer_type
    needed = {"GPT2BPETokenizer": ("vocab_file", "merge_file"), "NullTokenizer": ("vocab_size",)}
    for name in needed.get(kind, ("tokenizer_model",)):
        flag, value = "--" + name.replace("_", "-"), getattr(args, name, None)
        if not value:
            raise UsageError(f"{flag}: needed by --tokenizer-type {kind}")
        if name == "vocab_size":
            if value < 1:
                raise UsageError(f"{flag} {value}: at least 1")
            continue
        if kind != "HuggingFaceTokenizer" and not Path(value).is_file():  # a pipe cannot be read twice
            found = "a folder" if Path(value).is_dir() else "not a file" if Path(value).exists() else "no such file"
            raise UsageError(f"{flag} {value}: {found}; --tokenizer-type {kind} needs a file")


def _sentencepiece(path: str) -> SimpleNamespace:
    """A stand-in for Megatron's tokenizer of a SentencePiece model."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    try:
        model.Load(path)
    except (RuntimeError, OSError) as error:
        raise UsageError(f"--tokenizer-model {path}: not a SentencePiece model") from error
    return SimpleNamespace(
        library="sentencepiece",
        _tokenizer=SimpleNamespace(tokenizer=model),
        vocab_size=model.get_piece_size(),
        detokenize=model.decode_ids,
        bos=model.bos_id(),
        eod=model.eos_id(),
        unk=model.unk_id(),
        pad=model.pad_id(),
    )


def _megatron_tokenizer(args: Any) -> Any:
    """Megatron's own tokenizer for these arguments, without the output of its imports."""
    full = argparse.Namespace(**{**_MEGATRON_DEFAULTS, **vars(args)})
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("torch").setLevel(logging.ERROR)
        try:
            from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

            return build_tokenizer(full)
        except Exception as error:  # a library may raise anything for a file that is not its own
            named = args.tokenizer_model or args.vocab_file or args.vocab_size
            reason = one_line(error)
            raise UsageError(f"{named}: not a tokenizer of --tokenizer-type {args.tokenizer_type}: {reason}") from error


_MEGATRON_DEFAULTS = {
    "metadata_path": None,
    "chat_template": None,
    "pad_vocab_size": False,
    "null_tokenizer_pad_id": -1,
}


def _huggingface_encode(model: Any) -> Callable[[str], Sequence[int]]:
    """Encode as the Hugging Face tokenizer does, but with special tokens in the text as text."""
    if isinstance(model, without_torch.FastModel):
        return model.plain
    backend = getattr(model, "backend_tokenizer", None)
    if backend is None:
        return lambda text: model(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    own = type(backend).from_str(backend.to_str())  # a copy: calling the model resets these settings
    own.encode_special_tokens = True
    own.no_truncation()
    own.no_padding()
    return lambda text: own.encode(text, add_special_tokens=False).ids


def around(whole: Sequence[int], inner: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a tokenizer puts before and after a text, by the ids of both and of the text alone."""
    whole, inner = tuple(whole), tuple(inner)
    for start in range(len(whole) - len(inner) + 1):
        if whole[start : start + len(inner)] == inner:
            return whole[:start], whole[start + len(inner) :]
    raise UsageError("--tokenizer-model: this tokenizer's post-processor changes the text's own ids; not supported")
