"""Plots of training runs: the curves of one run, or of several for comparison."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_meap.errors import UsageError
from megatron_meap.files import whole_file
from megatron_meap.inspection.training_log import History
from megatron_meap.meap.losses import CLEAN_LOSS, MASKED_LOSS


@contextlib.contextmanager
def _figure(path: Path, panels: int = 1) -> Iterator[Any]:
    """The axes [panels] of a plot, which is written when the block ends; the file's suffix determines its format."""
    from matplotlib.figure import Figure

    figure = Figure((7 * panels + 1, 5))
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix[1:] not in formats:
        raise UsageError(f"{path}: no picture format has this ending; use one of .{', .'.join(sorted(formats))}")
    axes = figure.subplots(1, panels, squeeze=False)
    yield axes[0]
    for each in axes[0]:
        each.grid(alpha=0.3)
        each.legend()
    figure.tight_layout()
    with whole_file(path) as file:
        figure.savefig(file, dpi=120, format=path.suffix[1:])


def plot(history: History, path: Path, unigram: float | None = None) -> None:
    """Plot the loss curves: masked and clean inputs, validation, and the unigram entropy for comparison.

    Args:
        history: the run.
        path: file to write; its suffix determines the format.
        unigram: entropy of the corpus's token distribution in nats, which a model without context can reach.
    """
    with _figure(path) as (axes,):
        for name, label, color in (
            (MASKED_LOSS, "training, own input masked", "tab:red"),
            (CLEAN_LOSS, "training, own input clean", "tab:blue"),
        ):
            axes.plot(*history.curve(name), color=color, label=label, linewidth=1.2)
        if not history.curve(CLEAN_LOSS)[0]:
            axes.plot(*history.curve("lm loss"), color="tab:blue", label="training", linewidth=1.2)
        for number, (name, losses) in enumerate(history.validation_sets.items()):
            label = f"validation{' ' * bool(name)}{name} (clean inputs)"
            points = sorted(losses.items())
            axes.plot(*zip(*points, strict=True), "o-", color="black", alpha=0.4**number, markersize=4, label=label)
        for step in sorted(history.marked):
            axes.axvline(step, color="tab:orange", linestyle=":", linewidth=1)
        if unigram is not None:
            axes.axhline(unigram, color="gray", linestyle="--", linewidth=1, label="unigram entropy of the corpus")
        axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title="MEAP pretraining")


def plot_runs(runs: dict[str, History], path: Path) -> None:
    """Plot several runs over the tokens that they have read, or over steps if a log does not tell the tokens.

    Lines are the training loss on clean inputs, dots are validation; bits per byte, which do not depend on the
    tokenizer, have a separate panel if all runs have them.

    Args:
        runs: by name.
        path: file to write; its suffix determines the format.
    """
    in_tokens = all(history.seq_length for history in runs.values())
    panels = 1 + all(history.bits_per_byte for history in runs.values())

    def place(history: History, steps: list[int]) -> list[float]:
        return [history.tokens(step) if in_tokens else step for step in steps]

    with _figure(path, panels) as axes:
        for number, (name, history) in enumerate(runs.items()):
            look: dict[str, Any] = {"color": f"C{number}", "linewidth": 1.2}
            clean = history.curve(CLEAN_LOSS)
            steps, losses = clean if clean[0] else history.curve("lm loss")
            axes[0].plot(place(history, steps), losses, label=name, **look)
            validations = [history.validation, next(iter(history.bits_per_byte.values()), {})]
            for panel, found in zip(axes, validations, strict=False):
                points = sorted(found.items())
                steps, values = [step for step, _ in points], [value for _, value in points]
                panel.plot(
                    place(history, steps), values, "o", markersize=4, **look, label=name if panel != axes[0] else None
                )
        axes[0].set(ylabel="loss (nats per token)", title="training (lines), validation (dots)")
        for panel in axes[1:]:
            panel.set(ylabel="bits per byte", title="validation")
        for panel in axes:
            panel.set(xlabel="tokens" if in_tokens else "optimizer step")
