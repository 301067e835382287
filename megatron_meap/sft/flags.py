"""The flags of fine-tuning and their validation."""

import datetime
from argparse import Namespace
from dataclasses import dataclass
from typing import ClassVar

from megatron_meap.errors import UsageError
from megatron_meap.flags import Settings, derived, flag
from megatron_meap.meap.settings import MaskSettings
from megatron_meap.sft.templates import TEMPLATES, find_template


@dataclass(frozen=True)
class SFTSettings(Settings):
    """What determines the rows of fine-tuning, besides the conversations and the masks."""

    sft: bool = flag(
        False,
        "fine-tune: --data-path (with --split), --train-data-path and --valid-data-path name JSON lines files",
        decides=True,
    )
    sft_template: str | None = flag(
        None,
        f"chat template: {', '.join(TEMPLATES)}, or a Jinja file (default: the tokenizer's own)",
        metavar="NAME",
    )
    sft_date: str | None = flag(
        None,
        "date that a template with strftime_now writes (default: today's at the first start; a resumed run keeps its "
        "own)",
        metavar="YYYY-MM-DD",
    )
    sft_rows: str = flag(
        "rows",
        "rows: the masked copy is a separate row, as in the official code; concat: it follows the normal row and can "
        "attend to it (default: %(default)s)",
        choices=("rows", "concat"),
        decides=True,
    )
    sft_combined_loss: bool = flag(
        False,
        "labels on the whole answer of a masked copy (the paper's formula; default: only at masked tokens)",
        decides=True,
    )
    sft_threshold: int = flag(
        50, "only answers with more tokens get a masked copy (default: %(default)s)", metavar="TOKENS", decides=True
    )
    sft_no_history: bool = flag(
        False,
        "prompt each answer only with its own question, as the official code does (default: with all earlier turns)",
        decides=True,
    )
    sft_no_packing: bool = flag(False, "one row per sample, filled up with padding (default: packed)", decides=True)
    sft_ntp_budget: str = flag(
        "single",
        "with --meap-mask-ratio 0, train in each epoch once on every row, twice on the rows that MEAP would copy (as "
        "many rows as with MEAP), or twice on all rows (default: %(default)s)",
        choices=("single", "equal", "double"),
        decides=True,
    )
    sft_train_digest: str | None = derived(None, "the conversations or their template (a digest)")


@dataclass(frozen=True)
class BadLineSettings(Settings):
    """What happens to lines that hold no conversation."""

    PREFIX: ClassVar[str] = ""

    skip_bad_lines: bool = flag(False, "skip and count bad lines (default: refuse)", name="--skip-bad-lines")


def validate(args: Namespace) -> None:
    """Check the flags, and set those of Megatron's that fine-tuning needs.

    Sets `meap_sft_template_text`, the template that the checkpoint and its exports carry.
    """
    args.meap_sft_template_text = find_template(args.meap_sft_template)
    if not args.meap_sft:
        for given in (*SFTSettings.given(args), *BadLineSettings.given(args)):
            raise UsageError(f"{given}: belongs to fine-tuning; add --meap-sft, or drop it")
        return
    try:
        datetime.date.fromisoformat(args.meap_sft_date or "2000-01-01")
    except ValueError:
        raise UsageError(f"--meap-sft-date {args.meap_sft_date}: expected a date such as 2026-01-31") from None
    if args.meap_sft_threshold < 0:
        raise UsageError(f"--meap-sft-threshold {args.meap_sft_threshold}: must not be negative")
    for given, contradicts, reason in _contradictions(args):
        if contradicts:
            raise UsageError(f"{MaskSettings.of(args).said(given)}: not possible with --meap-sft: {reason}")
    args.dataloader_inter_document_masking = True  # batches carry the borders of the rows
    args.calculate_per_token_loss = True  # so that neither packing nor layout weighs a token


def _contradictions(args: Namespace) -> list[tuple[str, bool, str]]:
    """Flags, whether they are given, and why they are refused."""
    lists = args.data_args_path or args.per_split_data_args_path or args.per_dataset_sequences_path
    masked = args.meap_mask_ratio > 0
    return [
        ("--mock-data", args.mock_data, "it trains on conversations; name a file"),
        ("--fim-data", args.fim_data, "drop it"),
        ("--data-args-path", lists is not None, "name the files with --data-path or --train-data-path"),
        ("--dataloader-type", args.dataloader_type not in (None, "single"), "use single, Megatron's default"),
        ("--reset-position-ids", args.reset_position_ids, "positions restart with every row anyway; drop it"),
        ("--reset-attention-mask", args.reset_attention_mask, "rows are separate anyway; drop it"),
        ("--hybrid-context-parallel", args.hybrid_context_parallel, "use only --context-parallel-size"),
        ("--mtp-num-layers", bool(args.mtp_num_layers), "its labels would cross the borders of rows"),
        ("--multiple-validation-sets", args.multiple_validation_sets, "give one set"),
        (
            "--context-parallel-size",
            args.context_parallel_size > 1,
            "Megatron's rotary positions expect packed rows to be cut differently; use tensor parallelism",
        ),
        ("--phase-transition-iterations", bool(args.phase_transition_iterations), "drop it"),
        (
            "--meap-mask-strategy official",
            masked and args.meap_mask_strategy == "official",
            "it is about pretraining; the official fine-tuning is random",
        ),
        ("--meap-mask-warmup-samples", args.meap_mask_warmup_samples > 0, "fine-tuning has no such schedule"),
        ("--meap-noised-share", args.meap_noised_share < 1, "only its masked copies are noised, all of them"),
        ("--meap-copy-weight", args.meap_copy_weight is not None, "it has its own masked copies"),
        ("--meap-clean-final-share", args.meap_clean_final_share > 0, "fine-tuning has no such schedule"),
        (
            "--meap-sft-ntp-budget",
            masked and args.meap_sft_ntp_budget != "single",
            "it is about next-token prediction; add --meap-mask-ratio 0",
        ),
    ]
