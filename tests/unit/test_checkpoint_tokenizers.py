"""Tokenizers of training runs as Hugging Face tokenizers: the same ids, and the mask token in its place."""

import base64
import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_meap.errors import UsageError
from megatron_meap.huggingface.selfcheck import SAMPLES
from megatron_meap.huggingface.training_data import trained_tokenizer
from megatron_meap.tokenization.fingerprint import ids_fingerprint, tokenizer_fingerprint
from megatron_meap.tokenization.huggingface import (
    add_mask_token,
    begin_with_bos,
    from_sentencepiece,
    moved,
    save_tokenizer,
    tokenizer_of,
)
from megatron_meap.tokenization.reference import load_reference
from megatron_meap.tokenization.text_bytes import text_bytes
from tests.conftest import Corpus
from tests.unit.preprocessing import tokenizer_args, write_manifest

KINDS = {
    "bpe": {"model_type": "bpe", "byte_fallback": True, "control_symbols": ["[MASK]"]},
    "bpe-as-trained-here": {
        "model_type": "bpe",
        "byte_fallback": True,
        "split_digits": True,
        "control_symbols": ["[MASK]"],
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    },
    "bpe-without-bytes": {"model_type": "bpe", "byte_fallback": False},
    "unigram": {"model_type": "unigram", "byte_fallback": True},
    "bpe-no-prefix": {"model_type": "bpe", "add_dummy_prefix": False, "user_defined_symbols": ["<usr>"]},
}


def arguments(kind: str, model: str, tokens: int, mask_id: int) -> Namespace:
    """What a checkpoint says about its tokenizer."""
    return Namespace(
        tokenizer_type=kind, tokenizer_model=model, vocab_file=None, merge_file=None, meap_mask_token="[MASK]",
        meap_tokenizer_vocab_size=tokens, meap_mask_token_id=mask_id, padded_vocab_size=1024, data_path=None,
    )  # fmt: skip


class Megatrons:
    """The part of Megatron's tokenizer that is needed to count bytes."""

    def __init__(self, library: str, inner: object) -> None:
        self.library, self._tokenizer = library, Namespace(tokenizer=inner)


