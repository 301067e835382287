"""Verify a dataset against its manifest, and print what is in it."""

from megatron_meap.commands.check_data import main
from megatron_meap.errors import run

if __name__ == "__main__":
    run(main)
