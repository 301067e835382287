"""What ends a text, for the `generation_config.json` of an export and for generation itself."""

import contextlib
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_meap.sft.turns import TurnEncoder

_FILE = "generation_config.json"


def ending_ids(args: Namespace, tokenizer: Any) -> list[int]:
    """Tokens that end a text: EOS, those of the imported model, and what ends an answer in the template of fine-tuning.

    Args:
        args: the arguments in a checkpoint, with the place where the tokenizer is now.
        tokenizer: of transformers.
    """
    ids = [tokenizer.eos_token_id]
    if args.tokenizer_model is not None:
        ids += _kept(Path(args.tokenizer_model))
    if getattr(args, "meap_sft", False) and tokenizer.chat_template and tokenizer.eos_token_id is not None:
        ids.append(TurnEncoder(tokenizer, None).end)
    return [index for index in dict.fromkeys(ids) if index is not None]


def keep_endings(model: Path, tokenizer: Path) -> None:
    """Put a model's own list of EOS ids beside its tokenizer, where a later export finds it."""
    if ids := _kept(model):
        (tokenizer / _FILE).write_text(json.dumps({"eos_token_id": ids}) + "\n")


def _kept(folder: Path) -> list[int]:
    """EOS ids in a directory's generation config, or in its config, where transformers looks without one."""
    for name in (_FILE, "config.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            ids = json.loads((folder / name).read_text()).get("eos_token_id")
            return [each for each in (ids if isinstance(ids, list) else [ids]) if isinstance(each, int)]
    return []
