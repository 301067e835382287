"""How well a model finds answers, by where they stand: its own forward pass, and a picture."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Scores:
    """By gold position, the first document first."""

    accuracy: list[float]
    """Share of the answer's tokens that are the likeliest ones, each given the right ones before it."""
    log_probability: list[float]
    """Of the right answer, nats per token."""

    def __str__(self) -> str:
        right = sum(self.accuracy) / len(self.accuracy)
        return (
            f"{100 * right:5.1f}% of tokens right: {' '.join(f'{100 * each:3.0f}' for each in self.accuracy)}; "
            f"log p {sum(self.log_probability) / len(self.accuracy):.3f}: "
            f"{' '.join(f'{each:.2f}' for each in self.log_probability)}"
        )


@torch.inference_mode()
def score(checkpoint: Path, asked: Iterable[tuple[int, list[dict[str, str]]]], positions: int) -> Scores:
    """Score a Megatron checkpoint, converted in memory to transformers' model.

    Args:
        checkpoint: what was given to `--save`; it holds the chat template.
        asked: gold position and messages, the answer last.
        positions: how many there are.
    """
    from megatron_meap import device

    device.prepare()
    from megatron_meap.generation import Generator

    generator = Generator(str(checkpoint))
    model, tokenizer = generator.model.float(), generator.tokenizer
    results: list[list[tuple[float, float]]] = [[] for _ in range(positions)]
    for position, messages in asked:
        results[position].append(_answer(model, tokenizer, messages))
    return Scores(
        [sum(right for right, _ in each) / len(each) for each in results],
        [sum(value for _, value in each) / len(each) for each in results],
    )


def _answer(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> tuple[float, float]:
    """Share of the answer's tokens found likeliest, and their log-probability: one forward pass over the whole."""
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert whole[: len(prompt)] == prompt
    logits = model(torch.tensor([whole])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    answer = torch.tensor(whole[len(prompt) :])
    return float((logits.argmax(-1) == answer).float().mean()), float(logits.gather(1, answer[:, None]).mean())


def draw_picture(scores: dict[str, Scores], path: Path) -> None:
    """Accuracy and log-probability by gold position, one line a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name, each in scores.items():
        places = range(1, len(each.accuracy) + 1)
        left.plot(places, [100 * share for share in each.accuracy], "o-", label=name)
        right.plot(places, each.log_probability, "o-", label=name)
    left.set(xlabel="document with the answer", ylabel="tokens of the answer right (%)", ylim=(0, 102))
    right.set(xlabel="document with the answer", ylabel="log-probability (nats per token)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
