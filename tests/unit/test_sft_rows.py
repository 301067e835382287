"""Rows, compared with an independent version of the official algorithm, and labels, with known logits."""

import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_meap.meap.masking import Masking, RatioSchedule
from megatron_meap.sft.dataset import BOTH, COPY, NORMAL, RowSettings, SFTDataset, list_rows, packed
from megatron_meap.sft.rows import IGNORE, Row, concatenated, maskable, masked_copy, normal_row, shifted
from megatron_meap.sft.store import TurnStore
from megatron_meap.sft.turns import Turn
from megatron_meap.trainer import run

EOS, MASK = 2, 999


def turn_of(source: list[int], target: list[int], end: tuple[int, ...] = (EOS,)) -> Turn:
    return Turn(np.array([*source, *target, *end], np.int32), len(source), len(target))


def store_of(turns: list[Turn]) -> TurnStore:
    starts = np.cumsum([0, *(len(turn.ids) for turn in turns)])[:-1]
    table = [
        (start, turn.prompt, turn.answer, number)
        for number, (start, turn) in enumerate(zip(starts, turns, strict=True))
    ]
    return TurnStore(np.concatenate([turn.ids for turn in turns]), np.array(table, np.int64), len(turns), 0)


def official(source: list[int], target: list[int], max_length: int, ratio: float, sample) -> list[tuple[list, list]]:
    """The rows of MEAP-SFT for one turn, written independently; `sample(range, n)` draws the positions.

    Where it would crash (no room for a mask: the prompt fills the context), and for rows that teach nothing, there is
    no row.
    """
    made = []
    text, labels = source + target + [EOS], [IGNORE] * len(source) + target + [EOS]
    if len(text) > max_length:
        text = [*text[: max_length - 1], EOS]
    made.append((text, labels[:max_length]))
    if len(target) > 50:
        last = min(len(source) + len(target), max_length - 1)
        if last > len(source):
            chosen = sample(range(len(source), last), max(1, int((last - len(source)) * ratio)))
            masked, wanted = (source + target)[:last], [IGNORE] * last
            for position in chosen:
                wanted[position] = masked[position]
                masked[position] = MASK
            made.append(([*masked, EOS], [*wanted, IGNORE]))
    return [(tokens, wanted) for tokens, wanted in made if any(label != IGNORE for label in wanted)]


def cases() -> list[tuple[list[int], list[int]]]:
    """Hundreds of turns around every edge: answers of 0, 1, 50 and 51 tokens, prompts up to and beyond the context."""
    draw = random.Random(0)
    lengths = [(prompt, answer) for prompt in (1, 5, 98, 99, 100, 101, 150) for answer in (0, 1, 49, 50, 51, 52, 120)]
    lengths += [(draw.randint(1, 130), draw.randint(0, 130)) for _ in range(400)]
    return [([draw.randint(10, 900) for _ in range(p)], [draw.randint(10, 900) for _ in range(a)]) for p, a in lengths]


MAX_LENGTH = 100


@pytest.fixture(scope="module")
def dataset() -> SFTDataset:
    """All cases as a dataset with rows of up to 100 tokens, one row a sample."""
    turns = [turn_of(*case) for case in cases()]
    settings = RowSettings(MAX_LENGTH - 1, Masking(RatioSchedule(0.1), seed=7), MASK, pack=False)
    return SFTDataset(store_of(turns), np.arange(len(turns)), settings)


def chosen_in(copy: Row | None, among: range, count: int) -> list[int]:
    """The masked positions of our copy, if the official code could have drawn them."""
    assert copy is not None
    chosen = np.flatnonzero(copy.tokens == MASK).tolist()
    assert len(chosen) == count
    assert set(chosen) <= set(among)
    return chosen


def test_rows_are_those_of_the_official_algorithm(dataset: SFTDataset) -> None:
    rows = dataset.rows
    compared = 0
    for number, (source, target) in enumerate(cases()):
        mine = {int(rows.kinds[row]): dataset.row(int(row), 0) for row in np.flatnonzero(rows.turns == number)}

        expected = official(source, target, MAX_LENGTH, 0.1, partial(chosen_in, mine.get(COPY)))
        assert [(row.tokens.tolist(), row.labels.tolist()) for row in mine.values()] == expected
        compared += len(expected)
    assert compared == len(rows) > 400
    assert rows.dropped == sum(len(source) >= MAX_LENGTH for source, _ in cases()) > 0
    assert rows.cut_copies == sum(len(t) > 50 and len(s) < MAX_LENGTH < len(s) + len(t) + 1 for s, t in cases())
    assert rows.truncated == sum(len(source) < MAX_LENGTH < len(source) + len(target) + 1 for source, target in cases())


