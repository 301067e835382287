"""The mask token in every kind of tokenizer that Megatron builds."""

import base64
import json
import lzma
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
from megatron.core.tokenizers import MegatronTokenizer
from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding
from transformers import PreTrainedTokenizerFast

from megatron_meap.errors import UsageError
from megatron_meap.tokenization.mask_token import resolve_mask_token, special_token_ids
from tests.conftest import Corpus


def sentencepiece_tokenizer(path: str) -> MegatronTokenizer:
    return MegatronTokenizer.from_pretrained(tokenizer_path=path, metadata_path={"library": "sentencepiece"})


def huggingface_tokenizer(folder: Path, **kwargs) -> MegatronTokenizer:
    return MegatronTokenizer.from_pretrained(
        tokenizer_path=str(folder), metadata_path={"library": "huggingface"}, **kwargs
    )


def test_a_control_symbol_of_sentencepiece_is_found(corpus: Corpus) -> None:
    tokenizer = sentencepiece_tokenizer(corpus.tokenizer)
    mask = resolve_mask_token(tokenizer)
    assert not mask.added
    assert tokenizer._tokenizer.tokenizer.id_to_piece(mask.id) == "[MASK]"


def test_the_literal_text_never_becomes_the_mask(corpus: Corpus) -> None:
    tokenizer = sentencepiece_tokenizer(corpus.tokenizer)
    assert resolve_mask_token(tokenizer).id not in tokenizer.tokenize("a [MASK] and [MASK][MASK]")


def test_a_missing_token_becomes_the_next_id(corpus: Corpus) -> None:
    mask = resolve_mask_token(sentencepiece_tokenizer(corpus.tokenizer), "[BLANK]")
    assert mask.added
    assert mask.id == 512


@pytest.mark.parametrize("special", [False, True])
def test_a_user_defined_symbol_is_refused(corpus: Corpus, tmp_path: Path, special: bool) -> None:
    """A user-defined symbol is parsed from text; a control symbol is not."""
    kind = "control_symbols" if special else "user_defined_symbols"
    (tmp_path / "text.txt").write_text("\n".join(corpus.documents[:20]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "own"), vocab_size=400, model_type="bpe",
        byte_fallback=True, minloglevel=2, **{kind: ["[MASK]"]},
    )  # fmt: skip
    tokenizer = sentencepiece_tokenizer(str(tmp_path / "own.model"))
    if special:
        assert not resolve_mask_token(tokenizer).added
    else:
        with pytest.raises(UsageError, match="ordinary token"):
            resolve_mask_token(tokenizer)


def test_huggingface(huggingface_folder: Path) -> None:
    plain = huggingface_tokenizer(huggingface_folder)
    for empty in ("", " \n"):
        with pytest.raises(UsageError, match="is empty; name a token"):
            resolve_mask_token(plain, empty)
    assert resolve_mask_token(plain).id == plain.vocab_size
    assert resolve_mask_token(plain).added
    with_mask = huggingface_tokenizer(huggingface_folder, additional_special_tokens=["[MASK]"])
    assert resolve_mask_token(with_mask).id == plain.vocab_size
    assert not resolve_mask_token(with_mask).added
    with pytest.raises(UsageError, match="ordinary token"):
        resolve_mask_token(plain, "t")


def test_tiktoken(tmp_path: Path) -> None:
    vocabulary = [
        {"rank": rank, "token_bytes": base64.b64encode(bytes([rank])).decode(), "token_str": ""} for rank in range(256)
    ]
    (tmp_path / "vocabulary.json").write_text(json.dumps(vocabulary))
    tokenizer = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(tmp_path / "vocabulary.json"), metadata_path={"library": "tiktoken"},
        num_special_tokens=20, vocab_size=276,
    )  # fmt: skip
    assert resolve_mask_token(tokenizer).id == 276
    assert resolve_mask_token(tokenizer, "<mask>").id == 3
    with pytest.raises(UsageError, match="ordinary token"):
        resolve_mask_token(tokenizer, "a")


