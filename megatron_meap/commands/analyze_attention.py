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

from megatron_meap.evaluation.attention.recipe import Recipe
from megatron_meap.flags import Parser


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="[NAME=]PATH[@ITERATION]; the first is the baseline")
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer of all models (default: each one's own)")
    parser.add_argument("--text", required=True, metavar="FILE", help="JSON lines with a key text, Parquet or text")
    Recipe.add_arguments(parser)
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

    job = AttentionJob(flags.models, flags.text, flags.output, Recipe.of(flags), flags.tokenizer, flags.overwrite)
    analyze(job)
