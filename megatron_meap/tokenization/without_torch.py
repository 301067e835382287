"""Hugging Face tokenizers without PyTorch and Megatron, whose imports cost preprocessing seconds and hundreds of MB.

Only transformers can interpret a folder: some of its classes rebuild what is in tokenizer.json. So a short-lived
process, from which PyTorch is hidden, loads it as Megatron does, and passes on the result, which needs only the library
`tokenizers`. The process takes almost two seconds; a folder like Llama 3's, whose tokenizer.json transformers uses
unchanged, does not need it.
"""

import argparse
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson

from megatron_meap.errors import UsageError, one_line

_SPECIAL = {"bos": "bos_token", "eod": "eos_token", "unk": "unk_token", "pad": "pad_token"}
_SUBSTITUTES = {"sep_token": "eos_token", "eos_token": "sep_token", "bos_token": "cls_token", "cls_token": "bos_token"}
"""What Megatron adds: one of two names for the same role replaces the other."""

_TAKEN_AS_IT_IS = {"PreTrainedTokenizerFast", "TokenizersBackend"}
_NAMES = {*_SPECIAL.values(), *_SUBSTITUTES, "mask_token"}
_UNDERSTOOD = {*_NAMES, "tokenizer_class", "added_tokens_decoder"} | {
    *("backend", "chat_template", "clean_up_tokenization_spaces", "model_input_names", "model_max_length")
}
_OTHER_FILES = ("added_tokens.json", "tokenizer.*.json", "tekken.json", "*.model", "*.tiktoken")


class FastModel:
    """The part of a transformers tokenizer that preprocessing needs."""

    def __init__(self, definition: bytes, split_special_tokens: bool = False) -> None:
        """From the contents of a tokenizer.json, and whether special tokens in a text are text."""
        from tokenizers import Tokenizer

        self.definition = definition
        self._split_special_tokens = split_special_tokens
        self.backend_tokenizer = Tokenizer.from_buffer(definition)
        self.padded = self.backend_tokenizer.padding is not None
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        self.get_vocab = cache(self.backend_tokenizer.get_vocab)

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """The added tokens by id."""
        return self.backend_tokenizer.get_added_tokens_decoder()

    def __call__(self, text: str) -> dict[str, list[int]]:
        """Ids of a text, with those that the post-processor adds."""
        self.backend_tokenizer.encode_special_tokens = self._split_special_tokens
        return {"input_ids": self.backend_tokenizer.encode(text).ids}

    def plain(self, text: str) -> list[int]:
        """Ids of only the text, in which special tokens are text."""
        self.backend_tokenizer.encode_special_tokens = True
        return self.backend_tokenizer.encode(text, add_special_tokens=False).ids


def load(args: argparse.Namespace) -> Any | None:
    """A stand-in for Megatron's `HuggingFaceTokenizer`; None if only Megatron can load it.

    Raises:
        UsageError: the folder holds no tokenizer.
    """
    if args.trust_remote_code or args.vocab_file or args.merge_file:
        return None
    additional = args.special_tokens or []
    found = (None if additional else _read(Path(args.tokenizer_model))) or _made_apart(args.tokenizer_model, additional)
    if found is None:
        return None
    model, special = found
    return SimpleNamespace(
        library="huggingface",
        _tokenizer=SimpleNamespace(tokenizer=model),
        vocab_size=model.backend_tokenizer.get_vocab_size(),
        detokenize=lambda ids: model.backend_tokenizer.decode(ids, skip_special_tokens=False),
        **special,
    )


def _read(folder: Path) -> tuple[FastModel, dict[str, int | None]] | None:
    """A folder's tokenizer and its special ids, from the files alone.

    None where they say anything else that transformers may act on, or where it explains better what is wrong.
    """
    if any(found for pattern in _OTHER_FILES for found in folder.glob(pattern)):
        return None
    try:
        settings, model, map_ = (
            orjson.loads(path.read_bytes()) if (path := folder / name).exists() else {}
            for name in ("tokenizer_config.json", "config.json", "special_tokens_map.json")
        )
        tokenizer = FastModel((folder / "tokenizer.json").read_bytes())
        added = {token.content: (id, token) for id, token in tokenizer.added_tokens_decoder.items()}
        listed = settings.get("added_tokens_decoder")
        names = {name: value for name in _NAMES if (value := settings.get(name)) is not None}
        for one, other in _SUBSTITUTES.items():
            if one not in names and other in names:
                names[one] = names[other]
        if (
            settings["tokenizer_class"] not in _TAKEN_AS_IT_IS
            or model.get("model_type", "llama") != "llama"
            or not settings.keys() <= _UNDERSTOOD
            or tokenizer.padded
            or not all(_is_same(token, int(id), added) for id, token in (listed or {}).items())
            or (listed is None and not map_.items() <= settings.items())  # it is read only then
            or not all(added[name][1].special for name in names.values())
        ):
            return None
    except Exception:  # `tokenizers` knows no other
        return None
    return tokenizer, {name: added[names[each]][0] if each in names else None for name, each in _SPECIAL.items()}


def _is_same(token: dict[str, Any], id: int, added: dict[str, tuple[int, Any]]) -> bool:
    """Whether a token of the configuration is the one that tokenizer.json has."""
    return (id, token) == (added[token["content"]][0], added[token["content"]][1].__getstate__())


def _made_apart(path: str, additional: list[str]) -> tuple[FastModel, dict[str, int | None]] | None:
    """`made`, in a separate process."""
    command = [sys.executable, "-P", "-m", "megatron_meap.tokenization.without_torch", path, *additional]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        [reason] = ended.stderr.strip().splitlines()[-1:] or [f"ended with status {ended.returncode}"]
        if not Path(path).exists():
            raise UsageError(
                f"--tokenizer-model {path}: no such folder here, nor a name that the Hugging Face hub or its cache "
                f"gives; fetch its files where there is a connection, and name their folder ({reason})"
            )
        raise UsageError(f"{path}: not a tokenizer of --tokenizer-type HuggingFaceTokenizer: {reason}")
    return of(json.loads(ended.stdout))


def of(found: dict[str, Any] | None) -> tuple[FastModel, dict[str, int | None]] | None:
    """The tokenizer and its special ids out of what `made` returns."""
    if found is None:
        return None
    return FastModel(found["definition"].encode(), found["split_special_tokens"]), found["special"]


def made(path: str, additional: list[str]) -> dict[str, Any] | None:
    """The parts of Megatron's `HuggingFaceTokenizer`; None for one written in Python, which has no such form."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    if not hasattr(tokenizer, "backend_tokenizer"):
        return None
    missing: dict[str, Any] = {"additional_special_tokens": additional}
    for one, other in _SUBSTITUTES.items():
        if getattr(tokenizer, one) is None and getattr(tokenizer, other):
            missing[one] = getattr(tokenizer, other)
    tokenizer.add_special_tokens(missing)
    named = {name: getattr(tokenizer, attribute) for name, attribute in _SPECIAL.items()}
    return {
        "definition": tokenizer.backend_tokenizer.to_str(),
        "split_special_tokens": tokenizer.split_special_tokens,
        "special": {
            name: None if token is None else tokenizer.convert_tokens_to_ids(token) for name, token in named.items()
        },
    }


if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]  # makes its import fail
    try:
        print(json.dumps(made(sys.argv[1], sys.argv[2:])))
    except Exception as error:  # a library may raise anything for a folder that is not its own
        sys.exit(one_line(error))
