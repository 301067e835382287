"""What a checkpoint carries besides its weights: the tokenizer's files, and the manifests of the training data.

    iter_0001000/tokenizer/...      the files, as they were given to the run
    iter_0001000/manifests.json     for each dataset its name, the SHA-256 of its manifest, and the manifest

So neither a resumption nor an export depends on files elsewhere that may be moved or deleted.
"""

import copy
import functools
import hashlib
import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_meap.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_meap.errors import UsageError
from megatron_meap.files import whole_file
from megatron_meap.preprocessing.manifest import read_manifest
from megatron_meap.preprocessing.writer import MANIFEST_SUFFIX
from megatron_meap.records import read_json
from megatron_meap.tokenization import files as tokenizer_files
from megatron_meap.tokenization.fingerprint import tokenizer_fingerprint
from megatron_meap.trainer.blend import blends

_CARRIED = [(str, str, {"before_document?": [int], "tokens?": int})]  # what is read of them; older ones may lack it
TOKENIZER, MANIFESTS = "tokenizer", "manifests.json"


def collect(args: Namespace) -> dict[str, bytes]:
    """The content of what a run's checkpoints carry, by its place in them.

    It is read once, at the start: later changes of the files do not matter.
    """
    found = {f"{TOKENIZER}/{place}": path.read_bytes() for place, path in tokenizer_files.files_of(args).items()}
    blend, per_split = (None, None) if args.mock_data or args.meap_sft else blends(args)
    training = blend or (per_split or [None])[0]
    if training is not None and (described := _read(training[0])):
        found[MANIFESTS] = json.dumps(described, indent=1).encode()
    return found


def beside(save: Callable, files: dict[str, bytes]) -> Callable:
    """Megatron's `dist_checkpointing.save`; rank 0 also writes these files to the checkpoint's directory."""

    @functools.wraps(save)
    def save_and_carry(state: Any, folder: Any, *args: Any, **kwargs: Any) -> Any:
        request = save(state, folder, *args, **kwargs)
        if torch.distributed.get_rank() == 0:
            write(Path(folder), files)
        return request

    return save_and_carry


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Put the files in the directory of an iteration, replacing those of an interrupted save."""
    shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
    for place, content in files.items():
        with whole_file(folder / place) as file:
            file.write(content)


def manifests(args: Namespace) -> list[tuple[str, str, dict[str, Any]]]:
    """Manifests of the training data that are found: name of the dataset, SHA-256, contents.

    Args:
        args: of a run; or of a checkpoint (`arguments_of`), whose own copies are used if it has them.
    """
    if carried := getattr(args, "meap_manifests", None):
        return [tuple(each) for each in read_json(carried, _CARRIED, "copy the checkpoint again")]
    return _read([*(getattr(args, "data_path", None) or ()), *(getattr(args, "train_data_path", None) or ())])


def _read(prefixes: list[str]) -> list[tuple[str, str, dict[str, Any]]]:
    """The manifests beside datasets."""
    found = []
    for prefix in prefixes:
        if (contents := read_manifest(str(prefix))) is not None:
            digest = hashlib.sha256(Path(str(prefix) + MANIFEST_SUFFIX).read_bytes()).hexdigest()
            found.append((Path(prefix).name, digest, contents))
    return found


def arguments_of(checkpoint: Checkpoint) -> Namespace:
    """The arguments in a checkpoint, with the tokenizer and the manifests that it carries."""
    args = checkpoint.args
    if (copies := _copies(checkpoint.directory)) is not None:
        args = tokenizer_files.at(args, copies)
    if (listed := checkpoint.directory / MANIFESTS).is_file():
        args = copy.copy(args)
        args.meap_manifests = str(listed)
    return args


def take_tokenizer(args: Namespace) -> None:
    """If the files of a run's tokenizer are gone, use those that its starting checkpoint carries.

    Raises:
        UsageError: that copy is not the tokenizer that the checkpoint was trained with.
    """
    gone = tokenizer_files.missing(args)
    for source, step in ((args.load, args.ckpt_step), (args.pretrained_checkpoint, None)) if gone else ():
        try:
            checkpoint = open_checkpoint(source or "", step)
        except UsageError:  # none yet, or unreadable, which is reported when it is loaded
            continue
        copies = _copies(checkpoint.directory)
        one_file = args.tokenizer_type in tokenizer_files.ONE_FILE
        if copies is None or (one_file and not (copies / Path(gone[0]).name).is_file()):
            continue  # a file with another name is another tokenizer, or a mistake
        moved = tokenizer_files.at(args, copies)
        recorded = getattr(checkpoint.args, "meap_tokenizer_sha256", None)
        if recorded is not None and tokenizer_fingerprint(moved) != recorded:
            raise UsageError(
                f"{gone[0]}: not there, and the copy in {copies} is damaged or another kind of tokenizer; name the "
                "tokenizer of the checkpoint with --tokenizer-type and --tokenizer-model"
            )
        vars(args).update(vars(moved))
        if args.rank == 0:
            print(f"note: tokenizer {gone[0]} is not there; the checkpoint's own copy is taken, {copies}", flush=True)
        return


def _copies(directory: Path) -> Path | None:
    """The tokenizer that a checkpoint carries: beside its weights, or (one that was imported) beside its iteration."""
    return next((each / TOKENIZER for each in (directory, directory.parent) if (each / TOKENIZER).is_dir()), None)
