"""Merge several datasets into one, keeping the order of their documents."""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import megatron_meap
from megatron_meap.errors import UsageError
from megatron_meap.files import cannot_write
from megatron_meap.preprocessing.index import CHUNK, Index, read_index
from megatron_meap.preprocessing.manifest import check_contents, named, read_manifest, to_bytes
from megatron_meap.preprocessing.outputs import refuse_existing, refuse_prefix
from megatron_meap.preprocessing.writer import DatasetWriter

_SUMMED = ("documents", "tokens", "empty_documents", "skipped_lines", "text_bytes")
_COMMON = ("tokenizer", "mask_token", "before_document", "after_document", "dtype")
_DECIDED_BY = {
    "mask_token": ("its mask token is", "--meap-mask-token"),
    "before_document": ("each of its documents begins with", "--prepend-bos"),
    "after_document": ("each of its documents ends with", "--append-eod"),
    "dtype": ("its ids are", "--tokenizer-type and --tokenizer-model"),
}
"""What, besides the tokenizer, must be the same: how to state what a dataset has, and the flags that determine it."""


def find_datasets(inputs: list[str], output_prefix: str) -> list[str]:
    """Prefixes of the given datasets, where a folder stands for all datasets in it, sorted by name.

    The output of an earlier merge is left out if it is in such a folder.

    Raises:
        UsageError: a folder has no datasets, a dataset is given twice, or the output is one of the inputs.
    """
    output, found = _identity(output_prefix), dict[Any, str]()
    for name in inputs:
        if Path(name).is_dir():
            inside = sorted(str(path.with_suffix("")) for path in Path(name).glob("*.idx"))
            inside = [prefix for prefix in inside if _identity(prefix) != output]
            if not inside:
                raise UsageError(f"--input {name}: no dataset (.idx) in this folder")
        else:
            inside = [name]
        for prefix in inside:
            identity = _identity(prefix)
            if identity == output:
                raise UsageError(f"--output-prefix {output_prefix}: is one of the inputs; name another")
            if identity in found:
                other = "" if found[identity] == prefix else f" (as {found[identity]})"
                raise UsageError(
                    f"--input {prefix}: named twice{other}, so its documents would be in the dataset twice"
                )
            found[identity] = prefix
    return list(found.values())


def _identity(prefix: str) -> Any:
    """What identifies a dataset, whatever its name: device and inode of its index; its path if it has no index."""
    with contextlib.suppress(OSError):
        stat = os.stat(prefix + ".idx")
        return stat.st_dev, stat.st_ino
    return os.path.realpath(prefix)


def merge_datasets(prefixes: list[str], output_prefix: str, *, overwrite: bool = False) -> dict[str, Any] | None:
    """Write the documents of all datasets, in the given order, to a single dataset; all or nothing.

    Returns:
        The manifest of the merged dataset; None if one of the inputs has no manifest: then the result has none either.

    Raises:
        UsageError: a dataset is damaged, all are empty, or they were made with different tokenizers or flags.
    """
    begun = time.monotonic()
    refuse_prefix(output_prefix)
    if not overwrite:
        refuse_existing([output_prefix])
    dtype, documents = read_index(prefixes[0]).dtype, 0
    for prefix in prefixes:  # hold one index at a time: each keeps a file open, and there may be thousands
        index = read_index(prefix)
        if index.dtype != dtype:
            raise UsageError(
                f"{prefix}: its ids are {index.dtype}, those of {prefixes[0]} {dtype}: made with different tokenizers; "
                "preprocess one of them again"
            )
        documents += index.documents
    if not documents:
        raise UsageError(f"--input {' '.join(prefixes[:3])}: no documents in any of the {len(prefixes)} datasets")
    manifests = _compatible_manifests(prefixes)
    try:
        Path(output_prefix).parent.mkdir(parents=True, exist_ok=True)
        writer = DatasetWriter(output_prefix, dtype.type)
        try:
            held: dict[str, str] = {}  # what no manifest tells
            for prefix in prefixes:
                index = read_index(prefix)
                same = held.setdefault(_append(writer, prefix, index), prefix)
                if same != prefix and index.tokens:
                    raise UsageError(f"{prefix}: has the same documents as {same}; leave out one of the two")
            files = writer.finish(_boundaries(prefixes), documents)
            manifest = (
                _merged(manifests, prefixes, output_prefix, files, time.monotonic() - begun) if manifests else None
            )
            writer.publish(to_bytes(manifest) if manifest else None)
        finally:
            writer.discard()
    except OSError as error:
        raise cannot_write(error.filename or output_prefix, error) from error
    return manifest


