"""Turn text into a Megatron dataset (`.bin` and `.idx`), with a manifest next to it.

    python tools/preprocess_data.py --input corpus/train.jsonl --output-prefix data/train \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer/tokenizer.model --append-eod

The flags are those of Megatron-LM's tool of the same name, and a few more. See docs/data.md.
"""

import argparse
import re
import sys

from megatron_meap.errors import UsageError
from megatron_meap.flags import Parser
from megatron_meap.preprocessing.pipeline import Job, preprocess
from megatron_meap.preprocessing.readers import InputOptions
from megatron_meap.tokenization.reference import add_tokenizer_flags


def main() -> None:
    """Parse the flags and preprocess."""
    args = parse_args()
    if args.split_sentences:
        raise UsageError("--split-sentences: not supported; split the text beforehand, one sentence per line")
    manifests = preprocess(
        Job(
            inputs=args.input,
            output_prefix=args.output_prefix,
            options=InputOptions(tuple(args.json_keys), args.input_format, _unescaped(args.text_separator)),
            append_eod=args.append_eod,
            prepend_bos=args.prepend_bos,
            workers=args.workers,
            encoder=args.encoder,
            skip_bad_lines=args.skip_bad_lines,
            overwrite=args.overwrite,
            resume=args.resume,
            log_interval=args.log_interval,
        ),
        args,
    )
    for made in manifests:
        print(
            f"{made['dataset']}: {made['documents']:,} documents, {made['tokens']:,} tokens from "
            f"{made['text_bytes'] / 1e6:.1f} MB of text in {made['seconds']:.1f} s "
            f"({made['text_bytes'] / made['seconds'] / 1e6:.1f} MB/s)"
            + (f"; {made['empty_documents']:,} empty documents left out" if made["empty_documents"] else "")
        )
    if len(manifests) > 1 and any(made["empty_documents"] for made in manifests):
        print(
            "warning: a document that is empty under only one key is missing from that key's dataset, so documents "
            "with the same number do not correspond",
            file=sys.stderr,
        )
    if manifests[0]["skipped_lines"]:
        print(f"bad lines skipped: {manifests[0]['skipped_lines']:,}, see {args.output_prefix}.bad_lines.jsonl")


def parse_args() -> argparse.Namespace:
    """The tool's flags."""
    parser = Parser(__doc__)
    group = parser.add_argument_group("input")
    group.add_argument("--input", nargs="+", required=True, help="files, globs, folders, or - for standard input")
    group.add_argument("--input-format", choices=["jsonl", "text", "parquet"], help="default: recognised by content")
    group.add_argument("--json-keys", nargs="+", default=["text"], help="JSON keys or Parquet columns (default: text)")
    group.add_argument(
        "--text-separator", help="text that separates documents in plain text (default: each file is one document)"
    )
    group.add_argument("--skip-bad-lines", action="store_true", help="skip bad lines, count and report them")
    group.add_argument("--split-sentences", action="store_true", help="a flag of Megatron-LM's tool; refused here")
    group = parser.add_argument_group("output")
    group.add_argument("--output-prefix", required=True, help="each key gives PREFIX_KEY_document.bin and .idx")
    group.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    group.add_argument("--prepend-bos", action="store_true", help="begin every document with BOS")
    group.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    group.add_argument("--resume", action="store_true", help="continue an interrupted run after its last finished file")
    group = parser.add_argument_group("running")
    group.add_argument("--workers", type=int, help="number of processes (default: the number of cores, at most 8)")
    group.add_argument("--encoder", choices=["auto", "gigatoken", "reference"], default="auto")
    group.add_argument("--log-interval", type=int, help="documents between progress lines (default: every 5 seconds)")
    group.add_argument("--partitions", type=int, help="a flag of Megatron-LM's tool; has no effect here")
    group.add_argument("--keep-sequential-samples", action="store_true", help="likewise; the order is always kept")
    add_tokenizer_flags(parser)
    return parser.parse_args()


def _unescaped(separator: str | None) -> str | None:
    r"""A separator as typed, with \n, \r and \t for newline, carriage return and tab, and \\ for a backslash."""
    if separator is None:
        return None
    known = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\\": "\\"}
    return re.sub(r"\\[nrt\\]", lambda match: known[match.group()], separator)
