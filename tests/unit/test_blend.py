"""Splits and blends of datasets: invalid shares are refused in one line, before Megatron misreads them."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_meap.errors import UsageError
from megatron_meap.preprocessing.blend import shares
from megatron_meap.trainer import blend

NAMES = ("data_path", "data_args_path", "train_data_path", "valid_data_path", "test_data_path")
NONE = dict.fromkeys((*NAMES, "per_split_data_args_path", "split"), None) | {"meap_sft": False}


@pytest.mark.parametrize("split", ["98,2,0", "99", "969, 30, 1", "0.5,.5", "1.,1,2", "0,0,1"])
def test_shares_are_megatrons(split: str) -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split

    assert shares(split) == pytest.approx(parse_and_normalize_split(split))
    assert sum(shares(split)) == pytest.approx(1)


@pytest.mark.parametrize(
    "split", ["0,0,0", "0", "a,b,c", "110,-10,0", "1,2,3,4", "", "1,,0", "nan,1,0", "inf,1", "1e3,1"]
)
def test_what_is_no_split(split: str) -> None:
    with pytest.raises(UsageError, match=r"^--split .*: expected up to three shares, such as 98,2,0"):
        blend.check(Namespace(**NONE | {"split": split, "mock_data": True}))


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "-inf", "0.0"])
@pytest.mark.parametrize("place", [*NAMES, "per_split_data_args_path"])
def test_what_is_no_weight(weight: str, place: str, tmp_path: Path) -> None:
    """Wherever a blend may be named."""
    words = ["0.5", "data/a", weight, "data/b"]
    given: Any = words
    if place.endswith("args_path"):
        given = str(tmp_path / "blend")
        lists = {"train": words, "valid": None, "test": None}
        Path(given).write_text(" ".join(words) if place == "data_args_path" else json.dumps(lists))
    with pytest.raises(UsageError, match=rf"^the weight {float(weight):g} of data/b in the blend: give a positive"):
        blend.check(Namespace(**NONE | {place: given}))


def test_lists_of_datasets_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only some of the datasets have a weight"):
        blend.blends(Namespace(**NONE | {"data_path": ["a", "b", "0.5", "c"]}))
    for words in (["0.5", "a", "b"], ["a", "b", "1e-3"], ["0.5", "a", "0.5", "b", "c"], ["0.5"], ["1", "2", "a"]):
        with pytest.raises(UsageError, match="in the blend is not a dataset: only some of the datasets have a weight"):
            blend.blends(Namespace(**NONE | {"data_path": words}))
    for content in ("[]", "null", '{"train": "a"}', '{"train": [1, 2], "valid": 3, "test": {}}', '"a"', "", "{"):
        (tmp_path / "lists").write_text(content)
        with pytest.raises(UsageError, match="lists: cannot be read as a list of datasets"):
            blend.blends(Namespace(**NONE | {"per_split_data_args_path": str(tmp_path / "lists")}))
    for place in ("data_args_path", "per_split_data_args_path"):
        with pytest.raises(UsageError, match="missing: cannot be read as a list of datasets"):
            blend.blends(Namespace(**NONE | {place: str(tmp_path / "missing")}))


def test_good_ones_pass() -> None:
    assert blend.blends(Namespace(**NONE | {"data_path": ["30", "a", "70", "b"]})) == ((["a", "b"], [30, 70]), None)
    assert blend.blends(Namespace(**NONE | {"data_path": ["a"]})) == ((["a"], None), None)
    blend.check(Namespace(**NONE | {"data_path": ["conversations.jsonl", "-1"], "meap_sft": True, "split": "9,1"}))