@pytest.fixture(scope="module")
def trained(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Trains a SentencePiece model of one of the kinds."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    text = folder / "text.txt"
    text.write_text("\n".join(corpus.documents[:40]))

    def train(kind: str) -> Path:
        prefix = folder / kind
        if not prefix.with_suffix(".model").exists():
            sentencepiece.SentencePieceTrainer.train(
                input=str(text), model_prefix=str(prefix), vocab_size=420, num_threads=1, minloglevel=2, **KINDS[kind]
            )
        return prefix.with_suffix(".model")

    return train


@pytest.mark.parametrize("kind", KINDS)
def test_sentencepiece_gives_the_same_ids(trained: Callable[[str], Path], corpus: Corpus, kind: str) -> None:
    """For real documents and awkward texts, and back to the same text."""
    path = trained(kind)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = from_sentencepiece(path)
    assert len(tokenizer) == reference.get_piece_size()
    literal = SAMPLES[1] if kind.startswith("bpe") else ""  # unigram models look for all pieces, special ones too
    for text in [*corpus.documents[40:60], *SAMPLES[2:], SAMPLES[0], literal, "", " ", "\n\n x"]:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == reference.encode(text)
        if reference.unk_id() not in ids:
            assert tokenizer.decode(ids) == reference.decode(ids)
            size = len(reference.decode(ids).encode())
            for table in (text_bytes(tokenizer), text_bytes(Megatrons("sentencepiece", reference))):
                assert table[ids].sum() - size in (0, 1)  # the space before the text is none of it
    assert text_bytes(tokenizer)[tokenizer.all_special_ids].sum() == 0


def test_mask_token_is_kept_or_appended(trained: Callable[[str], Path], tmp_path: Path) -> None:
    """A control symbol stays where it is; without one the mask token is the next id. Text never becomes it."""
    for kind, tokens in (("bpe", 420), ("bpe-without-bytes", 421)):
        path = trained(kind)
        known = sentencepiece.SentencePieceProcessor(model_file=str(path)).piece_to_id("[MASK]")
        mask_id = known if kind == "bpe" else 420
        tokenizer = tokenizer_of(arguments("SentencePieceTokenizer", str(path), 420, mask_id))
        save_tokenizer(tokenizer, tmp_path / kind, 128)
        loaded = AutoTokenizer.from_pretrained(tmp_path / kind)
        assert (len(loaded), loaded.mask_token_id, loaded.model_max_length) == (tokens, mask_id, 128)
        assert mask_id in loaded.all_special_ids
        assert loaded("a").keys() == {"input_ids", "attention_mask"}
        assert mask_id not in loaded("a [MASK] b", split_special_tokens=True)["input_ids"]
        saved = json.loads((tmp_path / kind / "tokenizer_config.json").read_text())
        assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"  # a name that transformers 4 knows too


def test_bos_before_every_text(trained: Callable[[str], Path], tmp_path: Path) -> None:
    """The export adds BOS because the documents of the training data began with it."""
    tokenizer = from_sentencepiece(trained("bpe"))
    assert tokenizer("x")["input_ids"][0] != tokenizer.bos_token_id
    begin_with_bos(tokenizer)
    save_tokenizer(tokenizer, tmp_path, 128)
    ids = AutoTokenizer.from_pretrained(tmp_path)("x")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[1:] == tokenizer("x", add_special_tokens=False)["input_ids"]


def test_bos_as_the_manifest_of_the_data_says(trained: Callable[[str], Path], tmp_path: Path) -> None:
    """By default as in training; the flag overrides it."""
    path = trained("bpe")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    args = arguments("SentencePieceTokenizer", str(path), 420, processor.piece_to_id("[MASK]"))
    write_manifest(tmp_path / "data", before_document=[processor.bos_id()], tokens=5)
    args.data_path = ["1.0", str(tmp_path / "data")]

    def begins(add_bos: bool | None) -> bool:
        return trained_tokenizer(args, add_bos)("x")["input_ids"][0] == processor.bos_id()  # type: ignore[misc]

    assert begins(None)
    assert not begins(False)
    args.data_path = None
    assert not begins(None)
    assert begins(True)


def test_tokenizer_that_has_moved_or_changed(trained: Callable[[str], Path], tmp_path: Path) -> None:
    """Another place for the same file is fine, another file is not; a converted directory is compared by its ids."""
    path = trained("bpe")
    mask_id = sentencepiece.SentencePieceProcessor(model_file=str(path)).piece_to_id("[MASK]")
    args = arguments("SentencePieceTokenizer", str(path), 420, mask_id)
    args.meap_tokenizer_sha256 = tokenizer_fingerprint(args)
    args.tokenizer_model = "gone.model"
    with pytest.raises(UsageError, match="--tokenizer PATH"):
        tokenizer_of(args)
    tokenizer = tokenizer_of(moved(args, str(path)))
    save_tokenizer(tokenizer, tmp_path, 128)
    assert tokenizer_of(moved(args, str(tmp_path))).get_vocab() == tokenizer.get_vocab()  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="has changed since the training"):
        tokenizer_of(moved(args, str(trained("bpe-as-trained-here"))))


def test_huggingface_directory(huggingface_folder: Path) -> None:
    """The mask token comes after the others."""
    tokenizer = tokenizer_of(arguments("HuggingFaceTokenizer", str(huggingface_folder), 600, 600))
    assert len(tokenizer) == 601
    assert tokenizer.mask_token_id == 600
    for text in SAMPLES:
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert text_bytes(tokenizer)[ids].sum() == len(text.encode())
    assert text_bytes(tokenizer)[tokenizer.all_special_ids].sum() == 0


