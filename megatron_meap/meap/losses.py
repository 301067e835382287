"""The loss at masked and at clean inputs, reported apart: plain next-token prediction is what is trained on."""

import torch
from torch import Tensor

MASKED_LOSS = "lm loss masked inputs"
CLEAN_LOSS = "lm loss clean inputs"
MASKED_ANSWER_LOSS = "lm loss masked answers"
CLEAN_ANSWER_LOSS = "lm loss clean answers"


def next_token_loss(
    losses: Tensor, loss_mask: Tensor, input_masked: Tensor | None, *, answers: bool = False
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the next-token losses over all positions that count, and its parts for the report.

    Args:
        losses: cross-entropies [b, s].
        loss_mask: [b, s], 1 where the label counts.
        input_masked: bool [b, s], where the input is the mask token (in fine-tuning, where a label is one that is
            masked as an input); None for no such report.
        answers: name the parts for fine-tuning, whose loss is over answers.

    Returns:
        The summed loss, the number of tokens it is over, and for each reported name [sum, count].
    """
    flat = losses.view(-1).float()
    weights = loss_mask.view(-1).float()
    weighted = flat * weights
    loss, count = weighted.sum(), weights.sum()
    total = torch.stack([loss.detach(), count])
    report = {"lm loss": total}
    if input_masked is not None:
        masked = input_masked.reshape(-1)  # selecting by it would make the host wait for the device
        names = (MASKED_ANSWER_LOSS, CLEAN_ANSWER_LOSS) if answers else (MASKED_LOSS, CLEAN_LOSS)
        report[names[0]] = torch.stack([(weighted.detach() * masked).sum(), (weights * masked).sum()])
        report[names[1]] = total - report[names[0]]
    return loss, count, report
