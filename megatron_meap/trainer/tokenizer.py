"""The tokenizer of a run: found, built, and given its mask token and a vocabulary for both."""

import contextlib
import io
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_meap.errors import UsageError, one_line
from megatron_meap.tokenization.files import ONE_FILE
from megatron_meap.tokenization.mask_token import all_special_ids, resolve_mask_token, vocabulary_size
from megatron_meap.tokenization.reference import refuse_a_file
from megatron_meap.trainer import carried, fim


def set_tokenizer(args: Namespace) -> Any:
    """Build and return the tokenizer, find or append the mask token, and pad the vocabulary of both."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer, vocab_size_with_padding

    if args.make_vocab_size_divisible_by < 1:
        raise UsageError(f"--make-vocab-size-divisible-by {args.make_vocab_size_divisible_by}: at least 1")
    carried.take_tokenizer(args)
    if args.tokenizer_model and args.tokenizer_type in ONE_FILE and not Path(args.tokenizer_model).exists():
        raise UsageError(f"--tokenizer-model {args.tokenizer_model}: no such file")
    refuse_a_file(args)
    named = args.tokenizer_model
    if args.tokenizer_type == "HuggingFaceTokenizer" and os.path.isabs(named or "") and not os.path.exists(named):
        raise UsageError(f"--tokenizer-model {named}: nothing there; if the directory was moved, name its new place")
    padded_by_user = args.padded_vocab_size
    pad_vocab_size, args.pad_vocab_size = args.pad_vocab_size, False  # padding comes after the mask token
    try:
        # sentencepiece and tokenizers write about a bad file to stdout and stderr before they raise
        with contextlib.redirect_stdout(io.StringIO()):
            tokenizer = build_tokenizer(args)
    except Exception as error:
        path, reason = args.tokenizer_model or args.vocab_file, one_line(error)
        if path is None:
            raise UsageError(
                f"--tokenizer-model: missing, which --tokenizer-type {args.tokenizer_type} needs; give both, as the "
                "data was made with"
            ) from error
        raise UsageError(f"--tokenizer-model {path}: not a {args.tokenizer_type} tokenizer ({reason})") from error
    args.pad_vocab_size = pad_vocab_size
    mask = resolve_mask_token(tokenizer, args.meap_mask_token)
    needed = max(vocabulary_size(tokenizer), mask.id + 1)
    sentinels = fim.check(args, tokenizer, mask.id)
    if padded_by_user is None:
        args.padded_vocab_size = vocab_size_with_padding(needed, args) if pad_vocab_size else needed
    elif padded_by_user < needed:
        raise UsageError(
            f"the vocabulary has {padded_by_user} rows, but the tokenizer and the mask token {mask.text!r} need "
            f"{needed}; raise --padded-vocab-size, or use the tokenizer the checkpoint was trained with"
        )
    args.meap_mask_token_id = mask.id
    args.meap_tokenizer_vocab_size = vocabulary_size(tokenizer)
    args.meap_special_ids = (*all_special_ids(tokenizer), *sentinels)
    return tokenizer
