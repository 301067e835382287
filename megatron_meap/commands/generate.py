"""Continue a text with a trained model: a Megatron checkpoint of any layout, or a Hugging Face directory.

    python tools/generate.py --load runs/demo/checkpoints --prompt "Returns the"

Without --prompt or --prompt-file it asks for prompts until the end of input (Ctrl-D).
"""

import argparse
import logging
import os
import sys
import warnings
from dataclasses import replace

from megatron_meap.errors import UsageError, refuse, refusing
from megatron_meap.flags import Parser


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--load", required=True, help="checkpoint directory, as given to --save, or Hugging Face directory"
    )
    parser.add_argument("--ckpt-step", type=int, metavar="N", help="iteration of the checkpoint (default: the latest)")
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer file or directory (default: the model's own)")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", action="append", help="text to continue; may be repeated")
    text.add_argument("--prompt-file", help="file with one prompt per line; - is standard input")
    parser.add_argument(
        "--chat", action="store_true", help="prompt in the tokenizer's chat template; each prompt continues the chat"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message of the chat")
    parser.add_argument(
        "--num-samples", type=int, default=1, metavar="N", help="number of texts per prompt (default: 1)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=100, help="length of a continuation (default %(default)s)"
    )
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token, like --temperature 0")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1 is more cautious (default %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="sample only among the k likeliest tokens (default: all)")
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="sample only among the likeliest tokens that together have this probability",
    )
    parser.add_argument("--seed", type=int, help="seed for reproducible sampling")
    parser.add_argument("--no-stream", action="store_true", help="print each text only when it is complete")
    return parser.parse_args()


def prompts(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    """The prompts: from the flags, from a file, or from the keyboard, one at a time."""
    if args.prompt is not None:
        yield from args.prompt
        return
    if args.prompt_file is None or args.prompt_file == "-":
        lines = sys.stdin
    else:
        with refusing(f"--prompt-file {args.prompt_file}: cannot be read", OSError):
            lines = open(args.prompt_file, encoding="utf-8")  # noqa: SIM115
    ask = args.prompt_file is None and sys.stdin.isatty()
    while True:
        if ask:
            print("prompt> ", end="", flush=True)
        try:
            line = lines.readline()
        except UnicodeDecodeError as error:
            raise UsageError(f"--prompt-file {args.prompt_file or '-'}: not UTF-8 text ({error.reason})") from error
        if not line:
            return
        yield line.rstrip("\n")


def main() -> None:
    """Load the model, then continue every prompt."""
    args = parse_flags()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")  # the libraries' chatter: what matters is printed or raised
    logging.disable(logging.WARNING)
    from transformers.utils.logging import disable_progress_bar

    from megatron_meap.huggingface.generation import Generator, Sampling

    disable_progress_bar()
    sampling = Sampling(
        args.max_new_tokens, 0.0 if args.greedy else args.temperature, args.top_k, args.top_p, args.seed
    )
    flag, greedy = f"--num-samples {args.num_samples}", sampling.temperature == 0
    refuse(
        (args.num_samples < 1, f"{flag}: must be at least 1"),
        (args.num_samples > 1 and greedy, f"{flag}: greedily chosen texts are all the same; drop one of the two"),
        (args.system and not args.chat, "--system: belongs to a chat; add --chat"),
    )
    generator = Generator(args.load, args.ckpt_step, args.tokenizer)
    messages: list[dict[str, str]] = [{"role": "system", "content": args.system}] if args.system else []
    for prompt in prompts(args):
        if args.chat:
            messages.append({"role": "user", "content": prompt})
        for number in range(args.num_samples):
            chosen = sampling if args.seed is None else replace(sampling, seed=args.seed + number)
            if args.chat:
                text = generator.answer(messages, chosen, stream=not args.no_stream)
            else:
                text = generator.generate(prompt, chosen, stream=not args.no_stream)
            if args.no_stream:
                print(text, flush=True)
        if args.chat:
            messages.append({"role": "assistant", "content": text})
