"""A whole preprocessing job: it makes a Megatron dataset for each key from the input files, or nothing at all."""

import os
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import megatron_meap
from megatron_meap.backend.garbage import nothing_is_garbage
from megatron_meap.errors import UsageError, refuse, refusing
from megatron_meap.files import cannot_write
from megatron_meap.preprocessing.blocks import BlockEncoder
from megatron_meap.preprocessing.index import token_dtype
from megatron_meap.preprocessing.inputs import STDIN, find
from megatron_meap.preprocessing.journal import Journal
from megatron_meap.preprocessing.outputs import Outputs, dataset_prefix, refuse_existing, refuse_prefix, state_shape
from megatron_meap.preprocessing.progress import Counts, Progress
from megatron_meap.preprocessing.readers import InputOptions
from megatron_meap.preprocessing.sources import Sources
from megatron_meap.preprocessing.workers import WorkerPool
from megatron_meap.tokenization.encoders import Choice, choose_encoder
from megatron_meap.tokenization.fingerprint import ids_fingerprint, tokenizer_fingerprint
from megatron_meap.tokenization.reference import Reference, load_reference

DEFAULT_WORKERS = 8
"""The most workers started by default: each costs memory, and eight encode faster than one thread can decompress."""

_POSITIONS = {"jsonl": "line", "text": "document", "parquet": "row"}
_REMEDIES = {"no key": "name another key with --json-keys", "not JSON": "read plain text with --input-format text"}
"""What the user may have meant, by the beginning of the reason why a line is bad."""


@dataclass(frozen=True)
class Job:
    """What to preprocess, and how."""

    inputs: list[str]
    """Files, globs, folders, or `-`."""

    output_prefix: str
    """Each key's dataset is `PREFIX_KEY_document`."""

    options: InputOptions = field(default_factory=InputOptions)
    append_eod: bool = False
    prepend_bos: bool = False

    workers: int | None = None
    """Number of processes; None means one for each available core, at most `DEFAULT_WORKERS`."""

    encoder: Choice = "auto"
    skip_bad_lines: bool = False
    overwrite: bool = False
    resume: bool = False

    log_interval: int | None = None
    """Documents between progress lines; None prints one every few seconds."""


def preprocess(job: Job, tokenizer_args: Any) -> list[dict[str, Any]]:
    """Run a job.

    Args:
        job: what to preprocess.
        tokenizer_args: Megatron-style arguments (see `reference.add_tokenizer_flags`).

    Returns:
        The manifest of each dataset, in the order of the keys.

    Raises:
        UsageError: something in the input, the flags or the machine has to be fixed first.
    """
    begun = time.monotonic()
    found = find(job.inputs)
    _prepare_outputs(job, found.paths)
    files = Sources(found, job.options)
    with nothing_is_garbage():
        reference = load_reference(tokenizer_args)
        before, after = _around_documents(job, reference)
        encoder, note = choose_encoder(reference, files.sample(), job.encoder)
    workers = job.workers or min(available_cores(), DEFAULT_WORKERS)
    dtype = token_dtype(reference.vocab_size)
    print(f"encoder: {note}", f"workers: {workers}", sep="\n", file=sys.stderr, flush=True)
    if reference.eod is not None and reference.eod not in after:
        print("note: nothing ends a document; for pretraining add --append-eod", file=sys.stderr, flush=True)
    files.describe(found.left_out())
    work = BlockEncoder(reference, encoder, job.options, prefix=before, suffix=after, dtype=dtype, workers=workers)
    facts = _facts(job, tokenizer_args, reference, before, after)
    with WorkerPool(work, workers) as pool:
        shape = state_shape(job.options.keys)
        journal = Journal(job.output_prefix, facts, files.identities(), resume=job.resume, state_shape=shape)
        outputs = None
        try:
            outputs = Outputs(job.output_prefix, job.options.keys, dtype, journal.state)
            _encode_all(job, files, pool, outputs, journal)
            _check_separated(job, files, outputs)
            seconds = round(time.monotonic() - begun, 3)
            made = {"encoder": encoder.name, "inputs": files.described(), "seconds": seconds}
            manifests = outputs.publish({**facts, **made})
        except BaseException as error:
            keep = journal.state is not None
            if outputs:
                outputs.close(remove=not keep)
            journal.close(remove=not keep)
            if (explained := _explained(error, job, keep and outputs is not None)) is error:
                raise
            raise explained from error
        journal.close(remove=True)
    return manifests


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare_outputs(job: Job, inputs: list[str]) -> None:
    """Refuse what can be refused before any work is done, and create the output folder."""
    keys, separator = "--json-keys " + " ".join(job.options.keys), job.options.separator
    refuse(
        (job.workers is not None and job.workers < 1, f"--workers {job.workers}: at least 1"),
        (job.log_interval is not None and job.log_interval < 1, f"--log-interval {job.log_interval}: at least 1"),
        (job.resume and inputs == [STDIN], "--resume: standard input cannot be read again; give files"),
        (len(set(job.options.keys)) < len(job.options.keys), f"{keys}: a key is named twice"),
        ("/" in keys, f"{keys}: has a slash, which the name of its dataset cannot have; rename the key"),
        (separator == "", "--text-separator '': is empty; leave it out, and each file is one document"),
    )
    for given in (keys, f"--text-separator {separator}"):
        with refusing(f"{given}: cannot occur in text that is UTF-8", UnicodeEncodeError):
            given.encode()
    refuse_prefix(job.output_prefix)
    folder = os.path.dirname(job.output_prefix) or os.curdir
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output-prefix {job.output_prefix}: cannot create {folder}: {error.strerror}") from error
    if not job.overwrite:
        refuse_existing([dataset_prefix(job.output_prefix, key) for key in job.options.keys])


