"""From the command line to the datasets of fine-tuning: files, splits, and what rank 0 reports about them."""

import contextlib
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_meap.checkpoint import latest
from megatron_meap.errors import UsageError
from megatron_meap.meap.settings import masking_of
from megatron_meap.preprocessing.blend import shares
from megatron_meap.preprocessing.inputs import find_inputs
from megatron_meap.sft.dataset import BOTH, COPY, RowSettings, SFTDataset
from megatron_meap.sft.packing import shuffled
from megatron_meap.sft.store import TurnStore, cache_folder, digest_of, open_store, turn_encoder

_SPLIT_DRAW = 2**62  # a number of draw that no epoch reaches


@dataclass(frozen=True)
class _Part:
    """The turns of one split."""

    store: TurnStore
    turns: npt.NDArray[np.int64]
    digest: str


def datasets(args: Namespace, num_samples: list[int | None]) -> list[SFTDataset | None]:
    """Train, validation and test datasets; None if a split has no conversations or no samples are wanted.

    Args:
        args: validated; `data_path` and `split`, or the paths of the splits, name the files.
        num_samples: number of samples for each split; None means one epoch.

    Raises:
        UsageError: files that cannot be used.
    """
    from megatron.core.datasets.utils import Split

    parts = _parts(args)
    made: list[SFTDataset | None] = []
    for split, samples in zip((Split.train, Split.valid, Split.test), num_samples, strict=True):
        part = parts.get(split.name)
        if part is None or samples == 0 or len(part.turns) == 0:
            made.append(None)
            continue
        settings = RowSettings(
            args.seq_length,
            masking_of(args, split.name),
            args.meap_mask_token_id,
            concat=args.meap_sft_rows == "concat",
            combined=args.meap_sft_combined_loss,
            threshold=args.meap_sft_threshold,
            budget=args.meap_sft_ntp_budget if split is Split.train else "single",
            seed=args.seed,
            pack=not args.meap_sft_no_packing,
        )
        dataset = SFTDataset(part.store, part.turns, settings, split, samples)
        if len(dataset.rows) == 0:
            raise UsageError(
                f"--seq-length {args.seq_length}: the prompts alone of all {len(part.turns)} answers ({split.name}) "
                "fill it, so there is nothing to learn; use a longer one"
            )
        made.append(dataset)
    return made


def check(args: Namespace) -> None:
    """Tokenize what is not yet tokenized, describe the data, and record its digests in `args`."""
    for flag, paths in _named(args).items():
        _files(flag, paths)  # what is wrong with a name is said before what is wrong with the template
    encoder = turn_encoder(args)
    if encoder.date is not None and args.meap_sft_date is None and (date := _date_of_resumed(args)) is not None:
        args.meap_sft_date = date
        encoder = turn_encoder(args)
    args.meap_sft_template_text = encoder.template  # the checkpoint carries what it was trained with
    args.meap_sft_date = encoder.date
    parts = _parts(args)
    if "train" not in parts:
        raise UsageError("--data-path: no conversations are named; give JSON lines files (or --train-data-path)")
    for name, part in parts.items():
        wanted = name == "train" or (name == "valid" and args.eval_iters > 0)
        if len(part.turns) == 0 and wanted and (name == "train" or has_validation(args)):
            raise UsageError(
                f"--split {args.split}: gives {name} none of the {part.store.conversations} conversations; give it a "
                "larger share" + (", or 0 for none" if name == "valid" else "")
            )
    for line in lines(args):
        print(line, flush=True)
    args.meap_sft_train_digest = parts["train"].digest


def _date_of_resumed(args: Namespace) -> str | None:
    """The date that the resumed run wrote into its conversations; None without such a run."""
    from megatron.core import dist_checkpointing

    newest = latest.pointer(Path(args.load)) if args.load and not args.finetune else None
    if newest is None or not newest.isdigit():
        return None
    with contextlib.suppress(Exception):  # a bad checkpoint is reported when it is chosen
        saved = dist_checkpointing.load_common_state_dict(str(latest.directory(Path(args.load), int(newest))))
        return getattr(saved["args"], "meap_sft_date", None)
    return None


