"""Gather real text from this machine (Python's documentation, docstrings and library sources) as JSON Lines."""

from megatron_meap.commands.build_corpus import main
from megatron_meap.errors import run

if __name__ == "__main__":
    run(main)
