"""Train a SentencePiece tokenizer (byte-fallback BPE as Llama's, with [MASK] as a control symbol)."""

import start

if __name__ == "__main__":
    start.run("train_tokenizer")