def test_null_tokenizer() -> None:
    tokenizer = MegatronTokenizer.from_pretrained(metadata_path={"library": "null-text"}, vocab_size=100)
    assert resolve_mask_token(tokenizer).id == 100


def test_special_token_ids(corpus: Corpus, huggingface_folder: Path) -> None:
    assert special_token_ids(sentencepiece_tokenizer(corpus.tokenizer)) == (1, 2)
    assert special_token_ids(huggingface_tokenizer(huggingface_folder)) == (0,)  # <eos>
    null = MegatronTokenizer.from_pretrained(metadata_path={"library": "null-text"}, vocab_size=100)
    assert special_token_ids(null) == (99,)


@pytest.mark.parametrize("kind", ["model", "json"])
def test_llama2_as_in_the_paper(shared_data: Path, tmp_path: Path, kind: str) -> None:
    """32,000 pieces, [MASK] at 32,000, 32,064 rows."""
    if kind == "model":
        tokenizer = sentencepiece_tokenizer(str(shared_data / "llama2_tokenizer.model"))
    else:
        packed = (shared_data / "llama2_tokenizer.json.xz").read_bytes()
        (tmp_path / "tokenizer.json").write_bytes(lzma.decompress(packed))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = huggingface_tokenizer(tmp_path)
    mask = resolve_mask_token(tokenizer)
    assert (mask.id, mask.added) == (32000, True)
    args = SimpleNamespace(make_vocab_size_divisible_by=64, tensor_model_parallel_size=1, rank=0)
    assert vocab_size_with_padding(mask.id + 1, args) == 32064


def test_a_vocabulary_with_a_hole(tmp_path: Path) -> None:
    """The mask token comes after the largest id, in training and in an exported tokenizer that is loaded again."""
    from tokenizers import Tokenizer, models

    from megatron_meap.tokenization.huggingface import tokenizer_of
    from tests.unit.preprocessing import read_back, run_job, tokenizer_args, write_jsonl

    letters = {letter: id for id, letter in enumerate("abcdefgh")} | {"</s>": 9}  # 9 entries, 9 is the largest id
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path / "hf")
    tokenizer = huggingface_tokenizer(tmp_path / "hf")
    assert tokenizer.vocab_size == tokenizer.eod == 9
    assert resolve_mask_token(tokenizer).id == 10
    args = tokenizer_args("HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "hf"))
    made = run_job([write_jsonl(tmp_path / "a.jsonl", ["abc"])], tmp_path / "x", args)[0]
    assert read_back(tmp_path / "x_text_document") == [[0, 1, 2, 9]]
    assert (made["tokenizer"]["vocab_size"], made["mask_token"]["id"]) == (10, 10)
    args.meap_tokenizer_vocab_size, args.meap_mask_token_id = 10, 10
    tokenizer_of(args).save_pretrained(tmp_path / "exported")
    exported = PreTrainedTokenizerFast.from_pretrained(tmp_path / "exported")
    assert (exported.mask_token_id, exported.eos_token_id, exported("abc")["input_ids"]) == (10, 9, [0, 1, 2])


@pytest.mark.parametrize("name", ["eos_token", "bos_token", "pad_token", "unk_token"])
def test_a_token_of_another_purpose_is_no_mask(name: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    names = {"eos_token": "</s>", name: "[X]"}
    backend = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"'\[X\]' is this tokenizer's (EOD|BOS|PAD|UNK) token"):
        resolve_mask_token(huggingface_tokenizer(tmp_path), "[X]")


def test_a_control_symbol_of_another_purpose_is_no_mask(corpus: Corpus) -> None:
    for text, name in (("<s>", "BOS"), ("</s>", "EOD"), ("<unk>", "UNK")):
        with pytest.raises(UsageError, match=f"'{text}' is this tokenizer's {name} token"):
            resolve_mask_token(sentencepiece_tokenizer(corpus.tokenizer), text)
