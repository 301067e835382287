"""A run's tokenizer as a Hugging Face tokenizer that includes the mask token: the same ids for every text.

SentencePiece models (BPE, unigram), Hugging Face directories, Megatron's tiktoken files, GPT-2's vocab and merges.
"""

import base64
import copy
import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from megatron_meap.errors import UsageError, refusing
from megatron_meap.tokenization.fingerprint import ids_fingerprint, known_to_differ, tokenizer_fingerprint
from megatron_meap.tokenization.reference import SENTENCEPIECE_TYPES, around

# Kinds of pieces in a SentencePiece model.
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
BPE, UNIGRAM = 2, 1  # kinds of SentencePiece models


def moved(args: Namespace, path: str | None) -> Namespace:
    """The arguments of a run with its tokenizer at `path`, which may be a Hugging Face directory for any tokenizer."""
    if path is None:
        return args
    changed = copy.copy(args)
    changed.tokenizer_model = path
    if Path(path).is_dir() and args.tokenizer_type != "HuggingFaceTokenizer":
        changed.tokenizer_type = "HuggingFaceTokenizer"
        changed.meap_tokenizer_sha256 = changed.meap_tokenizer_ids = None  # of other files
    return changed


def tokenizer_of(args: Namespace) -> Any | None:
    """The Hugging Face form of the tokenizer that a run was trained with, including the mask token.

    Args:
        args: the arguments in a checkpoint.

    Returns:
        The tokenizer, or None for a run without one (`NullTokenizer`, mock data).

    Raises:
        UsageError: the file is missing, is not such a tokenizer, or its ids are not those of the weights.
    """
    if args.tokenizer_type == "NullTokenizer":
        return None
    tokenizer = _load(args)
    _fill_holes(tokenizer)
    add_mask_token(tokenizer, getattr(args, "meap_mask_token", "[MASK]"))
    _agree_with_training(tokenizer, args)
    tokenizer.chat_template = getattr(args, "meap_sft_template_text", None) or tokenizer.chat_template
    return tokenizer


def _load(args: Namespace) -> Any:
    """The tokenizer as it was before training, without a mask token unless it has one."""
    kind = args.tokenizer_type
    if kind == "GPT2BPETokenizer" and args.tokenizer_model is None:
        return _from_gpt2(args.vocab_file, args.merge_file)
    source = Path(args.tokenizer_model or "")
    if not source.exists() or source == Path():
        raise UsageError(f"tokenizer {source}: not found; say where it is with --tokenizer PATH")
    if source.is_dir() or source.name == "tokenizer.json":
        return load_directory(source if source.is_dir() else source.parent)
    with refusing(f"{source}: not a tokenizer of type {kind}"):
        if kind == "TikTokenizer":
            return _from_tiktoken(source, args)
        if kind in SENTENCEPIECE_TYPES:
            return from_sentencepiece(source)
    raise UsageError(
        f"{source}: a tokenizer of type {kind} cannot be exported from a file; "
        "give a Hugging Face tokenizer directory with --tokenizer"
    )


def load_directory(directory: Path) -> Any:
    """A tokenizer saved by transformers, loaded only from disk."""
    with refusing(f"{directory}: holds no Hugging Face tokenizer that can be loaded"):
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)


def _fill_holes(tokenizer: Any) -> None:
    """Give every id up to the largest a token: otherwise an added token gets a used id when it is loaded again."""
    used = tokenizer.get_vocab().values()
    holes = sorted(set(range(max(used))) - set(used))
    if not holes:
        return
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition["model"]["vocab"].update({f"<unused_{id}>": id for id in holes})
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(definition))


def add_mask_token(tokenizer: Any, text: str) -> int:
    """Make `text` the mask token, with the next id if the tokenizer has no such token; returns its id."""
    token = AddedToken(text, special=True, normalized=False)
    tokenizer.add_special_tokens({"mask_token": token})
    return tokenizer.convert_tokens_to_ids(text)


