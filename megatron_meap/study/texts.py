"""The texts of a study: one tokenizer, one validation text, and for every size and seed a choice of documents."""

import argparse
import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megatron_meap.errors import UsageError
from megatron_meap.preprocessing.index import read_index
from megatron_meap.preprocessing.pipeline import Job, preprocess
from megatron_meap.preprocessing.tokenizer_training import SPECIALS, train_tokenizer
from megatron_meap.preprocessing.writer import DatasetWriter
from megatron_meap.study.grid import Grid, Point
from megatron_meap.study.planting import plant
from megatron_meap.tokenization.reference import add_tokenizer_flags

_PLANTED = "passages", "length", "times", "pieces"


class Texts:
    """What the runs read, created if it is missing.

    Args:
        grid: the study.
        source: the folder with the grid's files of documents.
        folder: where to write.
    """

    def __init__(self, grid: Grid, source: Path, folder: Path) -> None:
        self._data, self._source, self._folder = grid.data, source, folder
        self._length = grid.training["seq_length"]
        self.tokenizer = folder / "tokenizer.model"
        planted = ["valid-planted", "valid-reordered"] if "planted" in self._data else []
        self.valid = [folder / name for name in ("valid", *planted)]
        """Prefixes of the validation texts: prose; and if passages are planted, prose with them, once as in training
        and once with their pieces in random order."""

    def train(self, point: Point) -> Path:
        """The prefix of a run's training text: the same for all runs of a size and seed."""
        return self._folder / f"train-t{point.tokens}-s{point.seed}"

    def digest(self, point: Point) -> str:
        """sha256 of everything that a run reads: the tokenizer, its training text and the validation texts."""
        content = hashlib.sha256()
        for path in (self.tokenizer, *(Path(f"{prefix}.bin") for prefix in (self.train(point), *self.valid))):
            content.update(hashlib.sha256(path.read_bytes()).digest())
        return content.hexdigest()

    def make(self, points: Iterable[Point]) -> None:
        """Create what these runs need.

        Raises:
            UsageError: the documents are missing, or too few.
        """
        missing = {self.train(point): point for point in points if not _is_there(self.train(point))}
        if not missing and all(map(_is_there, self.valid)):
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        if not self.tokenizer.exists():
            train_tokenizer(
                [str(self._file("train"))], self.tokenizer, vocab_size=self._data["vocabulary"], max_bytes=10_000_000
            )
        if not all(map(_is_there, self.valid)):
            self._make_valid(self._documents("valid"))
        if missing:
            documents = self._documents("train")
            for prefix, point in missing.items():
                _write(prefix, self._draw(documents, point))

    def _file(self, name: str) -> Path:
        path = self._source / self._data[name]
        if not path.is_file():
            raise UsageError(f"--texts {self._source}: no {self._data[name]} there, which the grid names as {name}")
        return path

    def _documents(self, name: str) -> list[np.ndarray]:
        """The documents of the training or validation files as ids, each with the end-of-document token."""
        prefix = self._folder / f"{name}-all"
        dataset = f"{prefix}_text_document"
        if not _is_there(Path(dataset)):
            flags = argparse.ArgumentParser()
            add_tokenizer_flags(flags)
            tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(self.tokenizer)]
            job = Job([str(self._file(name))], str(prefix), append_eod=True, workers=1)
            preprocess(job, flags.parse_args(tokenizer))
        index = read_index(dataset)
        tokens = np.memmap(dataset + ".bin", index.dtype, "r")
        return np.split(tokens, np.cumsum(index.lengths)[:-1])

    def _make_valid(self, documents: list[np.ndarray]) -> None:
        spread = np.linspace(0, len(documents) - 1, self._data["valid_documents"]).round().astype(int)
        chosen = [documents[i][: self._data["valid_tokens"]] for i in spread]
        _write(self.valid[0], chosen)
        for prefix, consistent in zip(self.valid[1:], (True, False), strict=False):
            _write(prefix, self._plant(np.concatenate(chosen), np.random.default_rng(0), consistent))

    def _draw(self, documents: list[np.ndarray], point: Point) -> list[np.ndarray]:
        """The documents of a run's training text, with exactly the tokens asked for; rounded down to whole sequences if
        passages are planted."""
        if "planted" not in self._data:
            return _first(documents, point.tokens, point)
        prose = _first(documents, point.tokens // self._length * self._prose, point)
        return self._plant(np.concatenate(prose), np.random.default_rng(point.seed))

    @property
    def _prose(self) -> int:
        """Tokens of prose in a sequence."""
        planted = self._data["planted"]
        return self._length - planted["passages"] * planted["length"] * planted["times"]

    def _plant(self, prose: np.ndarray, random: np.random.Generator, consistent: bool = True) -> list[np.ndarray]:
        """Documents of one sequence each, with passages of the tokenizer's byte pieces, which prose hardly uses."""
        passages, length, times, pieces = (self._data["planted"][name] for name in _PLANTED)
        rows = prose[: len(prose) // self._prose * self._prose].reshape(-1, self._prose)
        bytes_ = np.arange(SPECIALS, SPECIALS + pieces)
        return [plant(row, passages, length, times, bytes_, random, consistent) for row in rows]


def _is_there(prefix: Path) -> bool:
    return Path(f"{prefix}.idx").exists()


def _first(documents: list[np.ndarray], tokens: int, point: Point) -> list[np.ndarray]:
    """Documents in an order drawn from the seed, cut to exactly the tokens asked for."""
    chosen, left = [], tokens
    for i in np.random.default_rng(point.seed).permutation(len(documents)):
        chosen.append(documents[i][:left])
        left -= len(chosen[-1])
        if not left:
            return chosen
    raise UsageError(f"{point.name}: the training text has only {tokens - left:,} tokens")


def _write(prefix: Path, documents: list[np.ndarray]) -> None:
    """Write a dataset of these documents, complete or not at all."""
    writer = DatasetWriter(str(prefix), documents[0].dtype.type)
    try:
        for each in documents:
            writer.add(each.tobytes(), np.int32(len(each)).tobytes())
        writer.finish()
        writer.publish(None)
    finally:
        writer.discard()
