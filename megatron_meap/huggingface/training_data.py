"""Facts about a checkpoint's training data, as far as its manifests can still be found."""

from argparse import Namespace
from typing import Any

from megatron_meap.tokenization.huggingface import begin_with_bos, begin_without_bos, tokenizer_of
from megatron_meap.trainer.carried import manifests


def documents_begin_with(args: Namespace) -> list[int]:
    """Ids put before every document of the training data; none if the manifests disagree or are missing."""
    starts = [manifest.get("before_document", []) for _, _, manifest in manifests(args)]
    return starts[0] if starts and all(start == starts[0] for start in starts) else []


def trained_tokenizer(args: Namespace, add_bos: bool | None = None) -> Any | None:
    """The tokenizer of a run (`tokenizer_of`), which puts BOS before a text if the training documents began with it.

    Args:
        args: the arguments in a checkpoint.
        add_bos: whether to put BOS before every text, whatever the manifests say.
    """
    tokenizer = tokenizer_of(args)
    if tokenizer is None:
        return None
    if add_bos is False:
        begin_without_bos(tokenizer)
    if add_bos is None:
        add_bos = tokenizer.bos_token is not None and documents_begin_with(args) == [tokenizer.bos_token_id]
    if add_bos:
        begin_with_bos(tokenizer)
    return tokenizer
