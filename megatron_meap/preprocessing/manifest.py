"""The manifest: what a dataset was made of and with, in `PREFIX.manifest.json` beside its `.bin` and `.idx`."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from megatron_meap.errors import UsageError
from megatron_meap.preprocessing.writer import MANIFEST_SUFFIX
from megatron_meap.records import misfit, read_json
from megatron_meap.tokenization.fingerprint import known_to_differ

FORMAT = 1

_FILES = {".bin": {"bytes": int, "sha256": str}, ".idx": {"bytes": int, "sha256": str}}
_SPECIAL = dict.fromkeys(("bos", "eod", "unk?"), int | None)
SHAPE = {
    "format": int,
    **dict.fromkeys(("documents", "tokens", "empty_documents", "skipped_lines", "text_bytes", "max_token_id"), int),
    "tokenizer": {"type": str, "name": str, "sha256": str, "ids?": str | None, **_SPECIAL},
    "mask_token": dict | None,
    "before_document": [int],
    "after_document": [int],
    "dtype": str,
    "inputs": [{"path": str, "files?": _FILES}],
    "files": _FILES,
}
"""The entries that are read; the others are for people."""


def read_manifest(prefix: str) -> dict[str, Any] | None:
    """The manifest of the dataset `prefix`; None if it has none.

    Raises:
        UsageError: the file is damaged, or is not such a manifest; the message says where.
    """
    path = Path(prefix + MANIFEST_SUFFIX)
    try:
        manifest = read_json(path, object, "make the dataset again")
    except FileNotFoundError:
        return None
    wrong = misfit(manifest, SHAPE) or _impossible_id(manifest)
    if wrong or manifest["format"] != FORMAT:
        raise UsageError(
            f"{path}: not a manifest of format {FORMAT} ({wrong or 'but another'}); make the dataset again"
        )
    return manifest


def _impossible_id(manifest: dict[str, Any]) -> str | None:
    """The first id that no token of any dataset can have, and where it is; None if there is none."""
    special = {f"tokenizer.{name}": [manifest["tokenizer"].get(name.rstrip("?"))] for name in _SPECIAL}
    for at, ids in (special | {name: manifest[name] for name in ("before_document", "after_document")}).items():
        for id in ids:
            if id is not None and not 0 <= id < 2**31:
                return f"{at.rstrip('?')}: {id} is no token"
    return None


def to_bytes(manifest: dict[str, Any]) -> bytes:
    """The manifest as it is written; bytes of a file's name that are not UTF-8 become JSON's own escapes."""
    return (json.dumps({"format": FORMAT, **manifest}, indent=1, ensure_ascii=False) + "\n").encode(
        errors="backslashreplace"
    )


def check_contents(prefix: str, manifest: dict[str, Any], bin_sha256: str, facts: dict[str, Any]) -> None:
    """Refuse a dataset that is not what its manifest says.

    Args:
        prefix: the dataset.
        manifest: its manifest.
        bin_sha256: of its `.bin`.
        facts: what else was found in it, under the names of the manifest's entries.

    Raises:
        UsageError: a difference; the message names it.
    """
    with open(prefix + ".idx", "rb") as file:
        digests = {".bin": bin_sha256, ".idx": hashlib.file_digest(file, "sha256").hexdigest()}
    for suffix, found in digests.items():
        if found != manifest["files"][suffix]["sha256"]:
            raise UsageError(f"{prefix}{suffix}: its sha256 differs from its manifest's; make the dataset again")
    sizes = {f"bytes of {suffix}": os.path.getsize(prefix + suffix) for suffix in digests}
    said = manifest | {f"bytes of {suffix}": manifest["files"][suffix]["bytes"] for suffix in digests}
    for name, value in (facts | sizes).items():
        if said[name] != value:
            raise UsageError(
                f"{prefix}: its manifest says {name} {said[name]}, but it has {value}; make the dataset again"
            )


def named(name: str, id: int | None) -> str:
    """A special token for people: its name in the manifest (`bos`, `eod`) and its id."""
    return f"no {name.upper()} token" if id is None else f"the {name.upper()} token {id}"


def check_manifest(
    prefix: str,
    *,
    tokenizer_sha256: str | None,
    tokenizer_ids: str | None = None,
    vocab_size: int,
    special: dict[str, int | None] | None = None,
) -> None:
    """Refuse a dataset that does not fit a training run; without a manifest, nothing is known and nothing is refused.

    Args:
        prefix: as in `--data-path`, without `.bin` or `.idx`.
        tokenizer_sha256: `tokenizer_fingerprint` of the run's arguments; None does not compare.
        tokenizer_ids: `ids_fingerprint` of the run's tokenizer; None does not compare.
        vocab_size: rows of the model's embedding in use (including the mask token, without padding).
        special: ids of `bos` and `eod` in the run's tokenizer, None for those it lacks; None does not compare.

    Raises:
        UsageError: another tokenizer, ids outside the vocabulary, or a `.bin` that is not the manifest's.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        return
    made_with = manifest["tokenizer"]
    if tokenizer_sha256 is not None and made_with["sha256"] != tokenizer_sha256:
        raise UsageError(
            f"{prefix}: made with another tokenizer ({made_with['type']} {made_with['name']}, "
            f"sha256 {made_with['sha256'][:12]}) than this run's (sha256 {tokenizer_sha256[:12]}); "
            "train with that tokenizer, or preprocess the corpus again with this one"
        )
    if known_to_differ(made_with.get("ids"), tokenizer_ids):
        raise UsageError(
            f"{prefix}: made with a tokenizer that gives different ids from this run's: their vocabulary files are the "
            "same, but other settings differ (tokenizer_config.json); train with that tokenizer, or preprocess the "
            "corpus again with this one"
        )
    for name, now in (special or {}).items():
        if (then := made_with[name]) != now:
            raise UsageError(
                f"{prefix}: made with {named(name, then)}, but this run's tokenizer has {named(name, now)}: it would "
                "not see where documents begin and end; set its special tokens as they were, or preprocess again"
            )
    if manifest["max_token_id"] >= vocab_size:
        raise UsageError(
            f"{prefix}: holds the token id {manifest['max_token_id']}, but the model's vocabulary has {vocab_size} "
            "tokens; train with the tokenizer that made the dataset"
        )
    for suffix, facts in manifest["files"].items():
        path = Path(prefix + suffix)
        if path.exists() and path.stat().st_size != facts["bytes"]:
            raise UsageError(
                f"{path}: {path.stat().st_size} bytes, but its manifest says {facts['bytes']}; make the dataset again"
            )
