"""Continue a text with a trained model: a Megatron checkpoint of any layout, or a Hugging Face directory."""

from megatron_meap.commands.generate import main
from megatron_meap.errors import run

if __name__ == "__main__":
    run(main)
