"""What the model sees: decoded samples with the noised tokens marked, statistics of the noise, stream digests."""

import hashlib
import html
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from megatron_meap.meap.dataset import NOISED, MaskedInputDataset, noise_of
from megatron_meap.meap.masking import num_masks
from megatron_meap.sft.dataset import SFTDataset
from megatron_meap.sft.rows import IGNORE
from megatron_meap.tokenization.mask_token import special_id

COLORS = {
    "noised": "\033[7m{}\033[0m",  # reverse video
    "learned": "\033[32m{}\033[0m",  # green
    "noised learned": "\033[7;32m{}\033[0m",
    "unlearned": "\033[2m{}\033[0m",  # faint
}
SIGNS = {"noised": "⟦{}⟧", "learned": "«{}»", "noised learned": "«⟦{}⟧»"}
"""Used without colours; what is not learned is plain."""
_CLEAN = "shown by its clean text (→ its replacement, if that is not the mask token)"
LEGENDS = {
    False: f'<span class="noised">noised input</span> {_CLEAN}, <span class="unlearned">no loss</span>; a line '
    "separates documents.",
    True: '<span class="learned">learned</span>, <span class="noised learned">learned where it is masked</span> '
    f'{_CLEAN}, <span class="unlearned">context</span>; ↵ is a line end that is learned; a line separates rows.',
}
"""What the colours of a page mean, in pretraining and in rows of fine-tuning."""
_SEQUENCE_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens")


def sample_digest(sample: dict[str, torch.Tensor]) -> str:
    """sha256 of a sample as the model receives it: tokens, labels, loss mask, position ids, document borders."""
    digest = hashlib.sha256()
    for key in _SEQUENCE_KEYS:
        if sample.get(key) is not None:
            digest.update(key.encode() + sample[key].contiguous().numpy().tobytes())
    return digest.hexdigest()


