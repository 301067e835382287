"""The settings of the noise: declared as flags, checked, recorded in the checkpoint, and made into a `Masking`."""

import argparse
import math
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_meap.errors import UsageError, refuse
from megatron_meap.flags import Settings, derived, flag
from megatron_meap.meap.masking import Masking, RatioSchedule, Replacement
from megatron_meap.meap.objectives import OBJECTIVES
from megatron_meap.meap.positions import ALL
from megatron_meap.meap.schedule import SHAPES
from megatron_meap.meap.weights import digest_of, read_weights
from megatron_meap.tokenization.mask_token import MASK_TOKEN

RATIO, SFT_RATIO = 0.15, 0.10
"""Of the input tokens in pretraining, and of the answer tokens in fine-tuning, as in the paper and its code."""


@dataclass(frozen=True)
class MaskSettings(Settings):
    """What determines the noise of a run's inputs, besides its length and batch size."""

    objective: str = flag(
        "meap",
        "a published objective: sets several of the flags below; flags given explicitly win, and --dry-run shows the "
        "result (docs/objectives.md; default: %(default)s)",
        choices=list(OBJECTIVES),
    )
    mask_ratio: float | None = flag(
        None,
        "share of the input tokens replaced by the mask token, in [0, 1); 0 is next-token prediction, exactly "
        f"Megatron's own pipeline (default: {RATIO}; with --meap-sft {SFT_RATIO}, of the answer tokens)",
        metavar="P",
        decides=True,
    )
    mask_ratio_min: float | None = flag(
        None,
        "draw each sample's ratio uniformly between this and --meap-mask-ratio (default: all have that ratio)",
        metavar="P",
        decides=True,
    )
    mask_strategy: str = flag(
        "random",
        "random: int(P * sequence length) distinct positions, independent for every sample; official: the official "
        "code's columns of the optimizer step, bit for bit; span: the same number, in spans; geometric: in spans of "
        "geometric length; bernoulli: every position independently; weighted: likewise, with a probability "
        "proportional to its token's weight (default: %(default)s)",
        choices=list(ALL),
        decides=True,
    )
    span_length: int = flag(
        3,
        "length of the spans (strategy span), or its mean (strategy geometric) (default: %(default)s)",
        metavar="TOKENS",
        decides=True,
    )
    mask_weights: str | None = flag(
        None,
        "weights of the token ids for the strategy weighted: a .npy array, or text with one number per line",
        metavar="FILE",
    )
    mask_weights_sha256: str | None = derived(None, "--meap-mask-weights (a digest)")
    random_share: float = flag(
        0.0,
        "share of the chosen positions that become another, random token (no special one) instead of the mask token "
        "(default: %(default)s)",
        metavar="SHARE",
        decides=True,
    )
    kept_share: float = flag(
        0.0,
        "share of the chosen positions that stay unchanged, as in BERT (default: %(default)s)",
        metavar="SHARE",
        decides=True,
    )
    noised_share: float = flag(
        1.0, "share of the samples that are noised at all (default: %(default)s)", metavar="SHARE", decides=True
    )
    copy_weight: float | None = flag(
        None,
        "train on every sample clean and, in the same global batch, on a noised copy whose loss has this weight; both "
        "count as samples (default: no copies, the samples themselves are noised)",
        metavar="W",
        decides=True,
    )
    mask_token: str = flag(
        MASK_TOKEN,
        "mask token; if the tokenizer has no token of this name, it gets the next id, before the vocabulary padding "
        "(default: %(default)s)",
        metavar="TEXT",
    )
    mask_seed: int | None = flag(None, "seed of the masks (default: --seed)", metavar="SEED", decides=True)
    protect_special_tokens: bool | None = flag(
        None, "never mask EOD, BOS and padding (default: on, except with the strategy official)", decides=True
    )
    mask_validation: bool = flag(False, "also mask the inputs of validation and test (default: they are clean)")
    mask_warmup_samples: int = flag(
        0, "increase the ratio from 0 over this many samples (default: %(default)s)", metavar="SAMPLES", decides=True
    )
    mask_warmup_shape: str = flag(
        "linear",
        "how the ratio rises over --meap-mask-warmup-samples (default: %(default)s)",
        choices=list(SHAPES),
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

    @property
    def is_meap(self) -> bool:
        """Whether the noise is exactly MEAP's: the mask token, at one ratio, in every sample."""
        plain = (self.mask_ratio_min, self.random_share, self.kept_share, self.noised_share, self.copy_weight)
        return plain == (None, 0, 0, 1, None) and self.mask_weights is None

    @classmethod
    def add_arguments(cls, group: Any) -> None:
        """Add the flags; the objective asked for sets their defaults, so that given flags take precedence."""
        super().add_arguments(group)
        asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        asked.add_argument(cls.flag_of("objective"), dest="name", default="meap")
        objective = OBJECTIVES.get(asked.parse_known_args()[0].name)  # an unknown one is refused by the parser itself
        if objective is not None:
            group.set_defaults(**{cls.PREFIX + name: value for name, value in objective.settings.items()})

    def check(self) -> None:
        """Refuse values that no run can have.

        Raises:
            UsageError: names the flag.
        """
        weighted = self.mask_strategy == "weighted"
        lowest, copy = self.mask_ratio_min, self.copy_weight
        refused = {
            "mask_ratio": (not 0.0 <= self.ratio < 1.0, "must be at least 0 and below 1"),
            "mask_ratio_min": (
                lowest is not None and not 0.0 <= lowest <= self.ratio,
                f"must lie between 0 and --meap-mask-ratio {self.ratio}",
            ),
            "span_length": (self.span_length < 1, "must be at least 1"),
            "mask_warmup_samples": (self.mask_warmup_samples < 0, "must not be negative"),
            "clean_final_share": (not 0.0 <= self.clean_final_share <= 1.0, "must lie between 0 and 1"),
            "random_share": (not 0.0 <= self.random_share <= 1.0, "must lie between 0 and 1"),
            "kept_share": (
                not 0.0 <= self.kept_share <= 1.0 - self.random_share or self.kept_share == 1,
                "must be at least 0 and, with --meap-random-share, at most 1; 1 would change nothing",
            ),
            "noised_share": (not 0.0 < self.noised_share <= 1.0, "must be above 0 and at most 1"),
            "copy_weight": (
                copy is not None and not (0.0 < copy < math.inf),
                "must be above 0; no copies: leave it out, and the objective that sets it",
            ),
            "mask_seed": (
                self.mask_seed is None or not 0 <= self.mask_seed < 2**64,
                "must lie between 0 and 2**64 - 1",
            ),
        }
        for name, (wrong, why) in refused.items():
            if wrong:
                raise UsageError(f"{self.said(self.flag_of(name))} {getattr(self, name)}: {why}")
        refuse(
            (
                weighted != (self.mask_weights is not None),
                f"{self.said('--meap-mask-strategy')} weighted: needs --meap-mask-weights, and no other strategy takes "
                "them",
            ),
            (
                self.mask_strategy == "official" and (lowest is not None or self.noised_share < 1),
                "--meap-mask-strategy official: has the same masks for all samples of a step; drop "
                "--meap-mask-ratio-min and --meap-noised-share, or use --meap-mask-strategy random",
            ),
            (
                copy is not None and self.ratio == 0,
                f"{self.said('--meap-copy-weight')}: with --meap-mask-ratio 0 the copies would be clean; drop one of "
                "the two",
            ),
            (
                self.mask_warmup_shape != "linear" and self.mask_warmup_samples == 0,
                f"--meap-mask-warmup-shape {self.mask_warmup_shape}: needs --meap-mask-warmup-samples, over which the "
                "ratio rises",
            ),
        )

    def words(self, what: str = "input tokens") -> str:
        """The noise in words; `what` is noised."""
        if self.ratio == 0:
            return "none: next-token prediction"
        of = "" if self.noised_share == 1 else f"in {100 * self.noised_share:g}% of the samples "
        much = f"{100 * self.ratio:g}%"
        if self.mask_ratio_min is not None:
            much = f"{100 * self.mask_ratio_min:g}% to {much}, drawn for every sample,"
        rest = 1 - self.random_share - self.kept_share
        become = [
            (rest, self.mask_token + (f" (id {self.mask_token_id})" if self.mask_token_id is not None else "")),
            (self.random_share, "a random other token"),
            (self.kept_share, "what they were"),
        ]
        shares = [(share, name) for share, name in become if share > 1e-9]
        names = [name if len(shares) == 1 else f"{name} ({100 * share:g}%)" for share, name in shares]
        strategy = self.mask_strategy
        strategy += f" of {self.span_length}" if strategy in ("span", "geometric") else ""
        strategy += f" by {self.mask_weights}" if self.mask_weights else ""
        copies = (
            "" if self.copy_weight is None else f", in a copy of every sample whose loss counts {self.copy_weight:g}"
        )
        return f"{strategy}, {of}{much} of the {what} become {' or '.join(names)}{copies}"

    def said(self, flag: str) -> str:
        """The name of a flag in a message: with the objective in front, if that set it."""
        settings = OBJECTIVES[self.objective].settings
        set_by_it = any(self.flag_of(name) == flag and getattr(self, name) == value for name, value in settings.items())
        return f"--meap-objective {self.objective} ({flag})" if set_by_it else flag

    def expanded(self) -> str:
        """The flags that the objective sets, with this run's values if they differ."""
        parts = []
        for name, value in OBJECTIVES[self.objective].settings.items():
            own = getattr(self, name)
            parts.append(f"{self.flag_of(name)} {value}" + ("" if own == value else f" (here {own})"))
        return f"{self.objective} ({OBJECTIVES[self.objective].source})" + (f": {' '.join(parts)}" if parts else "")

    def masking(
        self, split: str, total_samples: int, global_batch_size: int, vocab_size: int = 0, special: tuple[int, ...] = ()
    ) -> Masking | None:
        """The masking of a split, or None if its inputs stay clean.

        The schedule follows the training samples; masked validation always uses the final ratio.

        Args:
            split: `train`, `valid` or `test`.
            total_samples: training samples of the whole run.
            global_batch_size: samples per optimizer step of this split (the strategy `official` follows the step).
            vocab_size: tokens of the tokenizer, from which random ones are drawn and to which the weights belong.
            special: ids that are not drawn.
        """
        if self.ratio == 0 or (split != "train" and not self.mask_validation):
            return None
        assert self.mask_seed is not None
        schedule = RatioSchedule(self.ratio, lowest=self.mask_ratio_min)
        if split == "train":
            share = self.clean_final_share
            clean_from = round(total_samples * (1 - share)) if share else None
            schedule = RatioSchedule(
                self.ratio, self.mask_warmup_samples, clean_from, self.mask_warmup_shape, self.mask_ratio_min
            )
        ordinary = np.setdiff1d(np.arange(vocab_size), special) if self.random_share else np.empty(0, np.int64)
        if self.random_share and len(ordinary) < 2:
            raise UsageError("--meap-random-share: the tokenizer has no two ordinary tokens to draw from")
        return Masking(
            schedule,
            self.mask_strategy,
            self.mask_seed,
            split,
            self.span_length,
            global_batch_size,
            self.noised_share,
            Replacement(self.random_share, self.kept_share, ordinary),
            None if self.mask_weights is None else read_weights(Path(self.mask_weights), vocab_size),
        )


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
    if args.meap_mask_weights is not None:
        args.meap_mask_weights_sha256 = digest_of(Path(args.meap_mask_weights))
    settings = MaskSettings.of(args)
    settings.check()
    repeats = args.dataloader_type not in (None, "single")
    if settings.ratio > 0 and repeats and not args.meap_sft:  # whose own check names fine-tuning
        raise UsageError(
            f"--dataloader-type {args.dataloader_type}: repeats sample indices, so every epoch would get the same "
            "masks; use --dataloader-type single, which shuffles and repeats the data itself"
        )
    varies = args.rampup_batch_size or args.step_batch_size_schedule or args.decrease_batch_size_if_needed
    if settings.ratio > 0 and settings.mask_strategy == "official" and varies:
        raise UsageError(
            "--meap-mask-strategy official: needs a constant global batch size, because its masks depend on the "
            "optimizer step; drop the batch-size schedule, or use --meap-mask-strategy random"
        )
    if settings.copy_weight is not None:
        if varies:
            raise UsageError(
                "--meap-copy-weight: needs a constant global batch size, so that sample and copy are in the same one; "
                "drop the batch-size schedule"
            )
        args.calculate_per_token_loss = True  # so that the loss is divided by the clean tokens of the global batch
    return settings


def check_batches(args: Namespace) -> None:
    """Check what depends on batch sizes, once Megatron has completed them.

    Raises:
        UsageError: samples and their copies would not be in the same global batch.
    """
    if args.meap_copy_weight is not None and args.global_batch_size % 2:
        raise UsageError(
            f"--global-batch-size {args.global_batch_size}: must be even with --meap-copy-weight, so that every sample "
            "and its copy are in the same one"
        )


def masking_of(args: Namespace, split: str) -> Masking | None:
    """The masking of a split of the run that these arguments describe; None if its inputs stay clean."""
    total = args.train_samples or (args.train_iters or 0) * args.global_batch_size
    if args.step_batch_size_schedule is None:
        total -= total % args.global_batch_size  # what makes no whole batch is not trained on
    batch = args.global_batch_size if split == "train" else args.eval_global_batch_size
    settings = MaskSettings.of(args)
    if settings.random_share == 0 and settings.mask_weights is None:
        return settings.masking(split, total, batch)
    special = (*args.meap_special_ids, args.meap_mask_token_id)
    return settings.masking(split, total, batch, args.meap_tokenizer_vocab_size, special)
