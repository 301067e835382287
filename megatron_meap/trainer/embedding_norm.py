"""The norm of the mask token's embedding compared with the others: is it learned, is it unusual?"""

from argparse import Namespace
from typing import Any

import torch
from torch import Tensor

from megatron_meap.trainer.after_step import whole_parameters


def has_mask_token(args: Namespace) -> bool:
    """Whether some inputs of the run become the mask token."""
    return args.meap_mask_ratio > 0 and args.meap_random_share + args.meap_kept_share < 1


def sums(weight: Tensor, first: int, vocab_size: int, mask_id: int) -> Tensor:
    """For a part of the vocabulary: the mask token's norm, the sum of the others' norms, their number; float64 [3].

    Args:
        weight: [rows, h], the embeddings of the tokens from `first` on; rows from `vocab_size` on are padding.
        first: the token of the first row.
        vocab_size: tokens of the whole vocabulary.
        mask_id: the mask token.
    """
    rows = weight.detach()[: max(0, vocab_size - first)]
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).double()
    mask = torch.arange(first, first + len(rows), device=rows.device) == mask_id
    return torch.stack([norms[mask].sum(), norms[~mask].sum(), (~mask).sum().double()])


def embedding_norms(args: Namespace, model: list[Any], optimizer: Any) -> dict[str, float]:
    """Both norms by name; all ranks call it together."""
    with whole_parameters(args, model, optimizer):
        mask, others, count = _reduced(args, model).tolist()
    return {"mask token": mask, "mean of the others": others / count}


def _reduced(args: Namespace, model: list[Any]) -> Tensor:
    """`sums` over the tensor-parallel ranks of the first pipeline stage, known to all stages."""
    from megatron.core import mpu
    from megatron.core.utils import unwrap_model

    total = torch.zeros(3, dtype=torch.float64, device=torch.cuda.current_device())
    chunk = unwrap_model(model[0])
    if chunk.pre_process:
        table = chunk.embedding.word_embeddings
        vocab_size = max(args.meap_tokenizer_vocab_size, args.meap_mask_token_id + 1)
        total += sums(table.weight, table.vocab_start_index, vocab_size, args.meap_mask_token_id)
    torch.distributed.all_reduce(total, group=mpu.get_model_parallel_group())
    return total
