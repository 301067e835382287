"""Fill-in-the-middle: text stays text, and settings that give wrong samples are refused before the start."""

import base64
import json
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.tokenizers import MegatronTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_meap.errors import UsageError
from megatron_meap.tokenization.mask_token import token_id
from megatron_meap.tokenization.reference import load_reference, plain_encode
from megatron_meap.trainer import fim
from megatron_meap.trainer.documents import StatelessFIMDataset, _PlainText
from tests.unit.preprocessing import tokenizer_args

SPECIAL = ["<s>", "<|endoftext|>", "[MASK]", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Bytes, and special tokens that the library would parse from text."""
    folder = tmp_path_factory.mktemp("fim")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: id for id, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    names = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "mask_token": "[MASK]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return MegatronTokenizer.from_pretrained(tokenizer_path=str(folder), metadata_path={"library": "huggingface"})


def test_text_that_names_special_tokens_is_encoded_as_text(tokenizer):
    """Megatron's own permutation, on a document that speaks of the special tokens: only the sentinels are added."""
    text = "about [MASK] and <|endoftext|>, " * 5
    plain = list(plain_encode(tokenizer)(text))
    assert max(plain) < 256 <= max(tokenizer.tokenize(text))
    dataset = StatelessFIMDataset.__new__(StatelessFIMDataset)
    dataset._text = SimpleNamespace(_tokenizer=_PlainText(tokenizer))
    sentinels = {f"{name}_tok_id": 259 + number for number, name in enumerate(("prefix", "middle", "suffix", "pad"))}
    for seed in range(20):
        dataset.np_rng = np.random.RandomState(seed)
        bos = [256] * (seed % 2)  # which stays in front
        sample = dataset._permute(np.array([*bos, *plain]), 1.0, 0.5, tokenizer, truncate_or_pad=False, **sentinels)
        assert sample[: len(bos)].tolist() == bos
        kept = sample[sample < 256]
        assert sorted(sample[len(bos) :][sample[len(bos) :] >= 256]) == [259, 260, 261]
        assert sorted(kept.tolist()) == sorted(plain)


@pytest.fixture(scope="module")
def tiktoken(tmp_path_factory):
    """Bytes, after special tokens with the names that Megatron requires and those of fill-in-the-middle."""
    path = tmp_path_factory.mktemp("tiktoken") / "bytes.json"
    ranks = [{"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode()} for byte in range(256)]
    path.write_text(json.dumps([{**each, "token_str": ""} for each in ranks]))
    names = ["<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>", *SPECIAL[1:]]
    return load_reference(
        tokenizer_args(
            "TikTokenizer", tokenizer_model=str(path), special_tokens=names, tiktoken_num_special_tokens=len(names),
            vocab_size=256 + len(names),
        )
    ).tokenizer  # fmt: skip


@pytest.mark.parametrize("kind", ["tokenizer", "tiktoken"])
def test_samples_are_split_at_one_token(kind, request, monkeypatch):
    """Tiktoken's wrapper would look up each character of its name."""
    found = request.getfixturevalue(kind)
    monkeypatch.setattr(GPTDataset, "__init__", lambda self, *args: setattr(self, "config", args[-1]))
    names = {name: f"<fim_{name}>" for name in ("prefix", "middle", "suffix", "pad")} | {"eod": "<|endoftext|>"}
    settings = dict.fromkeys(("fim_rate", "fim_spm_rate", "fim_fragment_rate", "fim_no_prefix"))
    config = SimpleNamespace(tokenizer=found, random_seed=1, fim_split_sample="<s>", fim_extra_tokens=names, **settings)
    dataset = StatelessFIMDataset(None, None, None, 1, None, config)
    assert dataset.fim_split_sample == token_id(found, "<s>")
    assert config.fim_split_sample == "<s>"
    expected = [token_id(found, names[name]) for name in ("prefix", "middle", "suffix", "pad", "eod")]
    tokens = [
        dataset.prefix_tok_id,
        dataset.middle_tok_id,
        dataset.suffix_tok_id,
        dataset.pad_tok_id,
        dataset.eod_tok_id,
    ]
    assert tokens == expected
    assert len(set(tokens)) == 5


def flags(**changes) -> SimpleNamespace:
    """Arguments as Megatron's parser gives them."""
    names = {f"fim_{name}_token": f"<fim_{name}>" for name in ("prefix", "middle", "suffix", "pad")}
    rates = {"fim_rate": 0.5, "fim_spm_rate": 0.5, "fim_fragment_rate": None, "fim_split_sample": None}
    return SimpleNamespace(
        **{
            "fim_data": True,
            "dataloader_inter_document_masking": False,
            "fim_eod_token": "<|endoftext|>",
            **names,
            **rates,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataloader_inter_document_masking": True}, "--fim-data: .*--dataloader-inter-document-masking"),
        ({"fim_middle_token": "<mid>"}, "--fim-middle-token <mid>: the tokenizer has no such token"),
        ({"fim_pad_token": "<pad>"}, "--fim-pad-token <pad>: the tokenizer has no such token"),
        ({"fim_suffix_token": "<fim_prefix>"}, "--fim-suffix-token: the same token as --fim-prefix-token"),
        ({"fim_prefix_token": "[MASK]"}, "--fim-prefix-token: the same token as the mask token"),
        ({"fim_suffix_token": "<|endoftext|>"}, "--fim-suffix-token: the same token as the end of a document"),
        ({"fim_eod_token": "<s>"}, r"--fim-eod-token <s>: documents end with this tokenizer's EOD \(id 257\)"),
        ({"fim_split_sample": "<file>"}, "--fim-fragment-rate None: give a probability"),
        ({"fim_split_sample": "<file>", "fim_fragment_rate": 0.5}, "--fim-split-sample <file>: the tokenizer has no"),
        *(
            ({"fim_split_sample": token, "fim_fragment_rate": 0.5}, f"--fim-split-sample: the same token as {other}")
            for token, other in {
                "[MASK]": "the mask token",
                "<|endoftext|>": "the end of a document",
                "<fim_middle>": "--fim-middle-token",
            }.items()
        ),
        ({"fim_rate": 1.5}, "--fim-rate 1.5: give a probability from 0 to 1"),
        ({"fim_spm_rate": float("nan")}, "--fim-spm-rate nan: give a probability from 0 to 1"),
    ],
)
def test_what_cannot_work_is_refused(changes, message, tokenizer):
    fim.check(flags(), tokenizer, 258)
    fim.check(flags(fim_pad_token="<|endoftext|>"), tokenizer, 258)
    with pytest.raises(UsageError, match=message):
        fim.check(flags(**changes), tokenizer, 258)


def test_sentencepiece_without_sentinels(corpus):
    """Whose library gives the unknown token's id for each of them."""
    theirs = MegatronTokenizer.from_pretrained(
        tokenizer_path=corpus.tokenizer, metadata_path={"library": "sentencepiece"}
    )
    with pytest.raises(UsageError, match="--fim-prefix-token <fim_prefix>: the tokenizer has no such token"):
        fim.check(flags(), theirs, 3)
