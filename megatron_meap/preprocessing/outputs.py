"""Everything that a job writes: a dataset for each key, and a report of skipped lines."""

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_meap.errors import UsageError
from megatron_meap.files import sync
from megatron_meap.preprocessing.blocks import EncodedBlock
from megatron_meap.preprocessing.manifest import to_bytes
from megatron_meap.preprocessing.writer import MANIFEST_SUFFIX, DatasetWriter, Written, refuse_folders

REPORT_SUFFIX = ".bad_lines.jsonl"


def dataset_prefix(prefix: str, key: str) -> str:
    """The dataset of one key, named as Megatron-LM's tool names it."""
    return f"{prefix}_{key}_document"


def refuse_prefix(prefix: str) -> None:
    """Raise a UsageError for a prefix that cannot be the beginning of the names of a dataset's files."""
    if prefix.endswith((".bin", ".idx")):
        raise UsageError(
            f"--output-prefix {prefix}: leave out {prefix[-4:]}: the names of both files begin with the prefix"
        )
    if os.path.basename(prefix) in ("", ".", ".."):
        name = os.path.join(prefix, "train")
        raise UsageError(
            f"--output-prefix {prefix}: is a folder; add the beginning of the files' names, such as {name}"
        )


def refuse_existing(prefixes: list[str]) -> None:
    """Raise a UsageError if one of the datasets already exists."""
    for prefix in prefixes:
        for suffix in (".bin", ".idx", MANIFEST_SUFFIX):
            path = prefix + suffix
            if os.path.exists(path):
                raise UsageError(f"{path}: exists already; give --overwrite to replace it, or another --output-prefix")


@dataclass
class _Totals:
    empty: int = 0
    text_bytes: int = 0
    largest: int = -1


def state_shape(keys: tuple[str, ...]) -> Any:
    """The shape of `Outputs.state` when it is read back (see `records.misfit`)."""
    written = {key: {"documents": int, "tokens": int, "bin_sha256": str} for key in keys}
    totals = {key: {"empty": int, "text_bytes": int, "largest": int} for key in keys}
    return {"written": written, "totals": totals, "skipped": int, "separated": bool, "report_bytes": int}


class Outputs:
    """A job's files, under temporary names until `publish`, and its counts."""

    def __init__(
        self, prefix: str, keys: tuple[str, ...], dtype: type[np.number], state: dict[str, Any] | None = None
    ) -> None:
        """Start, or continue from a `state()` of an earlier run.

        Raises:
            UsageError: the files cannot be created, or are not those of the earlier run.
        """
        starts = {key: Written(**state["written"][key]) if state else None for key in keys}
        self.report_path = Path(prefix + REPORT_SUFFIX)
        report = f"{self.report_path}.partial"
        refuse_folders(self.report_path, report)
        self._writers: dict[str, DatasetWriter] = {}
        try:
            for key in keys:
                self._writers[key] = DatasetWriter(dataset_prefix(prefix, key), dtype, starts[key])
        except UsageError:
            for writer in self._writers.values():
                writer.close() if state else writer.discard()
            raise
        self._totals = {key: _Totals(**state["totals"][key]) if state else _Totals() for key in keys}
        self.skipped: int = state["skipped"] if state else 0
        self.separated: bool = state["separated"] if state else False
        """Whether the plain-text separator has occurred."""
        self._report = open(report, "a+b")  # noqa: SIM115 - closed with the writers
        self._report.truncate(state["report_bytes"] if state else 0)

    @property
    def documents(self) -> int:
        """Documents written so far, for all keys."""
        return sum(writer.documents for writer in self._writers.values())

    @property
    def tokens(self) -> int:
        """Tokens written so far, for all keys."""
        return sum(writer.tokens for writer in self._writers.values())

    @property
    def text_bytes(self) -> int:
        """Bytes of text (UTF-8) encoded so far, for all keys."""
        return sum(total.text_bytes for total in self._totals.values())

    def add(self, block: EncodedBlock) -> None:
        """Append the documents of one block."""
        self.separated |= block.separated
        for writer, total, found in zip(self._writers.values(), self._totals.values(), block.keys, strict=True):
            writer.add(found.tokens, found.lengths)
            total.empty += found.empty
            total.text_bytes += found.text_bytes
            total.largest = max(total.largest, found.largest)

    def add_bad(self, file: str, position: int, reason: str) -> None:
        """Record a skipped line, row or document; `position` counts from 1."""
        self.skipped += 1
        self._report.write(json.dumps({"file": file, "position": position, "reason": reason}).encode() + b"\n")

    def state(self) -> dict[str, Any]:
        """Everything that is needed to continue from here."""
        self._report.flush()
        return {
            "written": {key: asdict(writer.state()) for key, writer in self._writers.items()},
            "totals": {key: asdict(total) for key, total in self._totals.items()},
            "skipped": self.skipped,
            "separated": self.separated,
            "report_bytes": self._report.tell(),
        }

    def publish(self, facts: dict[str, Any]) -> list[dict[str, Any]]:
        """Complete all files, then give them their final names.

        Args:
            facts: what the manifests contain besides the counts, which are added here; `inputs` must be included.

        Returns:
            The manifests, in the order of the keys.

        Raises:
            UsageError: a key has no documents.
        """
        for key, writer in self._writers.items():
            if not writer.documents:
                paths = [each["path"] for each in facts["inputs"]]
                raise UsageError(
                    f"{paths[0]}{' and others' * (len(paths) > 1)}: no documents for {key!r} "
                    f"({self._totals[key].empty} empty ones, {self.skipped} bad lines); check --input and --json-keys"
                )
        manifests = []
        for key, writer in self._writers.items():
            total = self._totals[key]
            counts = {
                "dataset": Path(writer.prefix).name,
                "key": key,
                "documents": writer.documents,
                "tokens": writer.tokens,
                "empty_documents": total.empty,
                "skipped_lines": self.skipped,
                "text_bytes": total.text_bytes,
                "max_token_id": total.largest,
            }
            manifests.append({**counts, **facts, "files": writer.finish()})
        sync(self._report)
        for writer, manifest in zip(self._writers.values(), manifests, strict=True):
            writer.publish(to_bytes(manifest))
        self._report.close()
        if self.skipped:
            Path(self._report.name).replace(self.report_path)
        else:
            Path(self._report.name).unlink()
        return manifests

    def close(self, *, remove: bool) -> None:
        """Close all files; with `remove`, also delete the temporary ones."""
        for writer in self._writers.values():
            writer.discard() if remove else writer.close()
        with contextlib.suppress(OSError):  # what did not fit on a full disk does not fit now either
            self._report.close()
        if remove:
            Path(self._report.name).unlink(missing_ok=True)
