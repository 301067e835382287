"""Measure where models attend: on masked positions, over the others, and on the answer in a prompt.

    python tools/analyze_attention.py NTP=runs/ntp/checkpoints MEAP=runs/demo/checkpoints \\
        --text runs/demo/valid.jsonl --output attention

One or two models (the first is the baseline) read the same inputs: Megatron checkpoints or Hugging Face directories.
Writes attention.json, attention.csv, segments.png, layers.png and heads.png.
"""

import argparse
import logging
import os
import warnings
from pathlib import Path

from megatron_meap.flags import Parser


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="[NAME=]PATH[@ITERATION]; the first is the baseline")
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer of all models (default: each one's own)")
    parser.add_argument("--text", required=True, metavar="FILE", help="JSON lines with a key text, Parquet or text")
    parser.add_argument("--length", type=int, metavar="TOKENS", help="sample length (default: context, at most 4096)")
    parser.add_argument(
        "--samples", type=int, default=20, help="number of samples, and of prompts (default: %(default)s)"
    )
    parser.add_argument("--mask-ratio", type=float, default=0.15, metavar="P", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1234, help="for masks and prompts (default: %(default)s)")
    parser.add_argument("--needle", metavar="TEXT", help="sentence to hide, with {key} and {value}")
    parser.add_argument("--question", metavar="TEXT", help="end of a prompt, with {key}; the value would come next")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results there")
    return parser.parse_args()


def main() -> None:
    """Measure, print and write."""
    flags = parse_flags()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")  # the libraries' chatter: what matters is printed or raised
    logging.disable(logging.WARNING)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    from megatron_meap.evaluation.attention.job import AttentionJob, analyze

    names = ("models", "tokenizer", "text", "length", "samples", "mask_ratio", "seed", "output", "overwrite")
    templates = {name: getattr(flags, name) for name in ("needle", "question") if getattr(flags, name) is not None}
    analyze(AttentionJob(**{name: getattr(flags, name) for name in names}, templates=templates))
