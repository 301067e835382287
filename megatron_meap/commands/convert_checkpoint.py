"""Convert checkpoints: from Megatron to Hugging Face (export), and from Hugging Face to Megatron (import).

    python tools/convert_checkpoint.py export --load runs/demo/checkpoints --output exported/demo
    python tools/convert_checkpoint.py import --load models/Llama-3.2-1B --output checkpoints/llama

One process, on CPU. Each direction checks itself: both models are loaded and their logits compared.
"""

import argparse
import logging
import os
import warnings

from megatron_meap.flags import Parser


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    directions = parser.add_subparsers(dest="direction", required=True, metavar="export|import")
    export = directions.add_parser(
        "export", help="convert a torch_dist checkpoint of any layout to a Hugging Face directory"
    )
    export.add_argument("--load", required=True, metavar="DIR", help="checkpoint directory, as given to --save")
    export.add_argument("--ckpt-step", type=int, metavar="N", help="iteration (default: the latest)")
    export.add_argument(
        "--add-bos-token",
        action=argparse.BooleanOptionalAction,
        help="let the tokenizer put BOS before every text (default: on if the training documents began with BOS)",
    )
    export.add_argument(
        "--max-shard-size", default="2GB", metavar="SIZE", help="maximum size of a file (default: %(default)s)"
    )
    back = directions.add_parser(
        "import", help="convert a Hugging Face directory to a checkpoint that any layout can load"
    )
    back.add_argument("--load", required=True, metavar="DIR", help="Hugging Face directory (Llama, Qwen2, Mistral)")
    back.add_argument("--mask-token", default="[MASK]", metavar="TEXT", help="mask token (default %(default)s)")
    back.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        default=128,
        metavar="N",
        help="pad the vocabulary to a multiple of this; tensor-parallel sizes must divide it (default: %(default)s)",
    )
    back.add_argument("--seed", type=int, default=1234, help="seed for the rows of new tokens (default: %(default)s)")
    for direction in (export, back):
        direction.add_argument("--output", required=True, metavar="DIR", help="directory to write")
        direction.add_argument("--tokenizer", metavar="PATH", help="tokenizer file or directory (default: as recorded)")
        direction.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
        direction.add_argument("--overwrite", action="store_true", help="replace an earlier output")
        direction.add_argument("--no-check", action="store_true", help="do not compare the two models")
    return parser.parse_args()


def main() -> None:
    """Convert."""
    flags = parse_flags()
    os.environ["MEAP_DEVICE"] = "cpu"  # GPUs may be in use by others
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")  # the libraries' chatter: what matters is printed or raised
    logging.disable(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar

    from megatron_meap.backend import device

    device.prepare()
    disable_progress_bar()
    common = {name: getattr(flags, name) for name in ("load", "output", "tokenizer", "dtype", "overwrite")}
    common["check"] = not flags.no_check
    if flags.direction == "export":
        from megatron_meap.huggingface.export import ExportJob, export

        export(
            ExportJob(
                **common, iteration=flags.ckpt_step, add_bos=flags.add_bos_token, max_shard_size=flags.max_shard_size
            )
        )
    else:
        from megatron_meap.huggingface.importer import ImportJob, import_model

        import_model(
            ImportJob(
                **common, mask_token=flags.mask_token, seed=flags.seed, divisible_by=flags.make_vocab_size_divisible_by
            )
        )