def stream_digest(digests: Iterable[str]) -> str:
    """One digest of samples in training order."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def token_texts(tokenizer: Any, ids: Iterable[int]) -> Iterator[str]:
    """Text of single tokens: pieces of the vocabulary, with readable spaces, line ends and bytes."""
    names = {special_id(tokenizer, name): f"<{name}>" for name in ("pad", "bos", "eod")}
    library = getattr(tokenizer, "_tokenizer", tokenizer)
    backend = getattr(getattr(library, "tokenizer", None), "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    if decoder is not None and b'"ByteLevel"' in decoder.__getstate__():
        bytes_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    else:
        bytes_of = {}
    for token in ids:
        piece = names.get(token) or _piece(tokenizer, token)
        if bytes_of and set(piece) <= bytes_of.keys():
            yield bytes(map(bytes_of.__getitem__, piece)).decode(errors="backslashreplace")
        else:
            yield piece.replace("▁", " ").replace("<0x0A>", "\n")


def _piece(tokenizer: Any, token: int) -> str:
    library = getattr(tokenizer, "_tokenizer", tokenizer)
    return str(library.ids_to_tokens([token])[0]) if token < tokenizer.vocab_size else f"<{token}>"


@dataclass
class View:
    """One sample, ready to be shown."""

    index: int
    texts: list[str]
    """The clean tokens as text: the inputs; of rows of fine-tuning all tokens, including the last label."""
    noised: np.ndarray
    """bool [s]: replaced by the mask token or another one."""
    learned: np.ndarray
    """bool [s]: in rows, the token itself is a label; otherwise the label at its position counts."""
    borders: set[int]
    """Positions at which another document begins."""
    rows: bool = False
    """Whether it consists of rows of fine-tuning, which are learned only in part."""
    padding: int = 0
    """Number of empty positions after these."""
    became: dict[int, str] = field(default_factory=dict)
    """Replacements other than the mask token, as text, by position."""
    copied: str = ""
    """A remark on a noised copy."""

    @property
    def heading(self) -> str:
        """One line of figures."""
        kind, many = ("row", "rows") if self.rows else ("document", "documents")
        learned = int(self.learned.sum())
        return (
            f"sample {self.index}{self.copied}: {len(self.texts)} tokens, {int(self.noised.sum())} "
            f"{'noised' if self.became else 'masked'} ({100 * self.noised.mean():.1f}%), "
            + (f"{learned} learned, " if self.rows else f"{len(self.learned) - learned} without loss, ")
            + f"{len(self.borders) + 1} {many if self.borders else kind}"
            + (f", {self.padding} of padding" if self.padding else "")
        )

    def _kind(self, position: int) -> str:
        """A key of `COLORS`, or empty for plain text: what is learned in pretraining, which is nearly everything."""
        if self.rows and self.learned[position]:
            return "noised learned" if self.noised[position] else "learned"
        if self.noised[position]:
            return "noised"
        return "" if self.learned[position] else "unlearned"

    def _shown(self) -> Iterator[tuple[str, str]]:
        """Kind and text of every token, followed by its replacement if that is not the mask token."""
        for position, text in enumerate(self.texts):
            other = f"→{self.became[position]}" if position in self.became else ""
            yield self._kind(position), text + other

    def for_terminal(self, colors: bool = True) -> str:
        """Tokens in the colour of their kind, or between its signs; documents and rows are separated."""
        document = np.isin(np.arange(len(self.texts)), list(self.borders)).cumsum()
        styles, parts, last = COLORS if colors else SIGNS, [], 0

        def stretch(item: tuple[int, tuple[str, str]]) -> tuple[int, str, int]:
            """Adjacent tokens of one kind in a document belong together, except noised ones."""
            position, (kind, _) = item
            return document[position], kind, position if self.noised[position] else -1

        for (number, kind, _), tokens in itertools.groupby(enumerate(self._shown()), stretch):
            if number > last:
                parts.append(f"\n----- next {'row' if self.rows else 'document'} -----\n")
            last = number
            text = "".join(_visible(kind, text) if colors else text for _, (_, text) in tokens)
            parts.append(styles.get(kind, "{}").replace("{}", text))
        return f"{self.heading}\n{''.join(parts)}\n"

    def for_html(self) -> str:
        """The same as a section of an HTML page."""
        parts = []
        for position, (kind, text) in enumerate(self._shown()):
            if position in self.borders:
                parts.append("<hr>")
            escaped = html.escape(_visible(kind, text))
            parts.append(f'<span class="{kind}" title="{position}">{escaped}</span>' if kind else escaped)
        return f"<h2>{html.escape(self.heading)}</h2>\n<pre>{''.join(parts)}</pre>\n"


def _visible(kind: str, text: str) -> str:
    """Text of a token to be coloured, with a sign for a line end, which would show no colour."""
    return text if kind in ("", "unlearned") else text.replace("\n", "↵\n")


def has_colors() -> bool:
    """Whether to print in colour: on a terminal unless NO_COLOR is set, and always if FORCE_COLOR is set."""
    return "FORCE_COLOR" in os.environ or (sys.stdout.isatty() and "NO_COLOR" not in os.environ)


def view(dataset: Any, index: int, tokenizer: Any, mask_token_id: int) -> View:
    """The view of one sample of a training dataset.

    Args:
        dataset: the training dataset, masked or not.
        index: global sample index.
        tokenizer: Megatron's.
        mask_token_id: id of the mask token.
    """
    if isinstance(dataset, SFTDataset):
        return _rows(dataset, index, tokenizer, mask_token_id)
    sample = dataset[index]
    source = dataset.clean(index) if isinstance(dataset, MaskedInputDataset) else sample
    clean = source["tokens"].tolist()
    starts = {position + 1 for position, token in enumerate(clean[:-1]) if token == tokenizer.eod}
    if "cu_seqlens" in sample:
        starts = set(sample["cu_seqlens"].tolist()) - {0, len(clean)}
    inputs = sample["tokens"].numpy()
    noised = inputs != np.array(clean)
    weight = getattr(dataset, "copy_weight", None)
    return View(
        index,
        list(token_texts(tokenizer, clean)),
        noised,
        (sample["loss_mask"] != 0).numpy(),
        starts,
        became=_others(inputs, noised, tokenizer, mask_token_id),
        copied=f" (copy of sample {index - 1}, weight {weight:g})" if weight is not None and index % 2 else "",
    )


def _rows(dataset: SFTDataset, index: int, tokenizer: Any, mask_token_id: int) -> View:
    """A sample of fine-tuning: its rows one after the other, each with its last token, which is only a label."""
    rows = dataset.sample_rows(index)
    inputs = np.concatenate([row.tokens for row in rows])
    clean = np.concatenate([row.tokens for row in dataset.sample_rows(index, masked=False)])
    learned = np.concatenate([row.labels != IGNORE for row in rows])
    starts = np.cumsum([0, *(len(row.tokens) for row in rows)])[:-1]
    learned[starts] = False  # nothing comes before it to predict it from
    return View(
        index,
        list(token_texts(tokenizer, clean.tolist())),
        inputs != clean,
        learned,
        set(starts[1:].tolist()),
        rows=True,
        padding=dataset.settings.seq_length - len(clean) + len(rows),
        became=_others(inputs, inputs != clean, tokenizer, mask_token_id),
    )


def _others(inputs: np.ndarray, noised: np.ndarray, tokenizer: Any, mask_token_id: int) -> dict[int, str]:
    """Replacements at noised positions, as text, other than the mask token."""
    other = np.flatnonzero(noised & (inputs != mask_token_id))
    return dict(zip(other.tolist(), token_texts(tokenizer, inputs[other].tolist()), strict=True))


def page(views: list[View], statistics: str, source: str) -> str:
    """A self-contained HTML page of samples, with their source at the top."""
    style = (
        "body{font-family:sans-serif;max-width:60em;margin:2em auto}pre{white-space:pre-wrap;line-height:1.6;"
        "background:#f6f6f6;padding:1em}.noised{background:#c33;color:#fff;"
        "border-right:1px solid #fff}.learned{background:#cec;border-right:1px solid #fff}.unlearned{color:#767676}"
        ".noised.learned{background:#c33;border-bottom:3px solid #393}h2{font-size:1em}"
    )
    sections = "\n".join(each.for_html() for each in views)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Batches</title><style>{style}</style>\n'
        f"<h1>What the model sees</h1>\n<p>{html.escape(source)}</p>\n"
        f"<p>{LEGENDS[views[0].rows]}</p>\n"
        f"<pre>{html.escape(statistics)}</pre>\n"
        f"{sections}</html>\n"
    )


def mask_statistics(dataset: Any, count: int, mask_token_id: int, ratio: float, exact: bool = True) -> str:
    """Statistics over the first `count` samples: share and spread of the noise, evenness over positions.

    Args:
        dataset: the training dataset; if it has noised copies, only these count.
        count: number of samples.
        mask_token_id: the mask token.
        ratio: the mask ratio.
        exact: whether every sample has exactly that share.
    """
    count = min(count, len(dataset))
    copies = getattr(dataset, "copy_weight", None) is not None
    indices = [index for index in range(count) if index % 2 or not copies]
    masks = np.stack([(noise_of(dataset[index], mask_token_id) & NOISED).numpy() for index in indices])
    seen = masks.sum(axis=1, dtype=int)
    by_position = masks.mean(axis=0)
    repeated = len(masks) - len({mask.tobytes() for mask in masks})
    length = masks.shape[1]
    expected = f"int({ratio} x {length}) = {num_masks(ratio, length)}" if exact else "not the same for all"
    return (
        f"masks of {len(masks)} {'copies' if copies else 'samples'} of {length} tokens: {seen.mean():.1f} a sample "
        f"(from {seen.min()} to {seen.max()}; {expected}), {100 * masks.mean():.2f}% of all inputs\n"
        f"share by position: {by_position.min():.3f} to {by_position.max():.3f}; samples that repeat another's masks: "
        f"{repeated}"
    )
