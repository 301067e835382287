"""The settings of the masks: declared as flags, checked, recorded in the checkpoint, and made into a `Masking`."""

from argparse import Namespace
from dataclasses import dataclass

from megatron_meap.errors import UsageError
from megatron_meap.flags import Settings, derived, flag
from megatron_meap.meap.masking import STRATEGIES, Masking, RatioSchedule
from megatron_meap.tokenization.mask_token import MASK_TOKEN

RATIO, SFT_RATIO = 0.15, 0.10
"""Of the input tokens in pretraining, and of the answer tokens in fine-tuning, as in the paper and its code."""


@dataclass(frozen=True)
class MaskSettings(Settings):
    """What decides the masks of a run, beside its length and batch size."""

    mask_ratio: float | None = flag(
        None,
        "share of the input tokens replaced by the mask token, in [0, 1); 0 is next-token prediction, exactly "
        f"Megatron's own pipeline (default: {RATIO}; with --meap-sft {SFT_RATIO}, of the answer tokens)",
        metavar="P",
        decides=True,
    )
    mask_strategy: str = flag(
        "random",
        "random: int(P * sequence length) distinct positions, independent for every sample; official: the "
        "official code's column set of the optimiser step, bit for bit; span: the same count in spans "
        "(default: %(default)s)",
        choices=list(STRATEGIES),
        decides=True,
    )
    span_length: int = flag(
        3, "length of a span, strategy span only (default: %(default)s)", metavar="TOKENS", decides=True
    )
    mask_token: str = flag(
        MASK_TOKEN,
        "mask token; where the tokenizer has none of this name it becomes the next id, before vocabulary padding "
        "(default: %(default)s)",
        metavar="TEXT",
    )
    mask_seed: int | None = flag(None, "seed of the masks (default: --seed)", metavar="SEED", decides=True)
    protect_special_tokens: bool | None = flag(
        None, "never mask EOD, BOS and padding (default: on, except with the strategy official)", decides=True
    )
    mask_validation: bool = flag(False, "mask the inputs of validation and test as well (default: they are clean)")
    mask_warmup_samples: int = flag(
        0,
        "raise the ratio linearly from 0 over this many samples (default: %(default)s)",
        metavar="SAMPLES",
        decides=True,
    )
    clean_final_share: float = flag(
        0.0,
        "mask nothing during this last share of the training samples (default: %(default)s)",
        metavar="SHARE",
        decides=True,
    )
    mask_token_id: int | None = derived(None, "--meap-mask-token (its id)")

    @property
    def ratio(self) -> float:
        """The mask ratio after `complete`."""
        assert self.mask_ratio is not None
        return self.mask_ratio

    def check(self) -> None:
        """Refuse values that no run can have.

        Raises:
            UsageError: names the flag.
        """
        if not 0.0 <= self.ratio < 1.0:
            raise UsageError(f"--meap-mask-ratio {self.ratio}: must be at least 0 and below 1")
        if self.span_length < 1:
            raise UsageError(f"--meap-span-length {self.span_length}: must be at least 1")
        if self.mask_warmup_samples < 0:
            raise UsageError(f"--meap-mask-warmup-samples {self.mask_warmup_samples}: must not be negative")
        if not 0.0 <= self.clean_final_share <= 1.0:
            raise UsageError(f"--meap-clean-final-share {self.clean_final_share}: must lie between 0 and 1")
        if self.mask_seed is None or not 0 <= self.mask_seed < 2**64:
            raise UsageError(f"--meap-mask-seed {self.mask_seed}: must lie between 0 and 2**64 - 1")

    def masking(self, split: str, total_samples: int, global_batch_size: int) -> Masking | None:
        """The masking of a split, or None where its inputs stay clean.

        The schedule follows the training samples; masked validation uses the final ratio throughout.

        Args:
            split: `train`, `valid` or `test`.
            total_samples: training samples of the whole run.
            global_batch_size: samples per optimiser step of this split (the strategy `official` follows the step).
        """
        if self.ratio == 0 or (split != "train" and not self.mask_validation):
            return None
        assert self.mask_seed is not None
        schedule = RatioSchedule(self.ratio)
        if split == "train":
            share = self.clean_final_share
            clean_from = round(total_samples * (1 - share)) if share else None
            schedule = RatioSchedule(self.ratio, self.mask_warmup_samples, clean_from)
        return Masking(schedule, self.mask_strategy, self.mask_seed, split, self.span_length, global_batch_size)


def complete(args: Namespace) -> MaskSettings:
    """Fill in the defaults that depend on other flags, in `args` too, and check all against Megatron's own.

    Raises:
        UsageError: a flag, or a combination, that no run can have.
    """
    if args.meap_mask_ratio is None:
        args.meap_mask_ratio = SFT_RATIO if args.meap_sft else RATIO
    if args.meap_mask_seed is None:
        args.meap_mask_seed = args.seed
    if args.meap_protect_special_tokens is None:
        args.meap_protect_special_tokens = args.meap_mask_strategy != "official"
    settings = MaskSettings.of(args)
    settings.check()
    if settings.ratio > 0 and args.dataloader_type not in (None, "single"):
        raise UsageError(
            f"--dataloader-type {args.dataloader_type}: repeats sample indices, so every epoch would get the same "
            "masks; use --dataloader-type single, which shuffles and repeats the data itself"
        )
    varies = args.rampup_batch_size or args.step_batch_size_schedule or args.decrease_batch_size_if_needed
    if settings.ratio > 0 and settings.mask_strategy == "official" and varies:
        raise UsageError(
            "--meap-mask-strategy official: needs a constant global batch size, because its masks follow the optimiser "
            "step; drop the batch-size schedule, or use --meap-mask-strategy random"
        )
    return settings


def masking_of(args: Namespace, split: str) -> Masking | None:
    """The masking of a split of the run that these arguments describe; None where its inputs stay clean."""
    total = args.train_samples or (args.train_iters or 0) * args.global_batch_size
    batch = args.global_batch_size if split == "train" else args.eval_global_batch_size
    return MaskSettings.of(args).masking(split, total, batch)
