"""Reads a torch_dist checkpoint of any layout tensor by tensor, in one process, without Megatron.

Only what is asked for is read, a layer at a time: optimizer states are never touched. (The index of a torch_dist
checkpoint is a pickle, as PyTorch writes it: open only checkpoints whose origin you trust.)
"""

import io
import pickle
import types
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_meap.checkpoint import latest
from megatron_meap.checkpoint.latest import POINTER
from megatron_meap.errors import UsageError, refusing

COMMON_STATE = "common_state/shard_0_1"  # where Megatron 0.19 keeps what is not a tensor; before: the file common.pt
LAYERS = "decoder.layers."


@dataclass(frozen=True)
class Checkpoint:
    """One saved iteration."""

    directory: Path
    """The directory of the iteration itself."""
    iteration: int
    args: Namespace
    """The arguments of the run that saved it."""
    metadata: Metadata
    scheduler: dict[str, Any]
    """State of the scheduler of learning rate and weight decay; empty if none was saved."""

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the model's own tensors, as they are stored (layers may be stacked)."""
        return {
            name: tuple(info.size)
            for name, info in self.metadata.state_dict_metadata.items()
            if isinstance(info, TensorStorageMetadata) and "optimizer" not in name.split(".")
        }

    def dtype(self, name: str) -> torch.dtype:
        """Type of a stored tensor."""
        return self._tensor(name).properties.dtype

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        return self._assemble(name, ())

    def has_layers(self, name: str) -> bool:
        """Whether the layers have a tensor of this name."""
        return not {f"{LAYERS}0.{name}", LAYERS + name}.isdisjoint(self.metadata.state_dict_metadata)

    def read_layer(self, name: str, layer: int, row: tuple[int, ...] = ()) -> torch.Tensor:
        """A layer's tensor, named as in `decoder.layers.<layer>.<name>`; layers are stored separately or stacked.

        Args:
            name: of the tensor.
            layer: its number.
            row: index of the part to read, such as that of one expert.
        """
        apart = f"{LAYERS}{layer}.{name}"
        if apart in self.metadata.state_dict_metadata:
            return self._assemble(apart, row)
        return self._assemble(LAYERS + name, (layer, *row))

    def _tensor(self, name: str) -> TensorStorageMetadata:
        found = self.metadata.state_dict_metadata[name]
        assert isinstance(found, TensorStorageMetadata), name
        return found

    def _assemble(self, name: str, row: tuple[int, ...]) -> torch.Tensor:
        """Assemble a tensor from its pieces, or only the part of it at index `row` of the leading dimensions."""
        info = self._tensor(name)
        shape = info.size[len(row) :]
        whole = torch.empty(shape, dtype=info.properties.dtype)
        filled = 0
        for piece in info.chunks:
            inside = tuple(i - start for i, start in zip(row, piece.offsets, strict=False))
            if any(not 0 <= i < size for i, size in zip(inside, piece.sizes, strict=False)):
                continue
            place = tuple(
                slice(start, start + size)
                for start, size in zip(piece.offsets[len(row) :], piece.sizes[len(row) :], strict=True)
            )
            part = self._load(MetadataIndex(name, piece.offsets))[inside]
            if part.shape == shape:
                return part
            whole[place] = part
            filled += whole[place].numel()
        if filled != whole.numel():
            raise UsageError(f"{self.directory}: pieces of {name} are missing; the checkpoint is not complete")
        return whole

    def _load(self, index: MetadataIndex) -> torch.Tensor:
        """One stored piece."""
        return torch.load(io.BytesIO(_stored_bytes(self.directory, self.metadata, index)), weights_only=True)