def _agree_with_training(tokenizer: Any, args: Namespace) -> None:
    """Refuse a tokenizer whose ids are not those that the weights were trained with."""
    trained = getattr(args, "meap_tokenizer_vocab_size", None)
    if trained is None:  # not trained by this project: only the padded size is known
        if len(tokenizer) > args.padded_vocab_size:
            raise UsageError(
                f"the tokenizer has {len(tokenizer)} tokens with the mask token, the weights {args.padded_vocab_size} "
                "rows: it is not the tokenizer that they were trained with"
            )
        return
    mask_id = args.meap_mask_token_id
    expected = max(trained, mask_id + 1)
    found = tokenizer.convert_tokens_to_ids(args.meap_mask_token)
    if (len(tokenizer), found) != (expected, mask_id):
        raise UsageError(
            f"the tokenizer has {len(tokenizer)} tokens and {args.meap_mask_token} as {found}, but the weights were "
            f"trained with {expected} and {mask_id}: it is not the tokenizer of this checkpoint"
        )
    recorded = getattr(args, "meap_tokenizer_sha256", None)
    if recorded and tokenizer_fingerprint(args) != recorded:
        raise UsageError(
            f"tokenizer {args.tokenizer_model or args.vocab_file}: has changed since the training; give the right one "
            "with --tokenizer"
        )
    if args.tokenizer_type == "HuggingFaceTokenizer":
        loaded = SimpleNamespace(library="huggingface", _tokenizer=SimpleNamespace(tokenizer=tokenizer))
        if known_to_differ(getattr(args, "meap_tokenizer_ids", None), ids_fingerprint(loaded)):
            raise UsageError(
                f"tokenizer {args.tokenizer_model}: gives different ids from those in training: its vocabulary is the "
                "same, but other settings have changed (tokenizer_config.json); give the right one with --tokenizer"
            )


def from_sentencepiece(path: Path) -> PreTrainedTokenizerFast:
    """Convert a SentencePiece model; text gets the same ids as from `encode_as_ids`."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(path.read_bytes())
    kind, bytes_too = proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback
    model: Any
    unknown = next((i for i, piece in enumerate(proto.pieces) if piece.type == 2), None)
    if kind == BPE:
        vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
        unknown_piece = None if unknown is None else proto.pieces[unknown].piece
        model = models.BPE(vocabulary, _merges(proto), unk_token=unknown_piece, fuse_unk=True, byte_fallback=bytes_too)
    elif kind == UNIGRAM:
        model = models.Unigram([(p.piece, p.score) for p in proto.pieces], unk_id=unknown, byte_fallback=bytes_too)
    else:
        raise UsageError(f"{path}: only BPE and unigram models of SentencePiece can be exported")
    backend = Tokenizer(model)
    backend.normalizer = _sentencepiece_normalizer(proto.normalizer_spec)
    backend.decoder = _sentencepiece_decoder(proto.normalizer_spec)
    backend.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL)
            for piece in proto.pieces
            if piece.type in (CONTROL, USER_DEFINED)
        ]
    )
    spec = proto.trainer_spec
    names = {"unk_token": unknown}
    for name, index in (("bos_token", spec.bos_id), ("eos_token", spec.eos_id), ("pad_token", spec.pad_id)):
        names[name] = index if 0 <= index < len(proto.pieces) else None
    known = {name: proto.pieces[index].piece for name, index in names.items() if index is not None}
    return _wrapped(backend, known)


def _merges(proto: Any) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE model, which stores only the pieces; best score first."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _sentencepiece_normalizer(spec: Any) -> Any:
    """What SentencePiece does to text before it splits it into pieces."""
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


def _sentencepiece_decoder(spec: Any) -> Any:
    """From pieces back to text."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _from_gpt2(vocab: str | None, merges: str | None) -> PreTrainedTokenizerFast:
    """GPT-2's byte-level BPE from its two files."""
    if not (vocab and merges and Path(vocab).is_file() and Path(merges).is_file()):
        raise UsageError(f"tokenizer {vocab}, {merges}: not found; give a Hugging Face directory with --tokenizer")
    return _byte_level(models.BPE.from_file(vocab, merges), None, {"eos_token": "<|endoftext|>"})


