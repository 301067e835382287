"""Convert checkpoints: from Megatron to Hugging Face (export), and from Hugging Face to Megatron (import)."""

from megatron_meap.commands.convert_checkpoint import main
from megatron_meap.errors import run

if __name__ == "__main__":
    run(main)
