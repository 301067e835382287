"""Starts a command of megatron_meap/commands; the tools in this folder differ only in its name."""

import importlib
import sys


def run(name: str) -> None:
    """Run a command; print one line if this Python does not have this project's packages."""
    try:
        from megatron_meap import errors
    except ModuleNotFoundError:
        print(
            f"error: {sys.executable} has no megatron_meap: `source .venv/bin/activate` in the checkout, after `make`",
            file=sys.stderr,
        )
        sys.exit(2)
    errors.run(lambda: importlib.import_module(f"megatron_meap.commands.{name}").main())
