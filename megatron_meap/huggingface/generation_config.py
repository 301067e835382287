"""What ends a text and how texts are sampled, for the `generation_config.json` of an export and for generation."""

import contextlib
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_meap.records import read_json
from megatron_meap.sft.turns import TurnEncoder

_FILE = "generation_config.json"
_SHAPE = {"eos_token_id?": int | list | None, "suppress_tokens?": list | None}
_OF_TRANSFORMERS = {"transformers_version", "_from_model_config"}


def ending_ids(args: Namespace, tokenizer: Any) -> list[int]:
    """Tokens that end a text: EOS, those of the imported model, and the end of an answer in the fine-tuning template.

    Args:
        args: the arguments in a checkpoint, with the current place of the tokenizer.
        tokenizer: of transformers.
    """
    ids = [tokenizer.eos_token_id]
    if args.tokenizer_model is not None:
        ends = kept(Path(args.tokenizer_model)).get("eos_token_id", [])
        ids += ends if isinstance(ends, list) else [ends]
    if getattr(args, "meap_sft", False) and tokenizer.chat_template and tokenizer.eos_token_id is not None:
        ids.append(TurnEncoder(tokenizer, None).end)
    return [index for index in dict.fromkeys(ids) if index is not None]


def keep(model: Path, tokenizer: Path) -> None:
    """Copy a model's generation settings beside its tokenizer, where a later export finds them.

    Raises:
        UsageError: its generation config cannot be read.
    """
    if settings := kept(model):
        (tokenizer / _FILE).write_text(json.dumps(settings) + "\n")


def kept(folder: Path) -> dict[str, Any]:
    """A directory's generation config: how to sample, and EOS ids; without one, those in its config, as transformers.

    Raises:
        UsageError: it cannot be read.
    """
    for name in (_FILE, "config.json") if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):
            found = read_json(folder / name, _SHAPE, "correct it, or remove it")
            wanted = found.keys() - _OF_TRANSFORMERS if name == _FILE else {"eos_token_id"}
            return {key: value for key, value in found.items() if key in wanted and value is not None}
    return {}