def has_validation(args: Namespace) -> bool:
    """Whether there are conversations, or a share of them, to validate on."""
    return _shares(args)[1] > 0 if args.data_path else bool(args.valid_data_path)


def lines(args: Namespace) -> list[str]:
    """Descriptions of the training, validation and test data."""
    return [describe(dataset, args) for dataset in datasets(args, [None, None, None]) if dataset is not None]


def describe(dataset: SFTDataset, args: Namespace) -> str:
    """What a split contains and how long an epoch of it is, in two lines."""
    rows, store, settings = dataset.rows, dataset.store, dataset.settings
    copies = int(np.isin(rows.kinds, (COPY, BOTH)).sum())
    batch = args.global_batch_size or args.micro_batch_size * args.data_parallel_size
    iterations = f" = {dataset.epoch_samples / batch:.1f} iterations" if dataset.split.name == "train" else ""
    cut = f"; {rows.cut_copies:,} masked copies cut or left out" if rows.cut_copies else ""
    skipped = f", {store.skipped} bad lines skipped" if store.skipped else ""
    return (
        f"fine-tuning data ({dataset.split.name}): {len(np.unique(rows.turns)):,} answers of {store.conversations:,} "
        f"conversations read{skipped}; {rows.truncated:,} answers cut to {settings.max_length:,} tokens, "
        f"{rows.dropped:,} left out (their prompt fills it){cut}\n"
        f"  {len(rows):,} rows, {copies:,} of them with masks; an epoch is {dataset.epoch_samples:,} samples of "
        f"{settings.seq_length:,} tokens{iterations}, {100 * dataset.padding_share:.1f}% of it padding"
    )


def data_facts(args: Namespace) -> dict[str, str]:
    """Facts, by flag, by which the conversations of two hosts can be compared."""
    facts = {}
    for flag, paths in _named(args).items():
        facts[flag] = f"files of digest {digest_of(find_inputs(paths, flag), args)[:16]}"
    return facts


def cache_directory(args: Namespace) -> Path:
    """Where the tokenized turns are kept; the first place, if files in several directories each have one."""
    return cache_folder(find_inputs(next(iter(_named(args).values()))), args)


def _named(args: Namespace) -> dict[str, list[str]]:
    """The files, globs and folders given, by flag; `--data-path` is for all splits."""
    if args.data_path:
        return {"--data-path": args.data_path}
    named = {f"--{name}-data-path": getattr(args, f"{name}_data_path") for name in ("train", "valid", "test")}
    return {flag: paths for flag, paths in named.items() if paths}


def _parts(args: Namespace) -> dict[str, _Part]:
    """The turns of every split given."""
    parts = {}
    for flag, paths in _named(args).items():
        store, digest = _open(flag, paths, args)
        if flag == "--data-path":
            return {name: _Part(store, turns, digest) for name, turns in _split(store, args).items()}
        parts[flag.removeprefix("--").removesuffix("-data-path")] = _Part(store, np.arange(len(store)), digest)
    return parts


def _files(flag: str, paths: list[str]) -> list[str]:
    for path in paths:
        if path.replace(".", "", 1).isdigit():
            raise UsageError(f"{flag} {path}: weights are not supported in fine-tuning; name files only")
    return find_inputs(paths, flag)


def _open(flag: str, paths: list[str], args: Namespace) -> tuple[TurnStore, str]:
    files = _files(flag, paths)
    store, args.meap_sft_digests[flag] = open_store(files, args, args.meap_sft_digests.get(flag))
    return store, args.meap_sft_digests[flag]


def _split(store: TurnStore, args: Namespace) -> dict[str, npt.NDArray[np.int64]]:
    """Turns of each split by `--split`: whole conversations, drawn by the seed."""
    place = np.argsort(shuffled(store.conversations, args.seed, _SPLIT_DRAW))  # of each conversation in random order
    ends = np.round(np.cumsum(_shares(args)) * store.conversations).astype(np.int64)
    part = np.searchsorted(ends, place, side="right")
    of_turn = part[store.table[:, 3]]
    return {name: np.flatnonzero(of_turn == number) for number, name in enumerate(("train", "valid", "test"))}


def _shares(args: Namespace) -> list[float]:
    """Shares of training, validation and test by `--split`; they sum to 1."""
    return shares(args.split or "969,30,1")
