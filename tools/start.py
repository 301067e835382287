"""Starts a command of megatron_meap/commands; the tools beside this file differ in nothing but its name."""

import importlib
import sys


def run(name: str) -> None:
    """Run a command; one line where this Python has none of this project's packages."""
    try:
        from megatron_meap import errors
    except ModuleNotFoundError:
        print(
            f"error: {sys.executable} has no megatron_meap: `source .venv/bin/activate` in the checkout, after `make`",
            file=sys.stderr,
        )
        sys.exit(2)
    errors.run(lambda: importlib.import_module(f"megatron_meap.commands.{name}").main())
