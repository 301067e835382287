"""The datasets that the flags name, their weights, and how they are split: as Megatron reads them, but checked."""

from argparse import Namespace
from pathlib import Path

from megatron.training.utils import get_blend_and_blend_per_split

from megatron_meap.errors import UsageError, one_line
from megatron_meap.preprocessing.blend import check_weights, is_number, shares
from megatron_meap.trainer import stages

_SOME_WEIGHTS = "only some of the datasets have a weight; give each one, or none"

_ALONE = ("mock_data", "data_path", "data_args_path", "per_split_data_args_path")
"""Arguments of which each stands for all data."""

Blend = tuple[list[str], list[float] | None]
"""Prefixes of datasets, and their weights, if any."""


def check(args: Namespace) -> None:
    """Refuse an invalid split or weight, and data that is named in two ways: Megatron would take one of them.

    Raises:
        UsageError: also as `blends` and `shares` say.
    """
    names = (*_ALONE, *(f"{split}_data_path" for split in ("train", "valid", "test")))
    given = [name for name in names if getattr(args, name, None)]
    if len(given) > 1 and given[0] in _ALONE:
        first, second = (f"--{name.replace('_', '-')}" for name in given[:2])
        raise UsageError(f"{second}: not possible with {first}, which stands for all data; drop one of them")
    if args.split is not None:
        shares(args.split)
    if not args.meap_sft:  # its files are no datasets
        blends(args)


def blends(args: Namespace) -> tuple[Blend | None, list[Blend | None] | None]:
    """The data that is split into training, validation and test data, or the data named for each of the three.

    Raises:
        UsageError: a list of datasets that cannot be read, or a weight that is not positive.
    """
    try:
        blend, per_split = get_blend_and_blend_per_split(args)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        path = args.data_args_path or args.per_split_data_args_path or args.data_path
        raise UsageError(
            f"{path}: cannot be read as a list of datasets ({one_line(error)}); see Megatron's help"
        ) from error
    except AssertionError:
        raise UsageError(f"--data-path: {_SOME_WEIGHTS}") from None
    for prefixes, weights in filter(None, [blend, *(per_split or [])]):
        check_weights(prefixes, weights or [1.0] * len(prefixes))
        for prefix in prefixes:  # Megatron takes an odd number of words for names only, and so a weight for one of them
            if is_number(prefix) and not Path(prefix + ".idx").exists():
                raise UsageError(f"{prefix} in the blend is not a dataset: {_SOME_WEIGHTS}")
    if getattr(args, "meap_data_stages", None) is not None:  # their weights change during the run
        per_split = [(stages.prefixes(stages.read(args)), None), *(per_split or [None] * 3)[1:]]
    return blend, per_split


def ranges(args: Namespace) -> list[tuple[float, float] | None]:
    """Beginning and end of training, validation and test data by `--split`; None without a share."""
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    return convert_split_vector_to_split_matrix(parse_and_normalize_split(args.split))
