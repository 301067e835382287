"""What the tests of preprocessing share: jobs, corpora in every form, and Megatron's own reader."""

import argparse
import bz2
import gzip
import json
import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_meap.preprocessing.manifest import to_bytes
from megatron_meap.preprocessing.pipeline import Job, preprocess
from megatron_meap.preprocessing.readers import InputOptions
from megatron_meap.preprocessing.tokenizer_training import train_tokenizer
from megatron_meap.tokenization.reference import add_tokenizer_flags

TEXTS = [
    "Hello, world.\n",
    "  two spaces, a\ttab, CRLF\r\n and a trailing space ",
    "naïve café, 東京, Привет, 👩‍👩‍👧, e\u0301, \u200b\ufeff",
    "<s> </s> <unk> [MASK] <0x41> <|endoftext|> are only text",
    "def f(x):\n    return x ** 2  # 1234567890\n",
    "word " * 2000,
    "\x00\x01\x7f",
]


def topics() -> list[str]:
    """English text that every Python installation has: its documentation topics."""
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())]


def make_tokenizer(folder: Path, vocab_size: int = 600) -> Path:
    """Train a throw-away tokenizer."""
    corpus = write_jsonl(folder / "corpus.jsonl", topics())
    train_tokenizer([str(corpus)], folder / "tokenizer.model", vocab_size=vocab_size)
    return folder / "tokenizer.model"


def tokenizer_args(kind: str, **values: Any) -> argparse.Namespace:
    """Arguments as the tool's parser gives them."""
    parser = argparse.ArgumentParser()
    add_tokenizer_flags(parser)
    args = parser.parse_args(["--tokenizer-type", kind])
    for name, value in values.items():
        assert hasattr(args, name), name
        setattr(args, name, value)
    return args


def sentencepiece_args(model: str | Path) -> argparse.Namespace:
    return tokenizer_args("SentencePieceTokenizer", tokenizer_model=str(model))


def run_job(
    inputs: Sequence[str | Path], prefix: str | Path, args: argparse.Namespace, **settings: Any
) -> list[dict[str, Any]]:
    """Preprocess with two workers; `keys`, `kind` and `separator` go to the input options."""
    options = {name: settings.pop(name) for name in ("keys", "kind", "separator") if name in settings}
    settings = {"workers": 2, "append_eod": True, **settings}
    return preprocess(Job([str(path) for path in inputs], str(prefix), InputOptions(**options), **settings), args)


def write_manifest(prefix: str | Path, tokenizer: dict[str, Any] | None = None, **facts: Any) -> None:
    """A manifest as preprocessing writes it, of a made-up dataset."""
    files = {suffix: {"bytes": 12, "sha256": ""} for suffix in (".bin", ".idx")}
    counts = dict.fromkeys(("documents", "tokens", "empty_documents", "skipped_lines", "text_bytes", "max_token_id"), 3)
    named = {"type": "SentencePieceTokenizer", "name": "", "sha256": "0" * 64, "bos": 1, "eod": 2} | (tokenizer or {})
    around = {"mask_token": None, "before_document": [], "after_document": [], "dtype": "int32", "inputs": []}
    manifest = {**counts, "tokenizer": named, **around, "files": files, **facts}
    Path(f"{prefix}.manifest.json").write_bytes(to_bytes(manifest))


def write_jsonl(path: Path, texts: Sequence[str], **more: Any) -> Path:
    path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in texts))
    return path


def write_parquet(path: Path, texts: Sequence[str | None]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.table({"id": list(range(len(texts))), "text": pa.array(texts, pa.string())}), path, row_group_size=3
    )
    return path


def compressed(path: Path, form: str) -> Path:
    """The same bytes, compressed; under a name that does not tell."""
    import zstandard

    compress = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "zst": zstandard.compress}[form]
    target = path.with_name(f"{path.stem}-{form}.data")
    target.write_bytes(compress(path.read_bytes()))
    return target


def outputs(prefix: str | Path) -> dict[str, bytes]:
    """The dataset's two files."""
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")}


def read_back(prefix: str | Path) -> list[list[int]]:
    """Documents as Megatron's own reader gives them."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert np.array_equal(dataset.document_indices, np.arange(len(dataset) + 1))
    return [dataset[number].tolist() for number in range(len(dataset))]


def leftovers(folder: Path) -> list[str]:
    """Names of the files that a job left in a folder, including temporary ones."""
    return sorted(path.name for path in folder.iterdir())
