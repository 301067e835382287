"""How much data a run reads, and how often it repeats it."""

from argparse import Namespace

from megatron_meap.errors import UsageError
from megatron_meap.preprocessing.blend import shares
from megatron_meap.preprocessing.index import read_index
from megatron_meap.trainer import batch_sizes, stages
from megatron_meap.trainer.blend import blends

MANY_EPOCHS = 4
"""Up to about this many, repeated text is nearly as good as new text (arXiv 2305.16264)."""


def amount(tokens: float) -> str:
    """A number of tokens for people: 131.1 M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= size:
            return f"{tokens / size:,.1f} {unit}"
    return f"{tokens:.0f}"


def tokens_read(args: Namespace) -> int:
    """Tokens that the training steps read, copies included."""
    return batch_sizes.samples(args) * int(args.seq_length)


def lines(args: Namespace) -> list[str]:
    """Tokens and epochs of the pretraining data in one line, and a warning if text is read many times.

    Empty for data that is not in local files, and for fine-tuning, which counts conversations.
    """
    if args.meap_sft or args.mock_data or not (args.train_iters or args.train_samples):
        return []
    try:
        there, epochs = _use(args)
    except UsageError:
        return []
    if not epochs:
        return []
    low, high = min(epochs), max(epochs)
    times = f"{high:.2g}" if high - low < 0.05 * high else f"{low:.2g} to {high:.2g}"
    said = [f"tokens        {amount(tokens_read(args))} read of {amount(there)} to train on: {times} epochs"]
    if high > MANY_EPOCHS:
        said.append(
            f"warning: some text is read {high:,.0f} times; beyond {MANY_EPOCHS} epochs a model gains little from it: "
            "use more data, or fewer steps"
        )
    return said + _stages(args)


def _stages(args: Namespace) -> list[str]:
    """The stages of the data, one per line."""
    if args.meap_data_stages is None:
        return []
    found, total = stages.of_run(args)
    return list(stages.lines(found, total, args.seq_length * (1 if args.meap_copy_weight is None else 2)))


def _use(args: Namespace) -> tuple[float, list[float]]:
    """Tokens available for training, and how often those of each dataset are read."""
    blend, per_split = blends(args)
    prefixes, weights = blend or (per_split or [None])[0] or ([], None)
    share = 1.0
    if blend is not None and args.split is not None:
        share = shares(args.split)[0]
    tokens = [share * read_index(prefix).tokens for prefix in prefixes]
    if args.meap_data_stages is not None:
        weights = [float(count) for count in stages.samples(*stages.of_run(args)).values()]
    weights = weights or tokens
    read = tokens_read(args) / (2 if args.meap_copy_weight is not None else 1)  # a copy is of the sample before it
    return sum(tokens), [
        read * weight / sum(weights) / size for weight, size in zip(weights, tokens, strict=True) if size and weight
    ]