@pytest.mark.parametrize(("concat", "kinds"), [(False, {NORMAL, COPY}), (True, {NORMAL, BOTH})])
@pytest.mark.parametrize("ending", [(EOS,), (5, 6, EOS)])
def test_lengths_are_known_before_rows_are_made(concat: bool, kinds: set[int], ending: tuple[int, ...]) -> None:
    turns = [turn_of(*case, ending) for case in cases()]
    settings = RowSettings(140, Masking(RatioSchedule(0.3)), MASK, concat=concat, threshold=20)
    made = SFTDataset(store_of(turns), np.arange(len(turns)), settings)
    assert set(made.rows.kinds.tolist()) == kinds
    for number, length in enumerate(made.rows.lengths):
        row = made.row(number, 0)
        assert len(row.tokens) == len(row.labels) == length + 1 <= 141
        assert (row.labels != IGNORE).any()
        assert (row.tokens == MASK).any() == (made.rows.kinds[number] != NORMAL)


def test_the_masked_copy_by_hand() -> None:
    turn = turn_of([11, 12], [21, 22, 23])
    assert maskable(turn, 10) == (2, 5)
    copy = masked_copy(turn, 10, np.array([3]), MASK)
    assert copy.tokens.tolist() == [11, 12, 21, MASK, 23, EOS]
    assert copy.labels.tolist() == [IGNORE, IGNORE, IGNORE, 22, IGNORE, IGNORE]
    combined = masked_copy(turn, 10, np.array([3]), MASK, combined=True)
    assert combined.tokens.tolist() == copy.tokens.tolist()
    assert combined.labels.tolist() == [IGNORE, IGNORE, 21, 22, 23, EOS]
    cut = masked_copy(turn, 5, np.array([3]), MASK, combined=True)
    assert cut.tokens.tolist() == [11, 12, 21, MASK, EOS]
    assert cut.labels.tolist() == [IGNORE, IGNORE, 21, 22, IGNORE]
    both = concatenated(normal_row(turn, 20), copy)
    assert both.tokens.tolist() == [11, 12, 21, 22, 23, EOS, 11, 12, 21, MASK, 23, EOS]
    assert both.labels.tolist() == [IGNORE, IGNORE, 21, 22, 23, EOS, *[IGNORE] * 3, 22, IGNORE, IGNORE]


def test_labels_land_where_megatron_expects_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose logits depend on its input alone: the loss is that of the pairs (input, next token) by hand."""
    settings = SimpleNamespace(meap_sft=True)
    monkeypatch.setattr(run, "get_args", lambda: settings)
    monkeypatch.setattr(run.bad_steps, "refuse", lambda loss: None)  # of no concern here
    table = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0)).double()
    surprise = -torch.log_softmax(table, -1)  # [input, next]
    turn = turn_of([11, 12], [21, 22, 23, 24])
    parts = [normal_row(turn, 20), masked_copy(turn, 20, np.array([2, 4]), MASK)]
    sample = packed(parts, 16)
    assert sample["tokens"].tolist() == [11, 12, 21, 22, 23, 24, 11, 12, MASK, 22, MASK, 24, 0, 0, 0, 0]
    losses = torch.nn.functional.cross_entropy(table[sample["tokens"]], sample["labels"], reduction="none")
    masked = torch.roll(sample["tokens"] == MASK, -1)
    total, count, report = run.loss_func(sample["loss_mask"], masked, losses)
    pairs = [(12, 21), (21, 22), (22, 23), (23, 24), (24, EOS)]
    masked_pairs = [(12, 21), (22, 23)]  # the masked tokens 21 and 23, each from what stands before it
    expected = {
        "lm loss masked answers": sum(surprise[pair] for pair in masked_pairs),
        "lm loss clean answers": sum(surprise[pair] for pair in pairs),
    }
    assert count == 7
    assert float(total) == pytest.approx(float(sum(expected.values())), rel=1e-6)
    for name, value in expected.items():
        assert float(report[name][0]) == pytest.approx(float(value), rel=1e-6)
    assert [int(report[name][1]) for name in expected] == [2, 5]


def test_labels_agree_with_hugging_faces_own_shift() -> None:
    """transformers shifts labels inside the model; the same row gives the same loss there."""
    turn = turn_of(list(range(10, 20)), list(range(30, 100)))
    row = masked_copy(turn, 200, np.array([10, 33, 79]), MASK)
    logits = torch.randn(len(row.tokens), 1000, generator=torch.Generator().manual_seed(1))
    theirs = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(row.labels)[1:], ignore_index=IGNORE)
    _, labels, learned = shifted(row)
    losses = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(labels), reduction="none")
    weights = torch.from_numpy(learned)
    assert float((losses * weights).sum() / weights.sum()) == pytest.approx(float(theirs), rel=1e-6)


def test_baselines_have_the_rows_that_they_say() -> None:
    turns = [turn_of([1, 2, 3], list(range(10, 10 + answer))) for answer in (5, 20, 60, 70, 80)]
    store, every = store_of(turns), np.arange(5)

    def counts(masking: Masking | None, budget: str = "single") -> list[int]:
        rows = list_rows(store, every, RowSettings(200, masking, MASK, budget=budget))
        return np.bincount(rows.turns).tolist()

    assert counts(Masking(RatioSchedule(0.1))) == [1, 1, 2, 2, 2]
    assert counts(None) == [1, 1, 1, 1, 1]
    assert counts(None, "equal") == [1, 1, 2, 2, 2]
    assert counts(None, "double") == [2, 2, 2, 2, 2]
