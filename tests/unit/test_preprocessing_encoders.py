"""Encoders: gigatoken and the reference give the same ids, which are Megatron's, or the job reports it."""

import argparse
import base64
import itertools
import json
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_meap.errors import UsageError
from megatron_meap.preprocessing.blocks import BlockEncoder
from megatron_meap.preprocessing.readers import InputOptions
from megatron_meap.tokenization import encoders
from megatron_meap.tokenization.encoders import GigatokenEncoder, ReferenceEncoder, choose_encoder, gigatoken_encoder
from megatron_meap.tokenization.reference import TOKENIZER_TYPES, add_tokenizer_flags, load_reference
from megatron_meap.tokenization.without_torch import FastModel
from tests.unit.preprocessing import (
    TEXTS,
    make_tokenizer,
    read_back,
    run_job,
    sentencepiece_args,
    tokenizer_args,
    topics,
    write_jsonl,
)

texts = st.text(st.characters(exclude_categories=["Cs"])) | st.text(" \t\n▁<>s/[]MASK0xAé日🤗\x00'.,aB1\u200b\u3000")
many = settings(max_examples=100, deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def sentencepiece_model(folder):
    return make_tokenizer(folder)


@pytest.fixture(scope="module")
def huggingface_folder(folder):
    """Byte-level BPE with BOS put before every text, special tokens and [MASK]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<s>", "</s>", "[MASK]"]
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(topics(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", mask_token="[MASK]")
    fast.save_pretrained(folder / "hf")
    return folder / "hf"


@pytest.fixture(scope="module")
def tiktoken_file(folder, huggingface_folder):
    """The same pieces in the form of Megatron's tiktoken vocabularies."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    vocabulary = json.loads((huggingface_folder / "tokenizer.json").read_text())["model"]["vocab"]
    pieces = sorted(set(vocabulary) - {"<s>", "</s>", "[MASK]"}, key=vocabulary.__getitem__)
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes(byte_of[character] for character in piece) for piece in pieces if len(piece) > 1]
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
        for rank, token in enumerate(tokens)
    ]
    path = folder / "tiktoken.json"
    path.write_text(json.dumps(entries))
    return path, len(tokens)


@pytest.fixture(scope="module")
def references(sentencepiece_model, huggingface_folder, tiktoken_file):
    """{library: (arguments, reference)}."""
    path, size = tiktoken_file
    tiktoken = {"tokenizer_model": str(path), "tiktoken_num_special_tokens": 10, "vocab_size": size + 10}
    args = {
        "sentencepiece": sentencepiece_args(sentencepiece_model),
        "huggingface": tokenizer_args("HuggingFaceTokenizer", tokenizer_model=str(huggingface_folder)),
        "tiktoken": tokenizer_args("TikTokenizer", tiktoken_pattern="v2", **tiktoken),
        "tiktoken v1": tokenizer_args("TikTokenizer", tiktoken_pattern="v1", **tiktoken),
        "null-text": tokenizer_args("NullTokenizer", vocab_size=100),
    }
    return {name: (arguments, load_reference(arguments)) for name, arguments in args.items()}


