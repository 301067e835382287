"""Consecutive blends (`--meap-data-stages`): each dataset has one order, which every stage continues.

So samples of an earlier stage are repeated only after the end of their dataset. As everywhere, a sample depends only on
its index: no state is kept except the number of consumed samples.
"""

import bisect
import copy
import math
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.utils import Split

from megatron_meap.errors import UsageError, one_line
from megatron_meap.preprocessing.blend import check_weights
from megatron_meap.trainer.data_plan import of_the_data, run_samples

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_AMOUNT = re.compile(rf"([0-9]+(?:\.[0-9]+)?)\s*({'|'.join(_UNITS)})\s*(tokens|samples)")


@dataclass(frozen=True)
class Stage:
    """A blend, and how long it lasts."""

    end: int | None
    """Sample of the data before which it ends; None if it lasts to the end of the run."""
    blend: dict[str, float]
    """Weights by the prefix of the dataset; they sum to 1."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that occurs twice, of which YAML's own loader takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As in SafeLoader."""
        names = [str(name.value) for name, _ in node.value]
        if len(set(names)) < len(names):
            raise yaml.constructor.ConstructorError(None, None, "a key occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read(args: Namespace) -> list[Stage]:
    """The stages that the run's file describes.

    Raises:
        UsageError: it cannot be read, or is invalid.
    """
    path = Path(args.meap_data_stages)
    try:
        listed = yaml.load(path.read_text(), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--meap-data-stages {path}: cannot be read as YAML ({one_line(error)})") from error
    if not isinstance(listed, list) or not listed:
        raise UsageError(f"--meap-data-stages {path}: expected a list of stages, each with `blend` and `until`")
    stages: list[Stage] = []
    for number, each in enumerate(listed, start=1):
        try:
            stages.append(_stage(each, args))
            if number > 1 and (stages[-2].end is None or (stages[-1].end or math.inf) <= stages[-2].end):
                raise UsageError("ends no later than the one before it; only the last may be without `until`")
        except UsageError as error:
            raise UsageError(f"--meap-data-stages {path}: stage {number}: {error}") from error
    return stages


def _stage(given: Any, args: Namespace) -> Stage:
    """One entry of the list."""
    if not isinstance(given, dict) or not {"blend"} <= given.keys() <= {"blend", "until"}:
        raise UsageError("expected `blend`, and `until` in all but the last")
    blend, until = given["blend"], given.get("until")
    numbers = isinstance(blend, dict) and all(type(weight) in (int, float) for weight in blend.values())
    if not blend or not numbers:
        raise UsageError("`blend`: expected weights by prefix, such as {data/web_text_document: 0.7}")
    check_weights(list(blend), list(blend.values()))
    whole = sum(blend.values())
    weights = {str(prefix): weight / whole for prefix, weight in blend.items()}
    if until is None:
        return Stage(None, weights)
    amount = _AMOUNT.fullmatch(str(until).strip())
    if amount is None:
        raise UsageError(f"`until: {until}`: expected an amount such as 20B tokens, 1.5M tokens or 40000 samples")
    samples = int(Decimal(amount[1]) * _UNITS[amount[2]] / (args.seq_length if amount[3] == "tokens" else 1))
    if samples < 1:
        raise UsageError(f"`until: {until}`: less than one sample of {args.seq_length} tokens")
    return Stage(of_the_data(args, samples), weights)


def of_run(args: Namespace) -> tuple[list[Stage], int]:
    """The stages, and the number of samples that the run reads from them."""
    return read(args), of_the_data(args, run_samples(args))


def sizes(stages: list[Stage], total: int) -> list[int]:
    """Samples of each stage of a run that reads `total` samples; 0 for stages that it does not reach.

    Raises:
        UsageError: the stages end before it.
    """
    ends = [total if stage.end is None else min(stage.end, total) for stage in stages]
    if ends[-1] < total:
        raise UsageError(
            f"--meap-data-stages: the stages end at sample {ends[-1]} of the data, and {total} are to be read; let the "
            "last stage be without `until`"
        )
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def prefixes(stages: list[Stage]) -> list[str]:
    """All datasets, each once."""
    return list(dict.fromkeys(prefix for stage in stages for prefix in stage.blend))


def samples(stages: list[Stage], total: int) -> dict[str, int]:
    """Samples of each dataset that a run of `total` may read; Megatron's blends exceed their shares by at most one."""
    each = list(zip(stages, sizes(stages, total), strict=True))
    return {
        prefix: sum(math.ceil(size * stage.blend[prefix]) + 1 for stage, size in each if size and prefix in stage.blend)
        for prefix in prefixes(stages)
    }


def lines(stages: list[Stage], total: int, tokens: int) -> Iterator[str]:
    """What each stage reads, one per line.

    Args:
        stages: all of them.
        total: samples of the data that the run reads.
        tokens: training tokens per sample.
    """
    begin = 0
    for number, (stage, size) in enumerate(zip(stages, sizes(stages, total), strict=True), start=1):
        blend = ", ".join(f"{100 * weight:.3g}% {prefix}" for prefix, weight in stage.blend.items())
        when = f"tokens {begin * tokens:,} to {(begin + size) * tokens:,}" if size else "not reached"
        yield f"stage {number:<8}{when}: {blend}"
        begin += size


class StagedDataset(torch.utils.data.Dataset):
    """The stages' blends one after the other.

    Args:
        blends: of each stage that the run reaches.
    """

    split = Split.train  # by which Megatron's data loader chooses its sampler

    def __init__(self, blends: list[BlendedDataset]) -> None:
        self.blends = blends
        self.ends = np.cumsum([len(blend) for blend in blends]).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample `index` of the run."""
        stage = bisect.bisect_right(self.ends, index)
        return self.blends[stage][index - (self.ends[stage - 1] if stage else 0)]


class _Rest:
    """A dataset without its first samples."""

    def __init__(self, dataset: Any, first: int) -> None:
        self.dataset, self.first = dataset, first
        self.index_split, self.unique_identifiers = dataset.index_split, dataset.unique_identifiers

    def __len__(self) -> int:
        return len(self.dataset) - self.first

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[self.first + int(index)]


def build(kind: type, stages: list[Stage], total: int, config: Any, loads_here: Callable[[], bool]) -> Any:
    """The training data of a run, on ranks that load it; all ranks call it together.

    Args:
        kind: Megatron's class of datasets.
        stages: of the run.
        total: samples for which the data is laid out.
        config: Megatron's, whose blends are ignored.
        loads_here: whether this rank loads data.
    """
    datasets = {}
    for prefix, count in samples(stages, total).items():
        if count:
            config = copy.copy(config)
            config.blend_per_split = [([prefix], None), None, None]
            datasets[prefix] = BlendedMegatronDatasetBuilder(kind, [count, 0, 0], loads_here, config).build()[0]
    used, blends = dict.fromkeys(datasets, 0), []
    for stage, size in zip(stages, sizes(stages, total), strict=True):
        if not size:
            continue
        rest = [_Rest(datasets[prefix], used[prefix]) for prefix in stage.blend] if loads_here() else None
        blend = BlendedMegatronDatasetBuilder.build_generic_dataset(
            BlendedDataset, loads_here, True, rest, list(stage.blend.values()), size, config
        )
        if blend is not None:
            counts = np.bincount(blend.dataset_index, minlength=len(stage.blend)).tolist()
            used |= {prefix: used[prefix] + n for prefix, n in zip(stage.blend, counts, strict=True)}
            blends.append(blend)
    return StagedDataset(blends) if blends else None
