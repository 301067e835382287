"""What a start does not import, and its substitutes until it is used, in separate Python processes."""

import os
import subprocess
import sys
from pathlib import Path

from tests.launch import REPOSITORY, environment

PROGRAM = """
import sys
from megatron_meap import pretrain
sys.argv = ["pretrain_gpt_meap.py"]
with pretrain.nothing_is_garbage():
    pretrain._what_is_asked()
import torch
import importlib.util
assert importlib.util.find_spec("torch._dynamo")

# an optimizer, whose every method says what shall not be compiled
parameter = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.AdamW([parameter])
parameter.sum().backward()
optimizer.step()
heavy = ("transformers", "wandb", "torch._dynamo.eval_frame", "lm_eval", "matplotlib", "pyarrow")
print("imported:", [name for name in heavy if name in sys.modules])

from megatron.core import timers
from megatron.core.tokenizers.text.libraries import huggingface_tokenizer, sft_tokenizer, chat_template
import wandb, transformers
assert timers.wandb == wandb and timers.wandb != torch and timers.wandb.__name__ == "wandb"
assert sft_tokenizer.transformers.AutoTokenizer is transformers.AutoTokenizer
assert chat_template._compile_jinja_template("{{ 1 + 1 }}").render() == "2"
tokenizer = huggingface_tokenizer.HuggingFaceTokenizer(sys.orig_argv[-1])
assert tokenizer.text_to_ids("b a") == [1, 0], tokenizer.text_to_ids("b a")

assert torch._dynamo.config.recompile_limit > 0  # the compiler itself, once something is asked of it
import torch._dynamo.eval_frame
assert torch._dynamo is sys.modules["torch._dynamo"] and torch._dynamo.__file__
optimizer.step()
print("and works")
"""


def test_a_start_imports_no_package_that_it_does_not_use_and_what_stands_in_imports_it(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(str(tmp_path))

    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | environment(), cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.splitlines()[-2:] == ["imported: []", "and works"], done.stdout + done.stderr
