"""Fill-in-the-middle training (`--fim-data`): errors that Megatron does not notice, or only in the middle of a run."""

from argparse import Namespace
from typing import Any

from megatron_meap.errors import UsageError
from megatron_meap.tokenization.mask_token import special_id, token_id

_SENTINELS = ("prefix", "middle", "suffix", "pad")


def check(args: Namespace, tokenizer: Any, mask_id: int) -> tuple[int, ...]:
    """Refuse what gives wrong samples: unknown sentinels, another end of documents, lost borders.

    Args:
        args: parsed, the tokenizer's names in `fim_*_token`.
        tokenizer: Megatron's.
        mask_id: of the mask token.

    Returns:
        Ids of the sentinels: they are not ordinary text, however the tokenizer classifies them.
    """
    if not args.fim_data:
        return ()
    if args.dataloader_inter_document_masking:
        raise UsageError(
            "--fim-data: Megatron's fill-in-the-middle samples do not tell where documents end, so that "
            "--dataloader-inter-document-masking would let them see each other; drop one of the two"
        )
    for name in ("rate", "spm_rate", "fragment_rate"):
        rate = getattr(args, f"fim_{name}")
        needed = name != "fragment_rate" or args.fim_split_sample is not None
        if needed and (rate is None or not 0 <= rate <= 1):
            raise UsageError(f"--fim-{name.replace('_', '-')} {rate}: give a probability from 0 to 1")
    names = [*_SENTINELS, "eod", *(["split_sample"] if args.fim_split_sample else [])]
    ids = {name: _known(args, tokenizer, name) for name in names}
    used = {mask_id: "the mask token", special_id(tokenizer, "eod"): "the end of a document"}
    for name in (name for name in names if name != "eod"):
        if ids[name] in used and (name, used[ids[name]]) != ("pad", "the end of a document"):
            raise UsageError(f"{_flag(name)}: the same token as {used[ids[name]]} (id {ids[name]}); name another")
        used[ids[name]] = _flag(name)
    if ids["eod"] != special_id(tokenizer, "eod"):
        raise UsageError(
            f"--fim-eod-token {args.fim_eod_token}: documents end with this tokenizer's EOD (id "
            f"{special_id(tokenizer, 'eod')}), not with id {ids['eod']}; name that token"
        )
    return tuple(ids.values())


def _flag(name: str) -> str:
    return "--fim-split-sample" if name == "split_sample" else f"--fim-{name}-token"


def _known(args: Namespace, tokenizer: Any, name: str) -> int:
    """Id of a sentinel."""
    text = getattr(args, _flag(name).removeprefix("--").replace("-", "_"))
    found = token_id(tokenizer, text)
    if found is None:
        raise UsageError(f"{_flag(name)} {text}: the tokenizer has no such token; name one of its own, or add it there")
    return found
