"""The norm of the mask token's embedding: of any part of the vocabulary, padding left out."""

from argparse import Namespace

import pytest
import torch

from megatron_meap.trainer.embedding_norm import has_mask_token, sums


def test_parts_of_the_vocabulary_add_up_and_padding_does_not_count():
    table = torch.randn(12, 5, generator=torch.manual_seed(0)).bfloat16()
    table[9:] = 1000.0  # padding, in the second and in all of the third part
    norms = table[:9].double().norm(dim=1)
    parts = [sums(table[first : first + 4], first, vocab_size=9, mask_id=6) for first in (0, 4, 8)]
    mask, others, count = sum(parts).tolist()
    assert mask == pytest.approx(norms[6].item(), rel=1e-6)
    assert (others, count) == (pytest.approx(norms.sum().item() - mask, rel=1e-6), 8)
    assert sums(table[10:], 10, 9, 6).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("ratio", "random", "kept", "has"),
    [(0.15, 0, 0, True), (0, 0, 0, False), (0.05, 1, 0, False), (0.15, 0.1, 0.1, True)],
)
def test_runs_without_mask_tokens_have_nothing_to_report(ratio, random, kept, has):
    args = Namespace(meap_mask_ratio=ratio, meap_random_share=random, meap_kept_share=kept)
    assert has_mask_token(args) is has