def megatron(args: argparse.Namespace):
    """Megatron's tokenizer for the arguments, its defaults filled in by its own parser."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import _add_tokenizer_args

    defaults = _add_tokenizer_args(argparse.ArgumentParser()).parse_args([])
    return build_tokenizer(argparse.Namespace(**{**vars(defaults), **vars(args), "pad_vocab_size": False}))


@pytest.mark.parametrize("name", ["sentencepiece", "huggingface", "tiktoken", "tiktoken v1", "null-text"])
def test_the_reference_is_megatrons_tokenizer(name, references):
    args, reference = references[name]
    theirs = megatron(args)
    assert reference.vocab_size == theirs.vocab_size
    assert reference.eod == theirs.eod
    if name != "null-text":
        assert reference.bos == theirs.bos
        assert reference.mask.id == {"sentencepiece": 3, "huggingface": 2}.get(name, theirs.vocab_size)
    ordinary = ["1 2 3"] if name == "null-text" else [*TEXTS[:3], *TEXTS[4:], *topics()[:5]]
    for text in ordinary:
        ours = [*reference.prefix, *reference.encode(text), *reference.suffix]
        assert ours == theirs.tokenize(text)


def test_the_flags_are_megatrons():
    from megatron.training.arguments import _add_tokenizer_args

    ours, theirs = argparse.ArgumentParser(), argparse.ArgumentParser()
    add_tokenizer_flags(ours)
    _add_tokenizer_args(theirs)
    known = {flag: action for action in theirs._actions for flag in action.option_strings}
    for action in ours._actions:
        flag = action.option_strings[-1]
        if flag not in ("--help", "--meap-mask-token"):
            assert (known[flag].dest, known[flag].default) == (action.dest, action.default), flag
    assert set(TOKENIZER_TYPES) <= set(known["--tokenizer-type"].choices)


@many
@given(text=texts)
def test_gigatoken_gives_the_ids_of_sentencepiece(text, references):
    assert list(exact(references, "sentencepiece").encode(text.encode())) == references["sentencepiece"][1].encode(text)


@many
@given(text=texts)
def test_gigatoken_gives_the_ids_of_huggingface(text, references):
    assert list(exact(references, "huggingface").encode(text.encode())) == references["huggingface"][1].encode(text)


@many
@given(text=texts)
def test_gigatoken_gives_the_ids_of_tiktoken(text, references):
    assert list(exact(references, "tiktoken").encode(text.encode())) == references["tiktoken"][1].encode(text)


_made: dict[str, GigatokenEncoder] = {}


def exact(references, name: str) -> GigatokenEncoder:
    return _made.setdefault(name, gigatoken_encoder(references[name][1]))


def test_llama2_in_both_forms(shared_data, tmp_path):
    """The tokenizer of the paper: gigatoken, sentencepiece and tokenizer.json agree; BOS only once."""
    import lzma
    import shutil

    shutil.copy(shared_data / "llama2_tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "hf").mkdir()
    definition = lzma.decompress((shared_data / "llama2_tokenizer.json.xz").read_bytes())
    (tmp_path / "hf" / "tokenizer.json").write_bytes(definition)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(config))
    with lzma.open(shared_data / "novels_valid.jsonl.xz") as file:
        documents = [json.loads(next(file))["text"] for _ in range(10)] + TEXTS
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    sentencepiece = tokenizer_args("Llama2Tokenizer", tokenizer_model=str(tmp_path / "tokenizer.model"))
    huggingface = tokenizer_args("HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "hf"))
    found = []
    for args, encoder in ((sentencepiece, "gigatoken"), (sentencepiece, "reference"), (huggingface, "gigatoken")):
        run_job([source], tmp_path / "out", args, encoder=encoder, prepend_bos=True, overwrite=True)
        found.append(read_back(tmp_path / "out_text_document"))
    assert found[0] == found[1] == found[2]
    assert all(ids[0] == 1 and ids[1] != 1 and ids[-1] == 2 for ids in found[0])


@pytest.mark.parametrize("name", ["sentencepiece", "huggingface", "tiktoken", "tiktoken v1"])
@pytest.mark.parametrize("encoder", ["auto", "reference"])
def test_special_tokens_in_text_never_become_special(name, encoder, references, tmp_path):
    args, reference = references[name]
    source = write_jsonl(tmp_path / "a.jsonl", ["[MASK]", "<s> a </s>", "<unk><mask><pad><SPECIAL_9>", "x[MASK]</s>y"])
    run_job([source], tmp_path / "out", args, encoder=encoder)
    special = {0, 1, 2} if name == "huggingface" else set(range(4 if name == "sentencepiece" else 10))
    before = len(reference.prefix)
    for ids in read_back(tmp_path / "out_text_document"):
        assert tuple(ids[:before]) == reference.prefix
        assert ids[-1] == reference.eod
        assert not special.intersection(ids[before:-1])


@pytest.mark.parametrize("content", ["<x>", " lead", "ing", "É"])
def test_ordinary_added_tokens_are_exact_or_refused(content, huggingface_folder):
    """Whatever their flags say about the text around them, and where the vocabulary has them already."""
    definition = json.loads((huggingface_folder / "tokenizer.json").read_text())
    draw, exact_ones = random.Random(0), 0
    parts = [content, content.strip(), " ", "  ", "\n", "\u00a0", "word", "a", "E\u0301", "don't"]
    names = ("lstrip", "rstrip", "single_word", "normalized")
    for flags in itertools.product((False, True), repeat=4):
        token = {"id": 800, "content": content, "special": False, **dict(zip(names, flags, strict=True))}
        added = json.dumps({**definition, "added_tokens": [*definition["added_tokens"], token]})
        model = FastModel(added.encode())
        try:
            encoder = gigatoken_encoder(SimpleNamespace(library="huggingface", model=model))
        except encoders._NotPossibleError:
            continue
        exact_ones += 1
        for _ in range(30):
            text = "".join(draw.choices(parts, k=draw.randint(1, 9)))
            assert encoder.encode(text.encode()).tolist() == model.plain(text), (flags, text)
    assert exact_ones == (0 if content in ("ing", "É") else 2)


def test_null_tokenizer(references, tmp_path):
    args, _ = references["null-text"]
    source = write_jsonl(tmp_path / "a.jsonl", ["1 2 3", "42"])
    run_job([source], tmp_path / "out", args)
    assert read_back(tmp_path / "out_text_document") == [[1, 2, 3, 99], [42, 99]]
    with pytest.raises(UsageError, match=r"a\.jsonl:1: the tokenizer refuses it: invalid literal"):
        run_job([write_jsonl(tmp_path / "a.jsonl", ["one"])], tmp_path / "bad", args)
    with pytest.raises(UsageError, match="token id 100 is outside the tokenizer's vocabulary of 100"):
        run_job([write_jsonl(tmp_path / "a.jsonl", ["100"])], tmp_path / "bad", args)


def test_the_choice(references, monkeypatch):
    _, reference = references["sentencepiece"]
    encoder, note = choose_encoder(reference, TEXTS)
    assert (encoder.name, note) == ("gigatoken", "gigatoken, same ids as sentencepiece for all 7 sampled documents")
    assert choose_encoder(reference, TEXTS, "reference")[0].name == "reference (sentencepiece)"
    encoder, note = choose_encoder(references["null-text"][1], ["1"])
    assert note == "reference (null-text); gigatoken: does not support null-text tokenizers"
    assert "does not know this --tiktoken-pattern" in choose_encoder(references["tiktoken v1"][1], [])[1]
    # gigatoken going wrong on one text of the sample
    monkeypatch.setattr(encoders, "gigatoken_encoder", lambda _: Wrong(reference, "café"))
    encoder, note = choose_encoder(reference, TEXTS)
    assert encoder.name == "reference (sentencepiece)"
    assert "WARNING: other ids than sentencepiece for 1 of 7 sampled documents" in note
    with pytest.raises(UsageError, match="--encoder gigatoken: WARNING: other ids"):
        choose_encoder(reference, TEXTS, "gigatoken")


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"user_defined_symbols": ["<sep>"]}, "is not exact with user-defined symbols"),
        ({"normalization_rule_name": "identity"}, "is not exact where extra spaces are removed"),
        ({"model_type": "unigram"}, "only BPE sentencepiece models"),
        ({"byte_fallback": False}, "only byte_fallback"),
    ],
)
def test_models_that_gigatoken_does_not_do_exactly(settings_, message, tmp_path):
    import sentencepiece

    base = {"model_type": "bpe", "vocab_size": 500, "byte_fallback": True, "minloglevel": 2, "num_threads": 1}
    lines = (line for text in topics() for line in text.splitlines())
    with open(tmp_path / "m.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=file, **{**base, **settings_})
    encoder, note = choose_encoder(load_reference(sentencepiece_args(tmp_path / "m.model")), TEXTS)
    assert encoder.name == "reference (sentencepiece)"
    assert message in note


class Wrong:
    """An encoder that is wrong where a text contains some word."""

    name = "gigatoken"

    def __init__(self, reference, word: str) -> None:
        self._reference, self._word = reference, word

    def encode(self, text):
        return [7] if self._word in text.decode() else self._reference.encode(text.decode())

    def shed(self):
        pass


def test_an_encoder_that_goes_wrong_later_stops_the_job(references):
    _, reference = references["sentencepiece"]
    work = block_encoder(reference, Wrong(reference, "rare"))
    work(("jsonl", b'{"text": "often"}\n'))
    with pytest.raises(UsageError, match=r"other ids than sentencepiece for the text 'rare'.*--encoder reference"):
        work(("jsonl", b'{"text": "rare"}\n'))


def test_the_mask_token_out_of_text_stops_the_job(references):
    _, reference = references["sentencepiece"]
    produces_it = SimpleNamespace(name="x", encode=lambda text: [3], shed=lambda: None)
    same = argparse.Namespace(**{**vars(reference), "encode": produces_it.encode})
    with pytest.raises(UsageError, match=r"the text produces the mask token '\[MASK\]' \(id 3\)"):
        block_encoder(same, produces_it)(("jsonl", b'{"text": "x"}\n'))


def block_encoder(reference, encoder) -> BlockEncoder:
    return BlockEncoder(reference, encoder, InputOptions(), prefix=(), suffix=(2,), dtype=np.uint16, workers=1)


def test_caches_are_emptied_when_the_process_grows(references, monkeypatch):
    from megatron_meap.preprocessing import blocks

    _, reference = references["sentencepiece"]
    encoder = gigatoken_encoder(reference)
    shed, calls = encoder.shed, []
    monkeypatch.setattr(encoder, "shed", lambda: (calls.append(1), shed()))
    monkeypatch.setattr(blocks, "CACHE_BYTES", 300)
    sizes = iter([1000, 1200, 1301, 1100, 1200, 1401, 1100])
    monkeypatch.setattr(blocks, "_resident_bytes", lambda: next(sizes))
    work = block_encoder(reference, encoder)
    for text, emptied in zip(TEXTS[:5], [0, 0, 1, 1, 2], strict=True):
        answer = work(("jsonl", json.dumps({"text": text}).encode()))
        assert np.frombuffer(answer.keys[0].tokens, np.uint16).tolist() == [*reference.encode(text), 2]
        assert len(calls) == emptied


WRONG_TOKENIZERS = {
    "no flag": ("SentencePieceTokenizer", {}, "--tokenizer-model: needed by"),
    "no file": (
        "Llama2Tokenizer",
        {"tokenizer_model": "missing.model"},
        "missing.model: no such file",
    ),
    "a folder": ("GPTSentencePieceTokenizer", {"tokenizer_model": "."}, "a folder; .* needs a file"),
    "a device": ("SentencePieceTokenizer", {"tokenizer_model": os.devnull}, "not a file; .* needs a file"),
    "not a model": ("SentencePieceTokenizer", {"tokenizer_model": __file__}, "not a SentencePiece model"),
    "not a folder of one": (
        "HuggingFaceTokenizer",
        {"tokenizer_model": "tests"},
        "not a tokenizer of --tokenizer-type",
    ),
    "the file in the folder": (
        "HuggingFaceTokenizer",
        {"tokenizer_model": __file__},
        r"a file; a HuggingFaceTokenizer is named by its folder, .*/tests/unit",
    ),
    "a name on the hub": (
        "HuggingFaceTokenizer",
        {"tokenizer_model": "nobody/nothing"},
        "nobody/nothing: no such folder here, nor a name that the Hugging Face hub .* name their folder",
    ),
    "not tiktoken": (
        "TikTokenizer",
        {"tokenizer_model": __file__},
        r"not a tokenizer of .*: AssertionError at `assert path\.endswith\(\"\.json\"\)`",
    ),
    "no merges": ("GPT2BPETokenizer", {"vocab_file": __file__}, "--merge-file: needed"),
    "no size": ("NullTokenizer", {}, "--vocab-size: needed"),
}


@pytest.mark.parametrize("name", WRONG_TOKENIZERS)
def test_what_is_not_a_tokenizer(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    kind, values, message = WRONG_TOKENIZERS[name]
    with pytest.raises(UsageError, match=message) as error:
        load_reference(tokenizer_args(kind, **values))
    assert "\n" not in str(error.value)


def test_a_reference_encoder_needs_no_cleaning(references):
    ReferenceEncoder(references["sentencepiece"][1]).shed()
