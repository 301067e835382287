"""Train a SentencePiece tokenizer (byte-fallback BPE like Llama's, with [MASK] as a control symbol).

    python tools/train_tokenizer.py --input corpus/train.jsonl --output tokenizer/tokenizer.model --vocab-size 8000

Use it with `--tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer/tokenizer.model`.
"""

import math

from megatron_meap.errors import UsageError
from megatron_meap.flags import Parser
from megatron_meap.preprocessing.readers import InputOptions
from megatron_meap.preprocessing.tokenizer_training import train_tokenizer
from megatron_meap.tokenization.mask_token import MASK_TOKEN


def main() -> None:
    """Parse the flags and train."""
    parser = Parser(__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="files, globs or folders, as for preprocessing")
    parser.add_argument("--output", required=True, help="path of the .model file")
    parser.add_argument("--vocab-size", type=int, required=True, help="number of ids, special tokens included")
    parser.add_argument("--json-key", default="text", help="JSON key or Parquet column of the text (default: text)")
    parser.add_argument("--input-format", choices=["jsonl", "text", "parquet"], help="default: recognised by content")
    parser.add_argument(
        "--max-mb",
        type=float,
        default=50,
        help="text to train on, in 10^6 bytes, taken evenly from all files (default: 50)",
    )
    parser.add_argument("--mask-token", default=MASK_TOKEN, help=f"text of the mask token (default: {MASK_TOKEN})")
    parser.add_argument("--pad-token", help="text of a padding token (default: no padding token)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    args = parser.parse_args()
    if not 0 < args.max_mb < math.inf:
        raise UsageError(f"--max-mb {args.max_mb:g}: how much text to train on, more than 0")
    used = train_tokenizer(
        args.input,
        args.output,
        vocab_size=args.vocab_size,
        options=InputOptions((args.json_key,), args.input_format),
        max_bytes=int(args.max_mb * 1e6),
        mask_token=args.mask_token,
        pad_token=args.pad_token,
        overwrite=args.overwrite,
    )
    print(f"{args.output}: {args.vocab_size:,} ids, trained on {used}")