def open_checkpoint(path: str | Path, iteration: int | None = None) -> Checkpoint:
    """Open a checkpoint directory, or the directory of one of its iterations.

    Args:
        path: what was given to `--save`, or an `iter_...` or `release` directory in it.
        iteration: which one; the latest if not given.

    Raises:
        UsageError: there is no complete torch_dist checkpoint.
    """
    directory = directory_of(Path(path), iteration)
    if not (directory / ".metadata").is_file():
        legacy = any(directory.glob("mp_rank_*"))
        reason = "is in Megatron's old format; save with --ckpt-format torch_dist" if legacy else "has no .metadata"
        raise UsageError(f"{directory}: not a torch_dist checkpoint: it {reason}")
    with refusing(f"{directory}: the checkpoint cannot be read"):  # unpickling a damaged file can raise almost anything
        metadata = FileSystemReader(directory).read_metadata()
        common = _common_state(directory, metadata)
        args = common["args"]
    if not isinstance(args, Namespace):
        raise UsageError(f"{directory}: holds no arguments of Megatron's, so its model is unknown")
    scheduler = common.get("opt_param_scheduler") or {}
    return Checkpoint(directory, int(common.get("iteration", 0)), args, metadata, scheduler)


def directory_of(path: Path, iteration: int | None = None) -> Path:
    """The directory of the iteration asked for, as in `open_checkpoint`."""
    if not path.is_dir():
        raise UsageError(f"{path}: no such directory" if not path.exists() else f"{path}: not a directory")
    if iteration is not None:
        chosen = latest.directory(path, iteration)
        if not chosen.is_dir():
            there = ", ".join(map(str, latest.iterations(path)))
            raise UsageError(f"{path}: has no iteration {iteration}; it has {there or 'none'}")
        return chosen
    if (path / ".metadata").is_file():
        return path
    tracker = path / POINTER
    if not tracker.is_file():
        raise UsageError(f"{path}: not a Megatron checkpoint: it has no {POINTER}")
    newest = latest.pointer(path)
    if newest is None:
        raise UsageError(f"{tracker}: expected an iteration or 'release', found {tracker.read_bytes()[:40]!r}")
    chosen = path / newest if newest == "release" else latest.directory(path, int(newest))
    if not chosen.is_dir():
        raise UsageError(f"{tracker}: names {chosen.name}, which is not there")
    return chosen


def _stored_bytes(directory: Path, metadata: Metadata, index: MetadataIndex) -> bytes:
    """The bytes of one entry."""
    entry = metadata.storage_data[index]
    file = directory / entry.relative_path
    try:
        with open(file, "rb") as stream:
            stream.seek(entry.offset)
            stored = stream.read(entry.length)
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror or error}; the checkpoint is not complete") from error
    if len(stored) != entry.length:
        raise UsageError(f"{file}: ends before {index.fqn} does; the checkpoint is not complete")
    return stored


def _common_state(directory: Path, metadata: Metadata) -> dict[str, Any]:
    """What a checkpoint holds besides sharded tensors: arguments, iteration, scheduler."""
    old = directory / "common.pt"
    if old.is_file():
        return _load_without_megatron(old.read_bytes())
    index = MetadataIndex(COMMON_STATE)
    if index not in metadata.storage_data:
        raise UsageError(f"{directory}: holds no common state; was it saved by Megatron?")
    return _load_without_megatron(_stored_bytes(directory, metadata, index))[0]


def _load_without_megatron(stored: bytes) -> Any:
    """Unpickle with plain types only; Megatron's enums and the like become strings, and nothing else is called."""
    return torch.load(io.BytesIO(stored), weights_only=False, pickle_module=_PLAIN_PICKLE)


class _PlainUnpickler(pickle.Unpickler):
    """Accepts containers, `Namespace` and PyTorch's own types; describes all others instead of importing them."""

    def find_class(self, module: str, name: str) -> Any:
        """The class, or a function that makes a string of what the class would have been called with."""
        if (module, name) == ("argparse", "Namespace"):
            return Namespace
        if module in ("torch", "torch._utils", "torch.storage", "collections"):
            return super().find_class(module, name)
        return lambda *arguments: f"{name}({', '.join(map(repr, arguments))})"


_PLAIN_PICKLE = types.ModuleType("plain_pickle")
_PLAIN_PICKLE.Unpickler = _PlainUnpickler  # type: ignore[attr-defined]
_PLAIN_PICKLE.load = pickle.load  # type: ignore[attr-defined]
