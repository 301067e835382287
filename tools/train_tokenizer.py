"""Train a SentencePiece tokenizer (byte-fallback BPE as Llama's, with [MASK] as a control symbol)."""

from megatron_meap.commands.train_tokenizer import main
from megatron_meap.errors import run

if __name__ == "__main__":
    run(main)
