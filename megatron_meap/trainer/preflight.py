"""Refuses what is known to fail before Megatron starts; rank 0 checks it once for the whole job."""

import contextlib
import fcntl
import os
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.training import get_tokenizer

from megatron_meap.backend import megatron_patches
from megatron_meap.checkpoint.latest import HashFiles
from megatron_meap.cluster import meeting, run_files
from megatron_meap.errors import UsageError
from megatron_meap.preprocessing.index import read_index
from megatron_meap.preprocessing.manifest import check_manifest
from megatron_meap.sft import data as sft
from megatron_meap.tokenization.fingerprint import ids_fingerprint, tokenizer_fingerprint
from megatron_meap.tokenization.mask_token import special_id
from megatron_meap.trainer import model, schedule
from megatron_meap.trainer.blend import blends, ranges
from megatron_meap.trainer.record import describe
from megatron_meap.trainer.resume import choose_start
from megatron_meap.trainer.writable import check_writable

_lock: Any = None  # the open file that holds the lock on --save, for as long as the process lives


def check(args: Namespace, data_only: bool = False) -> torch.distributed.Store | None:
    """Check the data and the checkpoint that a run starts from, and settle in `args` which checkpoint that is.

    Args:
        args: parsed and validated; `ckpt_step` is set if an older checkpoint than the newest is used.
        data_only: ignore `--save` and `--load`, for tools that only read the data.

    Returns:
        The store over which the ranks met, for `init_process_group`; None if they need none or have one.

    Raises:
        UsageError: on every rank, with what rank 0 found.
    """
    args.meap_tokenizer_sha256 = tokenizer_fingerprint(args)
    found, store = meeting.on_rank_zero(args, lambda hash_files: look(args, data_only, hash_files))
    args.ckpt_step, args.eval_iters = found["iteration"], found["eval_iters"]
    if found.get("start") is not None:
        megatron_patches.verified(found["start"])
    args.meap_sft_digests, args.meap_sft_train_digest = found["digests"], found["train"]
    args.meap_sft_date = found["date"]
    args.meap_tokenizer_ids = found["tokenizer_ids"]
    args.meap_record = found["record"]
    for warning in found["warnings"] if args.rank == 0 else ():
        print(f"warning: {warning}", flush=True)
    if args.rank == 0 and found.get("start"):
        print(f"starts from {found['start']}", flush=True)
    return store


def look(args: Namespace, data_only: bool = False, hash_files: HashFiles | None = None) -> dict[str, Any]:
    """The checks themselves, by one process; with `--dry-run` they leave no trace.

    Args:
        args: parsed and validated.
        data_only: ignore `--save` and `--load`.
        hash_files: shares the hashing of a checkpoint among ranks.

    Returns:
        `iteration`, for `ckpt_step`, and `start`, the checkpoint that the run starts from (None for a new run);
        `eval_iters`, 0 without validation data; `digests` and `train`, which identify the conversations of fine-tuning;
        `date`, which its template writes; `tokenizer_ids` (`ids_fingerprint`); `record`, of what determines the run;
        `warnings`, about differences from the checkpoint, one per line.
    """
    if not data_only:
        schedule.check(args)
        model.check(args)
    args.meap_tokenizer_ids = ids_fingerprint(get_tokenizer())
    args.meap_sft_digests, args.meap_sft_train_digest = {}, None
    if args.meap_sft:
        sft.check(args)
    else:
        _check_data(args)
    if args.eval_iters > 0 and not _has_validation(args):
        print("note: no data is named for validation: nothing is evaluated (--eval-iters 0)", flush=True)
        args.eval_iters = 0  # Megatron would evaluate on None
    found: dict[str, Any] = {
        "eval_iters": args.eval_iters,
        "digests": args.meap_sft_digests,
        "train": args.meap_sft_train_digest,
        "date": args.meap_sft_date,
        "tokenizer_ids": args.meap_tokenizer_ids,
    }
    args.meap_record = found["record"] = describe(args, get_tokenizer())
    if data_only:
        return found | {"iteration": args.ckpt_step, "warnings": []}
    run_files.refuse_a_stop(args.save)
    if args.dry_run:
        _look_at_save_directory(args)
    else:
        _lock_save_directory(args)
    try:
        return found | choose_start(args, hash_files)
    except UsageError:
        _leave_save_directory(args)
        raise


