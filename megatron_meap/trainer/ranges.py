"""Numbers that no run can use, and that Megatron does not check or only in the middle of a run."""

import math
from argparse import Namespace
from collections.abc import Callable
from fnmatch import fnmatchcase

from megatron_meap.errors import UsageError

_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "*_channels *_dim *_interval *_lora_rank *_size *_topk cpu_offloading_num_layers distributed_timeout_* "
        "exit_duration_* max_position_embeddings mtp_num_layers mup_base_* num_attention_heads num_distributed_* "
        "num_experts num_layers num_query_groups recompute_num_layers rotary_seq_len_* seq_length",
        lambda value: value >= 1,
        "at least 1",
    ),
    ("seed", lambda value: 1 <= value < 2**31, "at least 1, and below 2**31"),
    ("*_eps *_std clip_grad local_rank num_workers weight_decay", lambda value: value >= 0, "0 or more"),
    ("moe_input_jitter_eps", lambda value: 0 < value < 1, "above 0 and below 1"),
    ("*_dropout adam_beta? lion_beta? muon_momentum sgd_momentum", lambda value: 0 <= value < 1, "from 0 to below 1"),
)
"""Patterns of arguments, whether a number is possible, and the range in words."""


def check(given: dict[str, str], args: Namespace) -> None:
    """Refuse numbers that are not finite or outside their range.

    Args:
        given: the arguments that differ from their defaults, and their flags (`without_effect.changed`).
        args: parsed.

    Raises:
        UsageError: names the flag.
    """
    for name, flag in given.items():
        value = getattr(args, name, None)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise UsageError(f"{flag} {value}: must be a finite number")
        for patterns, is_possible, words in _RANGES:
            if any(fnmatchcase(name, pattern) for pattern in patterns.split()) and not is_possible(value):
                raise UsageError(f"{flag} {value}: must be {words}")


def check_heads(args: Namespace) -> None:
    """Refuse numbers of heads, or sizes, with which Megatron cannot build its attention or rotary positions.

    And those that tensor-parallel ranks cannot share.

    Args:
        args: validated by Megatron, which completes them.

    Raises:
        UsageError: names the flag.
    """
    ranks = args.tensor_model_parallel_size
    shared = {
        "ffn_hidden_size": args.ffn_hidden_size,
        "seq_length": args.seq_length // args.context_parallel_size if args.sequence_parallel else ranks,
    }
    for name, size in shared.items():
        if size % ranks:
            raise UsageError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: {size} cannot be divided among the {ranks} ranks "
                "of --tensor-model-parallel-size"
            )
    groups = args.num_query_groups or 1
    if args.group_query_attention and args.num_attention_heads % groups:
        raise UsageError(
            f"--num-query-groups {groups}: does not divide the {args.num_attention_heads} of --num-attention-heads"
        )
    flag, length = "--kv-channels (else --hidden-size / --num-attention-heads)", args.kv_channels
    if args.multi_latent_attention:
        flag, length = "--qk-pos-emb-head-dim", args.qk_pos_emb_head_dim
    elif args.position_embedding_type not in ("rope", "yarn", "mrope"):
        return
    elif args.rotary_percent < 1 and args.position_embedding_type != "yarn":
        flag, length = f"--rotary-percent {args.rotary_percent}", int(length * args.rotary_percent)
    if length % 2 or length < 2:
        raise UsageError(f"{flag}: makes {length} rotary dimensions of a head; must be an even number, at least 2")
