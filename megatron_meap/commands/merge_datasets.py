"""Merge datasets into one, their documents one after the other.

    python tools/merge_datasets.py --input data/a_text_document data/b_text_document --output-prefix data/all

Datasets made with different tokenizers or flags are refused, as far as their manifests say.
"""

from megatron_meap.flags import Parser
from megatron_meap.preprocessing.merge import find_datasets, merge_datasets


def main() -> None:
    """Parse the flags and merge."""
    parser = Parser(__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="datasets (without .bin or .idx), or folders of them")
    parser.add_argument("--output-prefix", required=True, help="the merged dataset, without .bin or .idx")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    args = parser.parse_args()
    prefixes = find_datasets(args.input, args.output_prefix)
    manifest = merge_datasets(prefixes, args.output_prefix, overwrite=args.overwrite)
    if manifest:
        print(f"{args.output_prefix}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens")
    else:
        print(f"{args.output_prefix}: merged, without a manifest: not all of the {len(prefixes)} inputs have one")