def _check_data(args: Namespace) -> None:
    """Every dataset must be there, whole, long enough, and made with this tokenizer; the cache must be writable."""
    if args.mock_data:
        return
    prefixes = data_prefixes(args)
    if args.split is not None and blends(args)[1] is not None:
        raise UsageError(
            f"--split {args.split}: contradicts data that is named for each split (--train-data-path, "
            "--valid-data-path, --per-split-data-args-path); drop one of them"
        )
    if args.per_dataset_sequences_path is not None and not Path(args.per_dataset_sequences_path).is_file():
        raise UsageError(f"--per-dataset-sequences-path {args.per_dataset_sequences_path}: no such file")
    for prefix in prefixes:
        if not is_object_storage_path(prefix):
            _check_dataset(prefix, args)
        elif not (args.data_cache_path and args.object_storage_cache_path):
            raise UsageError(
                f"{prefix}: data in an object storage needs --data-cache-path and --object-storage-cache-path, local "
                "directories for indices of samples and of the dataset"
            )
    cache = cache_directory(args)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise UsageError(
            f"--data-cache-path {cache}: cannot be written ({error.strerror}); name a writable directory"
        ) from error


def _has_validation(args: Namespace) -> bool:
    """Whether there is data to validate on."""
    if args.meap_sft:
        return sft.has_validation(args)
    _, per_split = blends(args)
    if per_split is not None:
        return per_split[1] is not None
    return args.split is None or ranges(args)[1] is not None


def data_prefixes(args: Namespace) -> list[str]:
    """The prefixes of all datasets given by flags, each once."""
    blend, per_split = blends(args)
    prefixes = [prefix for part in [blend, *(per_split or [])] if part for prefix in part[0]]
    if not prefixes:
        raise UsageError("--data-path: no data is named; give the prefix of a dataset (or --mock-data)")
    return list(dict.fromkeys(prefixes))


def data_facts(args: Namespace) -> dict[str, str]:
    """Facts, by prefix, by which the datasets of two hosts can be compared."""
    return {prefix: f"{read_index(prefix).tokens} tokens" for prefix in data_prefixes(args)}


def cache_directory(args: Namespace) -> Path:
    """Where Megatron keeps the indices of the samples."""
    return Path(args.data_cache_path) if args.data_cache_path else Path(data_prefixes(args)[0]).parent / "cache"


def _check_dataset(prefix: str, args: Namespace) -> None:
    """Check one .bin/.idx pair."""
    tokens = read_index(prefix).tokens
    if tokens <= args.seq_length:
        raise UsageError(
            f"{prefix}: holds {tokens} tokens, less than one sample of {args.seq_length} + 1; "
            "use more data or a shorter --seq-length"
        )
    if args.split is not None:
        _check_split(prefix, args)
    tokenizer = get_tokenizer()
    check_manifest(
        prefix,
        tokenizer_sha256=args.meap_tokenizer_sha256,
        tokenizer_ids=args.meap_tokenizer_ids,
        vocab_size=args.meap_tokenizer_vocab_size,
        special={name: special_id(tokenizer, name) for name in ("bos", "eod")},
    )


def _check_split(prefix: str, args: Namespace) -> None:
    """Refuse a split without a document: Megatron would search for its samples forever, even if none are needed."""
    documents = len(read_index(prefix).lengths)
    for name, share in zip(("training", "validation", "test"), ranges(args), strict=True):
        if share is not None and round(share[0] * documents) == round(share[1] * documents):
            raise UsageError(
                f"--split {args.split}: gives {name} none of the {documents} documents of {prefix}; "
                "give it a larger share, or 0 for none"
            )


def _lock_save_directory(args: Namespace) -> None:
    """Refuse a second job that saves to the same directory: the lock lives as long as this process."""
    global _lock
    if args.save is None:
        return
    path = Path(args.save) / ".lock"
    if _lock is not None and _lock.name == str(path):
        return  # a second run in this process
    check_writable("--save", args.save)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = open(path, "a+")  # noqa: SIM115  # stays open
    except OSError as error:
        raise UsageError(f"--save {args.save}: cannot be written ({error.strerror})") from error
    _take_lock(opened, args.save)
    opened.truncate(0)
    opened.write(f"process {os.getpid()} on {os.uname().nodename}")
    opened.flush()
    _lock = opened


def _leave_save_directory(args: Namespace) -> None:
    """Remove the traces of a refused start; what others have left there stays."""
    global _lock
    if _lock is None or args.dry_run:
        return
    path, _lock = Path(_lock.name), _lock.close()
    with contextlib.suppress(OSError):
        path.unlink()
        path.parent.rmdir()


def _take_lock(opened: Any, save: str) -> None:
    """Lock an open file until it is closed, or refuse because another job has locked it."""
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        opened.seek(0)
        holder = opened.read().strip() or "unknown"
        raise UsageError(
            f"--save {save}: another job saves there ({holder}); wait for it, stop it, or name another directory"
        ) from error


def _look_at_save_directory(args: Namespace) -> None:
    """Refuse what `_lock_save_directory` would refuse, without leaving anything behind."""
    if args.save is None:
        return
    check_writable("--save", args.save)
    with contextlib.suppress(FileNotFoundError), open(Path(args.save) / ".lock") as opened:
        _take_lock(opened, args.save)