def test_settings_beside_the_vocabulary_are_those_of_the_training(huggingface_folder: Path, tmp_path: Path) -> None:
    """With the same tokenizer.json, another list of added tokens is another tokenizer; a chat template is not."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(huggingface_folder, folder)
    known = tokenizer_args("HuggingFaceTokenizer", tokenizer_model=str(folder))
    args = arguments("HuggingFaceTokenizer", str(folder), 600, 600)
    args.meap_tokenizer_sha256 = tokenizer_fingerprint(known)
    args.meap_tokenizer_ids = ids_fingerprint(load_reference(known).tokenizer)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({"chat_template": "{{ messages }}", **dict(reversed(settings.items()))}))
    vocabulary = tokenizer_of(args).get_vocab()  # type: ignore[union-attr]
    assert len(vocabulary) == 601
    piece = max((piece for piece in vocabulary if piece.isalpha() and piece.isascii()), key=len)
    ordinary = {"content": piece, **dict.fromkeys(("special", "normalized", "lstrip", "rstrip", "single_word"), False)}
    path.write_text(json.dumps(settings | {"added_tokens_decoder": {str(vocabulary[piece]): ordinary}}))
    assert tokenizer_fingerprint(known) == args.meap_tokenizer_sha256
    with pytest.raises(UsageError, match="gives different ids from those in training"):
        tokenizer_of(args)


def test_tiktoken(tmp_path: Path) -> None:
    """Megatron's tiktoken file: special tokens first, then the ranks; the mask token after them."""
    from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import TikTokenTokenizer

    words = [bytes([byte]) for byte in range(256)] + [b"th", b"he", b"the", b" the", b"in", b"ing", "ü".encode(), b" w"]
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": word.decode("utf-8", "replace")}
        for rank, word in enumerate(words)
    ]
    path = tmp_path / "tiktoken.json"
    path.write_text(json.dumps(entries))
    count = 20 + len(words)
    reference = TikTokenTokenizer(str(path), num_special_tokens=20, vocab_size=count)
    args = arguments("TikTokenizer", str(path), count, count)
    args.special_tokens, args.tiktoken_num_special_tokens, args.tiktoken_pattern = None, 20, None
    args.vocab_size = count
    tokenizer = tokenizer_of(args)
    assert len(tokenizer) == count + 1
    assert tokenizer.mask_token_id == count
    for text in [*SAMPLES, "the thing within the wall <s>"]:
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert ids == reference.tokenizer.encode_ordinary(text)
        assert tokenizer.decode(ids) == reference.ids_to_text(ids) == text
        for table in (text_bytes(tokenizer), text_bytes(Megatrons("tiktoken", reference.tokenizer))):
            assert table[ids].sum() == len(text.encode())


def test_tokens_of_an_unknown_kind_have_no_bytes() -> None:
    """WordPiece does not keep its spaces."""
    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    pieces.decoder = decoders.WordPiece()
    assert text_bytes(PreTrainedTokenizerFast(tokenizer_object=pieces)) is None
    assert text_bytes(Megatrons("null", None)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meap_tokenizer_vocab_size": 500}, "not the tokenizer of this checkpoint"),
        ({"meap_mask_token_id": 7}, "not the tokenizer of this checkpoint"),
        ({"tokenizer_model": "nowhere.model"}, "nowhere.model: not found"),
        ({"tokenizer_type": "SFTTokenizer", "tokenizer_model": __file__}, "cannot be exported"),
        ({"tokenizer_model": __file__}, "not a tokenizer of type"),
    ],
)
def test_unusable_tokenizer(trained: Callable[[str], Path], changes: dict, message: str) -> None:
    """One clear line."""
    path = trained("bpe")
    known = sentencepiece.SentencePieceProcessor(model_file=str(path)).piece_to_id("[MASK]")
    args = arguments("SentencePieceTokenizer", str(path), 420, known)
    vars(args).update(changes)
    with pytest.raises(UsageError, match=message) as caught:
        tokenizer_of(args)
    assert "\n" not in str(caught.value)


def test_foreign_checkpoint_needs_only_a_tokenizer_that_fits(trained: Callable[[str], Path]) -> None:
    """A checkpoint of Megatron's own pretrain_gpt.py says nothing of a mask token: it becomes the next id."""
    args = arguments("SentencePieceTokenizer", str(trained("bpe-without-bytes")), 420, 420)
    for name in ("meap_mask_token", "meap_tokenizer_vocab_size", "meap_mask_token_id"):
        delattr(args, name)
    tokenizer = tokenizer_of(args)
    assert tokenizer is not None
    assert tokenizer.mask_token_id == 420 == add_mask_token(tokenizer, "[MASK]")
    args.padded_vocab_size = 420
    with pytest.raises(UsageError, match="not the tokenizer that they were trained with"):
        tokenizer_of(args)
