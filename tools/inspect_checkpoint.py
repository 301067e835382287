"""Show what decided the run of a checkpoint, compare two, verify the files."""

from megatron_meap.commands.inspect_checkpoint import main
from megatron_meap.errors import run

if __name__ == "__main__":
    run(main)
