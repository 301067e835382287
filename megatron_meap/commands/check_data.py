"""Verify a dataset against its manifest, and print statistics of it.

    python tools/check_data.py --data data/train_text_document

With the tokenizer's flags (--tokenizer-type, --tokenizer-model, ...) it also compares the tokenizer with the manifest's
and prints a few decoded samples.
"""

from megatron_meap.errors import UsageError
from megatron_meap.flags import Parser
from megatron_meap.preprocessing.manifest import check_manifest
from megatron_meap.preprocessing.statistics import Statistics, inspect, read_documents
from megatron_meap.tokenization.fingerprint import ids_fingerprint, tokenizer_fingerprint
from megatron_meap.tokenization.reference import add_tokenizer_flags, load_reference


def main() -> None:
    """Parse the flags and check each dataset."""
    parser = Parser(__doc__)
    parser.add_argument("--data", nargs="+", required=True, help="datasets, without .bin or .idx")
    parser.add_argument("--samples", type=int, default=3, help="documents to decode (default: 3)")
    add_tokenizer_flags(parser, required=False)
    args = parser.parse_args()
    if args.samples < 0:
        raise UsageError(f"--samples {args.samples}: at least 0")
    reference = load_reference(args) if args.tokenizer_type else None
    for prefix in args.data:
        statistics, manifest = inspect(prefix)
        if reference:
            check_manifest(
                prefix,
                tokenizer_sha256=tokenizer_fingerprint(args),
                tokenizer_ids=ids_fingerprint(reference.tokenizer),
                vocab_size=reference.vocab_size,
                special={"bos": reference.bos, "eod": reference.eod},
            )
            if not manifest and len(statistics.counts) > reference.vocab_size:
                raise UsageError(f"{prefix}: holds ids up to {len(statistics.counts) - 1}: made with another tokenizer")
        print(f"{prefix}: " + ("as its manifest says" if manifest else "whole; no manifest to compare with"))
        known = manifest["tokenizer"] if manifest else {}
        special = {name: getattr(reference, name) if reference else known.get(name) for name in ("bos", "eod", "unk")}
        print_statistics(statistics, special)
        if reference:
            for number, ids in read_documents(prefix, args.samples):
                print(f"  document {number}: {reference.tokenizer.detokenize(ids[:60].tolist())!r}")


def print_statistics(statistics: Statistics, special: dict[str, int | None]) -> None:
    """Print the numbers of one dataset."""
    shortest, mean, longest = statistics.lengths
    print(f"  {statistics.documents:,} documents, {statistics.tokens:,} tokens")
    print(f"  document lengths: {shortest:,} to {longest:,} tokens, {mean:,.1f} on average")
    widest = max(count for _, _, count in statistics.histogram)
    for low, high, count in statistics.histogram:
        print(f"  {low:>11,} - {high:<11,} {count:>12,} {'#' * max(1, round(40 * count / widest))}")
    used = int((statistics.counts > 0).sum())
    print(f"  ids: {used:,} different, the largest {len(statistics.counts) - 1:,}")
    for name, label in (("bos", "BOS"), ("eod", "EOD"), ("unk", "unknown")):
        if special[name] is not None:
            found = statistics.count(special[name])
            print(f"  {label} (id {special[name]}): {found:,}, {100 * found / statistics.tokens:.3f}% of the tokens")