def _compatible_manifests(prefixes: list[str]) -> list[dict[str, Any]] | None:
    """The manifests of all datasets; None if one is missing."""
    manifests = {prefix: manifest for prefix in prefixes if (manifest := read_manifest(prefix))}
    for prefix, manifest in manifests.items():
        first, other = next(iter(manifests.items()))
        if manifest["tokenizer"]["sha256"] != other["tokenizer"]["sha256"]:
            raise UsageError(f"{prefix}: made with another tokenizer than {first}; preprocess one of them again")
        for name in ("bos", "eod"):
            here, there = manifest["tokenizer"][name], other["tokenizer"][name]
            if here != there:
                raise UsageError(
                    f"{prefix}: made with {named(name, here)}, {first} with {named(name, there)}; preprocess one of "
                    "them again, with the same special tokens"
                )
        for name, (has, flags) in _DECIDED_BY.items():
            if manifest[name] != other[name]:
                raise UsageError(
                    f"{prefix}: {has} {_shown(manifest[name])}, in {first} it is {_shown(other[name])}; preprocess one "
                    f"of them again, with the same {flags}"
                )
    ids = {prefix: known for prefix, manifest in manifests.items() if (known := manifest["tokenizer"].get("ids"))}
    for prefix in ids:
        if ids[prefix] != ids[first := next(iter(ids))]:
            raise UsageError(
                f"{prefix}: made with a tokenizer that gives different ids from that of {first}: their vocabulary "
                "files are the same, but other settings differ (tokenizer_config.json); preprocess one of them again"
            )
    parts = {prefix: [part for part in manifest["inputs"] if "files" in part] for prefix, manifest in manifests.items()}
    held: dict[str, str] = {}  # hash of a dataset: the input that contains it, as such or merged with others
    for prefix in sorted(manifests, key=lambda prefix: len(parts[prefix])):
        for each in (manifests[prefix], *parts[prefix]):
            again = held.setdefault(each["files"][".bin"]["sha256"], prefix)
            if again != prefix:
                some = "documents" if parts[again] else "the documents"
                raise UsageError(f"{prefix}: already contains {some} of {again}; leave out one of the two")
    return list(manifests.values()) if len(manifests) == len(prefixes) else None


def _shown(fact: Any) -> str:
    """A value of a manifest, as shown to people: ids, a mask token or a type."""
    if isinstance(fact, dict):
        return f"{fact.get('text')} (id {fact.get('id')})"
    return f"the ids {fact}" if fact else "nothing" if isinstance(fact, list) else str(fact)


def _append(writer: DatasetWriter, prefix: str, index: Index) -> str:
    """Write the documents of a dataset; returns the sha256 of its ids."""
    before, digest, largest = writer.tokens, hashlib.sha256(), 0
    with open(prefix + ".bin", "rb") as file:
        while chunk := file.read(CHUNK * index.dtype.itemsize):
            writer.add(chunk, b"")
            digest.update(chunk)
            largest = max(largest, int(np.frombuffer(chunk, index.dtype).max()))
    if manifest := read_manifest(prefix):
        facts = {"documents": index.documents, "tokens": index.tokens, "max_token_id": largest}
        check_contents(prefix, manifest, digest.hexdigest(), facts)
    if writer.tokens - before != index.tokens:
        raise UsageError(f"{prefix}.bin: changed while it was read; merge again when it is complete")
    for first in range(0, len(index.lengths), CHUNK):
        writer.add(b"", index.lengths[first : first + CHUNK].tobytes())
    return digest.hexdigest()


def _boundaries(prefixes: list[str]) -> Iterator[np.ndarray]:
    """Document boundaries of the merged dataset, in pieces."""
    yield np.zeros(1, np.int64)
    sequences = 0
    for index in map(read_index, prefixes):
        for first in range(1, len(index.boundaries), CHUNK):
            yield sequences + index.boundaries[first : first + CHUNK]
        sequences += len(index.lengths)


def _merged(
    manifests: list[dict[str, Any]], prefixes: list[str], output_prefix: str, files: dict[str, Any], seconds: float
) -> dict[str, Any]:
    return {
        "dataset": Path(output_prefix).name,
        **{name: sum(manifest[name] for manifest in manifests) for name in _SUMMED},
        "max_token_id": max(manifest["max_token_id"] for manifest in manifests),
        "made_by": f"megatron-meap {megatron_meap.__version__}",
        **{name: manifests[0][name] for name in _COMMON},
        "tokenizer": max((manifest["tokenizer"] for manifest in manifests), key=lambda each: bool(each.get("ids"))),
        "inputs": [
            {"path": prefix, "documents": manifest["documents"], "files": manifest["files"]}
            for prefix, manifest in zip(prefixes, manifests, strict=True)
        ],
        "seconds": round(seconds, 3),
        "files": files,
    }
