"""The flags of fine-tuning and their validation."""

import argparse
from argparse import Namespace

from megatron_meap.errors import UsageError
from megatron_meap.sft.templates import TEMPLATES, find_template

MASK_RATIO = 0.10
"""Of the answer tokens, as in the official code; pretraining has 0.15."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to Megatron's parser."""
    group = parser.add_argument_group("MEAP fine-tuning", "conversations in JSON lines (docs/finetuning.md)")
    group.add_argument(
        "--meap-sft",
        action="store_true",
        help="fine-tune: --data-path (with --split), --train-data-path and --valid-data-path name JSON lines files",
    )
    group.add_argument(
        "--meap-sft-template",
        metavar="NAME",
        help=f"chat template: {', '.join(TEMPLATES)}, or a Jinja file (default: the tokenizer's own)",
    )
    group.add_argument(
        "--meap-sft-rows",
        choices=("rows", "concat"),
        default="rows",
        help="rows: the masked copy is a row of its own, as in the official code; concat: it follows the normal row, "
        "and sees it (default: %(default)s)",
    )
    group.add_argument(
        "--meap-sft-combined-loss",
        action="store_true",
        help="labels on the whole answer of a masked copy (the paper's formula; default: at masked tokens only)",
    )
    group.add_argument(
        "--meap-sft-threshold",
        type=int,
        default=50,
        metavar="TOKENS",
        help="only answers of more tokens get a masked copy (default: %(default)s)",
    )
    group.add_argument(
        "--meap-sft-no-history",
        action="store_true",
        help="prompt each answer with its own question alone, as the official code does (default: with all before it)",
    )
    group.add_argument(
        "--meap-sft-no-packing", action="store_true", help="one row a sample, the rest padding (default: packed)"
    )
    group.add_argument(
        "--meap-sft-ntp-budget",
        choices=("single", "equal", "double"),
        default="single",
        help="with --meap-mask-ratio 0: train on every row once an epoch, on the rows that MEAP would copy twice "
        "(as many rows as MEAP has), or on all twice (default: %(default)s)",
    )
    group.add_argument("--skip-bad-lines", action="store_true", help="pass over and count bad lines (default: refuse)")


def validate(args: Namespace) -> None:
    """Check the flags, and set what fine-tuning needs of Megatron's.

    Sets `meap_sft_template_text`, the template that the checkpoint and its exports carry.
    """
    args.meap_sft_template_text = find_template(args.meap_sft_template)
    if not args.meap_sft:
        _refuse_flags_without_meap_sft(args)
        return
    if args.meap_sft_threshold < 0:
        raise UsageError(f"--meap-sft-threshold {args.meap_sft_threshold}: must not be negative")
    for flag, contradicts, reason in _contradictions(args):
        if contradicts:
            raise UsageError(f"{flag}: not possible with --meap-sft: {reason}")
    args.dataloader_inter_document_masking = True  # batches carry the borders of the rows
    args.calculate_per_token_loss = True  # so that neither packing nor layout weighs a token


def _refuse_flags_without_meap_sft(args: Namespace) -> None:
    given = {
        "--meap-sft-template": args.meap_sft_template is not None,
        "--meap-sft-rows": args.meap_sft_rows != "rows",
        "--meap-sft-combined-loss": args.meap_sft_combined_loss,
        "--meap-sft-threshold": args.meap_sft_threshold != 50,
        "--meap-sft-no-history": args.meap_sft_no_history,
        "--meap-sft-no-packing": args.meap_sft_no_packing,
        "--meap-sft-ntp-budget": args.meap_sft_ntp_budget != "single",
        "--skip-bad-lines": args.skip_bad_lines,
    }
    for flag, is_given in given.items():
        if is_given:
            raise UsageError(f"{flag}: belongs to fine-tuning; add --meap-sft, or drop it")


def _contradictions(args: Namespace) -> list[tuple[str, bool, str]]:
    """Flags, whether they are given, and why they cannot be."""
    lists = args.data_args_path or args.per_split_data_args_path or args.per_dataset_sequences_path
    masked = args.meap_mask_ratio > 0
    return [
        ("--mock-data", args.mock_data, "it trains on conversations; name a file"),
        ("--fim-data", args.fim_data, "drop it"),
        ("--data-args-path", lists is not None, "name the files with --data-path or --train-data-path"),
        ("--dataloader-type", args.dataloader_type not in (None, "single"), "use single, Megatron's default"),
        ("--reset-position-ids", args.reset_position_ids, "positions begin anew with every row anyhow; drop it"),
        ("--reset-attention-mask", args.reset_attention_mask, "rows are apart anyhow; drop it"),
        ("--hybrid-context-parallel", args.hybrid_context_parallel, "use --context-parallel-size alone"),
        ("--mtp-num-layers", bool(args.mtp_num_layers), "its labels would cross the borders of rows"),
        ("--multiple-validation-sets", args.multiple_validation_sets, "give one set"),
        (
            "--context-parallel-size",
            args.context_parallel_size > 1,
            "Megatron's rotary positions expect packed rows to be cut otherwise; use tensor parallelism",
        ),
        ("--phase-transition-iterations", bool(args.phase_transition_iterations), "drop it"),
        (
            "--meap-mask-strategy official",
            masked and args.meap_mask_strategy == "official",
            "it is about pretraining; the official fine-tuning is random",
        ),
        ("--meap-mask-warmup-samples", args.meap_mask_warmup_samples > 0, "fine-tuning has no such schedule"),
        ("--meap-clean-final-share", args.meap_clean_final_share > 0, "fine-tuning has no such schedule"),
        (
            "--meap-sft-ntp-budget",
            masked and args.meap_sft_ntp_budget != "single",
            "it is about next-token prediction; add --meap-mask-ratio 0",
        ),
    ]
