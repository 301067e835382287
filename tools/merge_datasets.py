"""Merge datasets into one, their documents one after the other."""

from megatron_meap.commands.merge_datasets import main
from megatron_meap.errors import run

if __name__ == "__main__":
    run(main)
