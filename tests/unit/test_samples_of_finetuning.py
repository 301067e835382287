"""How `inspect_batches.py` shows a fine-tuning sample: each token is marked if it is learned itself."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_meap.inspection import samples
from megatron_meap.meap.masking import Masking, RatioSchedule
from megatron_meap.sft.dataset import RowSettings, SFTDataset
from tests.unit.test_sft_rows import store_of, turn_of

MASK, END = 1, 2
PROMPT, ANSWER = [10, 11, 12], [20, 21, 22, 23]


class Letters:
    """A tokenizer of Megatron's whose tokens are letters."""

    vocab_size, eod, bos, pad = 100, END, -1, 0
    library = SimpleNamespace(
        ids_to_tokens=lambda ids: [chr(ord("A") + ids[0] - 10)],
        tokenizer=SimpleNamespace(backend_tokenizer=SimpleNamespace(decoder=None)),  # as a tokenizer may be
    )
    _tokenizer = library


@pytest.fixture(scope="module")
def shown() -> samples.View:
    """The only sample: a normal row and its masked copy."""
    settings = RowSettings(32, Masking(RatioSchedule(0.5), seed=7), MASK, threshold=2)
    dataset = SFTDataset(store_of([turn_of(PROMPT, ANSWER, (END,))]), np.arange(1), settings)
    return samples.view(dataset, 0, Letters(), MASK)


def test_tokens_are_marked_where_they_are_labels(shown: samples.View) -> None:
    """The answer and its end, not the token before it, at which Megatron keeps the first label."""
    assert shown.texts == [*"ABC", *"KLMN", "<eod>"] * 2
    normal, copy = sorted((slice(0, 8), slice(8, 16)), key=lambda row: shown.noised[row].sum())
    assert shown.learned[normal].tolist() == [False] * 3 + [True] * 5
    assert not shown.noised[normal].any()
    assert shown.noised[copy].sum() == shown.learned[copy].sum() == 2
    assert (shown.noised[copy] == shown.learned[copy]).all()
    assert "16 tokens, 2 masked (12.5%), 7 learned, 2 rows, 18 of padding" in shown.heading


def test_colours_signs_and_a_page(shown: samples.View, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens are marked in all three; no escape sequence where nobody sees colours."""
    colored, signed, page = shown.for_terminal(), shown.for_terminal(colors=False), shown.for_html()
    assert "\033" not in signed
    assert "ABC«KLMN<eod>»" in signed.splitlines()
    assert signed.count("«⟦") == colored.count("\033[7;32m") == page.count('class="noised learned"') == 2
    assert page.count('class="learned"') == 5
    assert page.count('class="unlearned"') == 9
    assert "\033[2mABC\033[0m\033[32mKLMN<eod>\033[0m" in colored
    whole = samples.page([shown], "", "")
    assert "a line separates rows" in whole
    assert "documents" not in whole
    assert not samples.has_colors()
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert samples.has_colors()


def test_line_ends_show_whether_they_are_learned(shown: samples.View) -> None:
    """A colour needs a character; what is no label is left as it is."""
    shown = replace(shown, texts=["\n" if text in "BM" else text for text in shown.texts])
    learned = int(shown.learned[[i for i, text in enumerate(shown.texts) if text == "\n"]].sum())
    assert learned
    assert shown.for_html().count("↵\n</span>") == shown.for_terminal().count("↵\n") == learned
    assert "↵" not in shown.for_terminal(colors=False)