def _around_documents(job: Job, reference: Reference) -> tuple[list[int], list[int]]:
    """Ids before and after every document: those that the tokenizer adds, and BOS and EOD if asked for."""
    before, after = list(reference.prefix), list(reference.suffix)
    if job.prepend_bos and before[:1] != [reference.bos]:
        if reference.bos is None:
            raise UsageError("--prepend-bos: this tokenizer has no BOS token; leave the flag out")
        before.insert(0, reference.bos)
    if job.append_eod:
        if reference.eod is None:
            raise UsageError("--append-eod: this tokenizer has no end-of-document token (EOS); leave the flag out")
        after.append(reference.eod)
    return before, after


def _facts(job: Job, args: Any, reference: Reference, before: list[int], after: list[int]) -> dict[str, Any]:
    """What determines the ids of a job: the common part of its manifests and its journal."""
    named = args.tokenizer_model or args.vocab_file or ""
    return {
        "made_by": f"megatron-meap {megatron_meap.__version__}",
        "tokenizer": {
            "type": args.tokenizer_type,
            "name": os.path.basename(os.path.normpath(named)) if named else "",
            "sha256": tokenizer_fingerprint(args),
            "ids": ids_fingerprint(reference.tokenizer),
            "vocab_size": reference.vocab_size,
            "bos": reference.bos,
            "eod": reference.eod,
            "unk": reference.unk,
        },
        "mask_token": asdict(reference.mask) if reference.mask else None,
        "flags": {
            "append_eod": job.append_eod,
            "prepend_bos": job.prepend_bos,
            "json_keys": list(job.options.keys),
            "input_format": job.options.kind,
            "text_separator": job.options.separator,
        },
        "before_document": before,
        "after_document": after,
        "dtype": token_dtype(reference.vocab_size).__name__,
    }


def _encode_all(job: Job, files: Sources, pool: Any, outputs: Outputs, journal: Journal) -> None:
    """Read, encode and write the files in order, from the first one that the journal does not list as finished."""
    first = journal.finished
    if first:
        print(f"resuming after {first} of {len(files.paths)} files", file=sys.stderr, flush=True)
    before = Counts(files.bytes_before(first), outputs.text_bytes, outputs.documents, outputs.tokens)
    progress = Progress(files.total_bytes, before, every_documents=job.log_interval)
    current, seen = first, 0
    try:
        for (index, kind, consumed), block in pool.map(files.tasks(first)):
            if index != current:
                journal.record(index, outputs.state())
                current, seen = index, 0
            for position, reason in block.bad:
                where = f"{files.paths[index]}:{seen + position + 1}"
                if not job.skip_bad_lines:
                    what = "" if kind == "jsonl" else f" ({_POSITIONS[kind]} {seen + position + 1})"
                    other = "".join(f", {each}" for begins, each in _REMEDIES.items() if reason.startswith(begins))
                    raise UsageError(
                        f"{where}{what}: {reason}; fix it{other}, or leave such lines out with --skip-bad-lines"
                    )
                outputs.add_bad(files.paths[index], seen + position + 1, reason)
            seen += block.positions
            outputs.add(block)
            progress.update(Counts(consumed, outputs.text_bytes, outputs.documents, outputs.tokens))
    finally:
        progress.close()


def _check_separated(job: Job, files: Sources, outputs: Outputs) -> None:
    """Refuse a separator that occurs nowhere: every file would be one document, which is not what was asked for."""
    texts = files.of_kind("text")
    if job.options.separator and texts and not outputs.separated:
        raise UsageError(
            f"--text-separator {job.options.separator!r}: occurs nowhere in the plain text ({texts[0]}"
            f"{' and others' * (len(texts) > 1)}); correct it, or leave it out: then each file is one document"
        )


def _explained(error: BaseException, job: Job, keep: bool) -> BaseException:
    """The error for the user: it explains a full disk, and how to resume if any input files are finished."""
    if isinstance(error, OSError):
        error = cannot_write(error.filename or job.output_prefix, error)
    if keep and isinstance(error, UsageError):
        return UsageError(f"{error} (finished input files are kept: continue with --resume)")
    return error
