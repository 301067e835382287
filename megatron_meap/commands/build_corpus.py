"""Gather real text from this machine (Python's documentation, docstrings and library sources) as JSON Lines.

    python tools/build_corpus.py --train corpus/train.jsonl --valid corpus/valid.jsonl --max-mb 20

Nothing is downloaded, and the same installation always gives the same two files.
"""

import math

from megatron_meap.errors import UsageError
from megatron_meap.flags import Parser
from megatron_meap.preprocessing.corpus import build_corpus


def main() -> None:
    """Parse the flags and build."""
    parser = Parser(__doc__)
    parser.add_argument("--train", required=True, help="JSON Lines file to write the training documents to")
    parser.add_argument("--valid", required=True, help="JSON Lines file to write the validation documents to")
    parser.add_argument("--max-mb", type=float, default=20, help="size of both together, in 10^6 bytes (default: 20)")
    parser.add_argument(
        "--valid-share", type=float, default=0.02, help="share of Python modules whose text is for validation"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    args = parser.parse_args()
    if not 0 < args.max_mb < math.inf:
        raise UsageError(f"--max-mb {args.max_mb:g}: how much text to gather, more than 0")
    if not 0 < args.valid_share < 1:
        raise UsageError(f"--valid-share {args.valid_share:g}: a share, between 0 and 1")
    made = build_corpus(
        args.train, args.valid, max_bytes=int(args.max_mb * 1e6), valid_share=args.valid_share, overwrite=args.overwrite
    )
    print(f"{args.train}: {made.train_documents:,} documents, {made.train_bytes / 1e6:.2f} MB of text")
    print(f"{args.valid}: {made.valid_documents:,} documents, {made.valid_bytes / 1e6:.2f} MB of text")
