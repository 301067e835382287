"""The loss at noised and at clean inputs, reported separately; the training loss is plain next-token prediction."""

import math

import torch
from torch import Tensor

MASKED_LOSS = "lm loss masked inputs"
CLEAN_LOSS = "lm loss clean inputs"
MASKED_ANSWER_LOSS = "lm loss masked answers"
CLEAN_ANSWER_LOSS = "lm loss clean answers"
CLEAN_SAMPLE_LOSS = "lm loss clean samples"
COPY_LOSS = "lm loss noised copies"
NOISED_INPUTS = "noised inputs"
"""The share of the inputs that are noised."""

BITS_PER_BYTE = "bits per byte"
"""The loss in bits over the bytes of the text, which does not depend on the tokenizer."""


def next_token_loss(
    losses: Tensor,
    loss_mask: Tensor,
    input_masked: Tensor | None,
    *,
    answers: bool = False,
    copies: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The sum of the next-token losses over all positions that count, and its parts for the report.

    Args:
        losses: cross-entropies [b, s].
        loss_mask: [b, s], weight of a label: 1 or 0, and in copies the weight of the copy.
        input_masked: bool [b, s], where the input is noised (in fine-tuning, where the label is noised as an input);
            None for no such report.
        answers: name the parts for fine-tuning, whose loss is over answers.
        copies: bool [b, s], whether a position belongs to a noised copy; None without copies.

    Returns:
        The summed loss; the number of tokens to divide it by, without those of copies: over a global batch the result
        is mean(clean) + weight * mean(copies); and for each reported name [sum, count].
    """
    flat = losses.view(-1).float()
    weights = loss_mask.view(-1).float()
    weighted = flat * weights
    loss, counted, each = weighted.sum(), weights, weighted.detach()
    if copies is not None:  # the report has no weights
        counted = (weights > 0).float()
        each = flat.detach() * counted

    def part(chosen: Tensor) -> Tensor:  # indexing with it would make the host wait for the device
        return torch.stack([(each * chosen).sum(), (counted * chosen).sum()])

    whole = torch.stack([each.sum(), counted.sum()])
    report = {"lm loss": whole}
    if copies is not None:
        copied = part(copies.reshape(-1))
        report = {"lm loss": torch.stack([loss.detach(), whole[1] - copied[1]])}
        report |= {CLEAN_SAMPLE_LOSS: whole - copied, COPY_LOSS: copied}
    if input_masked is not None:
        masked = input_masked.reshape(-1)
        names = (MASKED_ANSWER_LOSS, CLEAN_ANSWER_LOSS) if answers else (MASKED_LOSS, CLEAN_LOSS)
        report[names[0]] = part(masked)
        report[names[1]] = whole - report[names[0]]
        report[NOISED_INPUTS] = torch.stack([masked.float().sum(), torch.ones_like(flat).sum()])
    return loss, report["lm loss"][1], report


def bits_per_byte(losses: Tensor, loss_mask: Tensor, labels: Tensor, text_bytes: Tensor) -> Tensor:
    """The bits and the bytes [2] of the labels that represent text; others, such as EOD, do not count.

    Args:
        losses: cross-entropies [b, s] in nats.
        loss_mask: [b, s], 1 where the label counts.
        labels: [b, s], token ids; arbitrary where they do not count.
        text_bytes: [ids], how many bytes of text each represents.
    """
    known = (labels >= 0) & (labels < len(text_bytes))
    sizes = text_bytes[torch.where(known, labels, 0)].reshape(-1) * (known & (loss_mask > 0)).reshape(-1)
    bits = losses.detach().reshape(-1).float() / math.log(2)
    return torch.stack([(bits * (sizes > 0)).sum(), sizes.sum().float()])
