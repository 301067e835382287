"""What the model really sees: decoded samples with the noised tokens marked, figures of the noise, a stream digest."""

import hashlib
import html
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from megatron_meap.meap.dataset import NOISED, MaskedInputDataset, noise_of
from megatron_meap.meap.masking import num_masks
from megatron_meap.sft.dataset import SFTDataset
from megatron_meap.tokenization.mask_token import special_id

MARKED = "\033[7m{}\033[0m"  # reverse video
FAINT = "\033[2m{}\033[0m"
_SEQUENCE_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens")


def sample_digest(sample: dict[str, torch.Tensor]) -> str:
    """sha256 of a sample as the model gets it: tokens, labels, loss mask, position ids, document borders."""
    digest = hashlib.sha256()
    for key in _SEQUENCE_KEYS:
        if sample.get(key) is not None:
            digest.update(key.encode() + sample[key].contiguous().numpy().tobytes())
    return digest.hexdigest()


def stream_digest(digests: Iterable[str]) -> str:
    """One digest of the samples in the order in which they are trained on."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def token_texts(tokenizer: Any, ids: Iterable[int]) -> Iterator[str]:
    """Text of single tokens: pieces as they stand in the vocabulary, with spaces, line ends and bytes readable."""
    names = {special_id(tokenizer, name): f"<{name}>" for name in ("pad", "bos", "eod")}
    library = getattr(tokenizer, "_tokenizer", tokenizer)
    backend = getattr(getattr(library, "tokenizer", None), "backend_tokenizer", None)
    if backend is not None and b'"ByteLevel"' in backend.decoder.__getstate__():
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
    """The clean input tokens as text."""
    masked: np.ndarray
    """bool [s]: replaced by the mask token or another one."""
    unlearned: np.ndarray
    """bool [s]: the label does not count."""
    borders: set[int]
    """Positions at which another document begins."""
    padding: int = 0
    """Positions after these that hold nothing."""
    became: dict[int, str] = field(default_factory=dict)
    """The tokens, as text, at positions that hold another one than the mask token."""
    copied: str = ""
    """Said of a noised copy."""

    @property
    def heading(self) -> str:
        """One line of figures."""
        return (
            f"sample {self.index}{self.copied}: {len(self.texts)} tokens, {int(self.masked.sum())} "
            f"{'noised' if self.became else 'masked'} "
            f"({100 * self.masked.mean():.1f}%), {int(self.unlearned.sum())} without loss, "
            f"{len(self.borders) + 1} document{'s' if self.borders else ''}"
            + (f", {self.padding} of padding" if self.padding else "")
        )

    def _shown(self) -> Iterator[str]:
        """Texts of the clean tokens; where another than the mask token stands there, followed by that."""
        for position, text in enumerate(self.texts):
            yield f"{text}→{self.became[position]}" if position in self.became else text

    def for_terminal(self) -> str:
        """Noised tokens in reverse video, those without a loss faint, documents apart."""
        parts = []
        for position, text in enumerate(self._shown()):
            if position in self.borders:
                parts.append("\n----- next document -----\n")
            style = MARKED if self.masked[position] else FAINT if self.unlearned[position] else "{}"
            parts.append(style.format(text))
        return f"{self.heading}\n{''.join(parts)}\n"

    def for_html(self) -> str:
        """The same as a section of a page."""
        parts = []
        for position, text in enumerate(self._shown()):
            if position in self.borders:
                parts.append("<hr>")
            kind = "masked" if self.masked[position] else "unlearned" if self.unlearned[position] else ""
            escaped = html.escape(text)
            parts.append(f'<span class="{kind}" title="{position}">{escaped}</span>' if kind else escaped)
        return f"<h2>{html.escape(self.heading)}</h2>\n<pre>{''.join(parts)}</pre>\n"


def view(dataset: Any, index: int, tokenizer: Any, mask_token_id: int) -> View:
    """Look at one sample of a (masked) training dataset.

    Args:
        dataset: the training dataset, masked or not.
        index: global sample index.
        tokenizer: Megatron's.
        mask_token_id: what a masked input holds.
    """
    sample = dataset[index]
    if isinstance(dataset, SFTDataset):
        inputs = [row.tokens[:-1] for row in dataset.sample_rows(index, masked=False)]
        clean = np.concatenate(inputs).tolist()
        starts = set(np.cumsum([len(each) for each in inputs])[:-1].tolist())
    else:
        source = dataset.clean(index) if isinstance(dataset, MaskedInputDataset) else sample
        clean = source["tokens"].tolist()
        starts = {position + 1 for position, token in enumerate(clean[:-1]) if token == tokenizer.eod}
        if "cu_seqlens" in sample:
            starts = set(sample["cu_seqlens"].tolist()) - {0, len(clean)}
    used = len(clean)
    inputs = sample["tokens"][:used].numpy()
    noised = inputs != np.array(clean)
    other = np.flatnonzero(noised & (inputs != mask_token_id))
    weight = getattr(dataset, "copy_weight", None)
    return View(
        index,
        list(token_texts(tokenizer, clean)),
        noised,
        (sample["loss_mask"][:used] == 0).numpy(),
        starts,
        len(sample["tokens"]) - used,
        dict(zip(other.tolist(), token_texts(tokenizer, inputs[other].tolist()), strict=True)),
        f" (copy of sample {index - 1}, weight {weight:g})" if weight is not None and index % 2 else "",
    )


def page(views: list[View], statistics: str, source: str) -> str:
    """A self-contained HTML page about samples of a source, which is named at its top."""
    style = (
        "body{font-family:sans-serif;max-width:60em;margin:2em auto}pre{white-space:pre-wrap;line-height:1.6;"
        "background:#f6f6f6;padding:1em}.masked{background:#c33;color:#fff;"
        "border-right:1px solid #fff}.unlearned{color:#aaa}h2{font-size:1em}"
    )
    sections = "\n".join(each.for_html() for each in views)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Batches</title><style>{style}</style>\n'
        f"<h1>What the model sees</h1>\n<p>{html.escape(source)}</p>\n"
        '<p><span class="masked">noised input</span> shown by its clean text (→ what '
        'stands there, where it is not the mask token), <span class="unlearned">no loss</span>; '
        "a line parts two documents.</p>\n"
        f"<pre>{html.escape(statistics)}</pre>\n"
        f"{sections}</html>\n"
    )


def mask_statistics(dataset: Any, count: int, mask_token_id: int, ratio: float, exact: bool = True) -> str:
    """Figures over the first `count` samples: share and spread of the noise, evenness over positions.

    Args:
        dataset: the training dataset; of copies and their clean samples the copies count.
        count: how many samples.
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
