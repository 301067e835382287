"""A small Llama, trained in a minute to copy: after a token, predict what followed its earlier occurrence.

It is trained on random token sequences that are repeated, and never sees a key-value object.
"""

import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"{number:02x}" for number in range(256)]
CONTEXT = 256


def word_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Two hexadecimal digits are a token; punctuation is ignored; every other word is unknown."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(Regex("[^0-9a-zA-Z]+"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", model_max_length=CONTEXT
    )
    wrapped.save_pretrained(folder)
    return wrapped


def train_copy_model(folder: Path, steps: int = 600) -> None:
    """Train it on random sequences of distinct tokens that come again from a random place on, and save it."""
    torch.manual_seed(1)
    tokenizer = word_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        length = int(torch.randint(8, 40, ()))
        once = 2 + torch.stack([torch.randperm(len(WORDS))[:length] for _ in range(64)])
        again = torch.roll(once, -int(torch.randint(length, ())), dims=1)
        tokens = torch.cat([once, again], dim=1)
        labels = tokens.clone()
        labels[:, : length + 1] = -100
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder)


if __name__ == "__main__":  # a process of its own, without the CPU adaptation that tests/conftest.py installs
    torch.set_num_threads(1)
    for folder, steps in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        train_copy_model(Path(folder), int(steps))
