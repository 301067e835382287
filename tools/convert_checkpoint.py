"""Convert checkpoints: from Megatron to Hugging Face (export), and from Hugging Face to Megatron (import)."""

import start

if __name__ == "__main__":
    start.run("convert_checkpoint")
