"""Turn text into a Megatron dataset (`.bin` and `.idx`), with a manifest beside it."""

from megatron_meap.commands.preprocess_data import main
from megatron_meap.errors import run

if __name__ == "__main__":
    run(main)
