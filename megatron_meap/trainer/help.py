"""`--help`: this project's flags first and short, Megatron's several hundred on request."""

import argparse

from megatron_meap.trainer.arguments import add_own_arguments

_MEGATRONS = "Megatron's own flags work as in its pretrain_gpt.py; --help-all lists them."


def show(everything: bool) -> None:
    """Print the help: our flags, and with `everything` Megatron's after them."""
    parser = argparse.ArgumentParser(
        prog="pretrain_gpt_meap.py",
        usage="torchrun --nproc_per_node N pretrain_gpt_meap.py [FLAGS]",
        description="Pretrain a GPT-style model with MEAP on Megatron's trainer. README.md shows a whole command.",
        epilog=None if everything else _MEGATRONS,
        allow_abbrev=False,
    )
    parser.add_argument("--help-all", action="store_true", help="show Megatron's flags as well, and exit")
    add_own_arguments(parser)
    if everything:
        from megatron.training.arguments import add_megatron_arguments

        add_megatron_arguments(parser)
        _escape_stray_percents(parser)
    parser.print_help()


def _escape_stray_percents(parser: argparse.ArgumentParser) -> None:
    """argparse formats help texts: that of `--moe-paged-stash-buffer-size-factor-cuda` (0.19) has a bare `%`."""
    for action in parser._actions:
        try:
            action.help is None or action.help % vars(action)
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")
