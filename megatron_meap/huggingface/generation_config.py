"""What ends a text, for the `generation_config.json` of an export and for generation itself."""

from argparse import Namespace
from typing import Any

from megatron_meap.sft.turns import TurnEncoder


def ending_ids(args: Namespace, tokenizer: Any) -> list[int]:
    """Tokens that end a text: EOS, and what ends an answer in the chat template that the model was fine-tuned with."""
    ids = [tokenizer.eos_token_id]
    if getattr(args, "meap_sft", False) and tokenizer.chat_template and tokenizer.eos_token_id is not None:
        ids.append(TurnEncoder(tokenizer, None).end)
    return [index for index in dict.fromkeys(ids) if index is not None]