def _from_tiktoken(path: Path, args: Namespace) -> PreTrainedTokenizerFast:
    """Megatron's tiktoken file: a JSON list of byte strings by rank; the special tokens have the ids before them."""
    from megatron.core.tokenizers.text.libraries import tiktoken_tokenizer

    special = list(args.special_tokens or tiktoken_tokenizer.SPECIAL_TOKENS)
    count = args.tiktoken_num_special_tokens
    special += [tiktoken_tokenizer.SPECIAL_TOKEN_TEMPLATE.format(id=i) for i in range(len(special), count)]
    size = args.vocab_size or tiktoken_tokenizer.DEFAULT_TIKTOKEN_MAX_VOCAB
    ranked = [base64.b64decode(entry["token_bytes"]) for entry in json.loads(path.read_text())][: size - count]
    letters = bytes_to_unicode()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    ranks = {token: rank for rank, token in enumerate(ranked)}
    merges = [
        (rank, ranks[token[:cut]], ranks[token[cut:]], written(token[:cut]), written(token[cut:]))
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocabulary = {token: i for i, token in enumerate(special)}
    vocabulary |= {written(token): rank + count for token, rank in ranks.items()}
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    pattern = (
        tiktoken_tokenizer._PATTERN_TIKTOKEN_V1
        if args.tiktoken_pattern == "v1"
        else tiktoken_tokenizer._PATTERN_TIKTOKEN_V2
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    made = _byte_level(models.BPE(vocabulary, pairs, ignore_merges=True), pattern, names)
    made.add_tokens([AddedToken(token, normalized=False, special=True) for token in special], special_tokens=True)
    return made


def _byte_level(model: models.BPE, pattern: str | None, names: dict[str, str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE; without a pattern, words are split as GPT-2 does."""
    backend = Tokenizer(model)
    split: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), split])
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    return _wrapped(backend, names)


def _wrapped(backend: Tokenizer, names: dict[str, str]) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers with its special tokens, whose output (no token types) a Llama accepts."""
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, model_input_names=inputs, **names
    )


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text alone, taken literally: special tokens are neither parsed nor added."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def around_text(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that the tokenizer puts before and after every text, such as BOS and EOS."""
    return around(tokenizer("a")["input_ids"], plain_ids(tokenizer, "a"))


def begin_with_bos(tokenizer: Any) -> None:
    """Make the tokenizer put BOS before every text, for a model whose training documents began with it."""
    bos = tokenizer.bos_token
    if bos is None:
        raise UsageError("--add-bos-token: this tokenizer has no BOS token")
    if tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id:
        return
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )


def begin_without_bos(tokenizer: Any) -> None:
    """Make a tokenizer that puts BOS before every text leave it out; what it puts after a text stays."""
    before, after = around_text(tokenizer)
    if tokenizer.bos_token is None or before[:1] != (tokenizer.bos_token_id,):
        return
    names = tokenizer.convert_ids_to_tokens(list(after))
    single = " ".join(["$A", *names])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} $B", special_tokens=list(set(zip(names, after, strict=True)))
    )
    if getattr(tokenizer, "add_bos_token", None):
        tokenizer._add_bos_token = False
    tokenizer.init_kwargs["add_bos_token"] = False


def save_tokenizer(tokenizer: Any, directory: Path, max_length: int) -> None:
    """Save as files that transformers 4 and 5, vLLM and lm-eval can all load."""
    tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(str(directory))
    settings = directory / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    if content.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        content["tokenizer_class"] = "PreTrainedTokenizerFast"  # version 5's own name for it is unknown to version 4
        content.pop("backend", None)
        content.pop("is_local", None)
    settings.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    names = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    (directory / "special_tokens_map.json").write_text(json.dumps(names, indent=2, ensure_ascii=False) + "\n")
