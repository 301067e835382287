"""Hugging Face tokenizers as loaded by preprocessing: Megatron's ids and special tokens, for any kind of folder."""

import json
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from megatron_meap.tokenization import without_torch
from megatron_meap.tokenization.fingerprint import ids_fingerprint, tokenizer_fingerprint
from megatron_meap.tokenization.reference import load_reference
from tests.unit.preprocessing import TEXTS, make_tokenizer, run_job, tokenizer_args, topics, write_jsonl

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<cls>", "<sep>", "[MASK]"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
ADDED = {"content": "<|im_end|>", "special": True, "normalized": False, "lstrip": False, "rstrip": True}

FAST = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES}
PLAIN = {"special": True, **dict.fromkeys(("normalized", "lstrip", "rstrip", "single_word"), False)}
LISTED = {str(id): {"content": token, **PLAIN} for id, token in enumerate(SPECIAL)}
BERT = {"tokenizer_class": "BertTokenizer", "unk_token": "<unk>"}
ORDINARY = {"800": {**ADDED, "content": " the", "special": False}}
OTHER = {**LISTED, "2": {**LISTED["2"], "lstrip": True}}

FOLDERS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "as Llama 3's": ("byte level", {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES}, "llama"),
    "rebuilt by the class of GPT-2": ("byte level", {"tokenizer_class": "GPT2Tokenizer", "pad_token": "<pad>"}, None),
    "rebuilt by the class of Qwen 2": ("byte level", {"tokenizer_class": "Qwen2TokenizerFast", **NAMES}, "qwen2"),
    "rebuilt by the class of Llama 2": ("metaspace", {"tokenizer_class": "LlamaTokenizerFast", **NAMES}, "llama"),
    "BERT's names for begin and end": ("byte level", {"cls_token": "<cls>", "sep_token": "<sep>"}, None),
    "tokens added by the configuration": ("byte level", {**NAMES, "added_tokens_decoder": {"800": ADDED}}, None),
    "BOS and EOS asked for": ("byte level", {**NAMES, "add_bos_token": True, "add_eos_token": True}, None),
    "without a configuration": ("byte level", {}, None),
    "as Llama 3.1's": ("byte level", {**FAST, "added_tokens_decoder": LISTED, "model_max_length": 9}, "llama"),
    "as Megatron's, without BOS": ("no post-processor", {**FAST, "bos_token": None, "cls_token": "<cls>"}, None),
    "a listed token that is another": ("byte level", {**FAST, "added_tokens_decoder": OTHER}, "llama"),
    "a token that is not there": ("byte level", {**FAST, "pad_token": "<nothing>"}, None),
    "padded": ("padded", FAST, None),
    "of a model with a tokenizer of its own": ("byte level", FAST, "phi3"),
    "special tokens in a text are text": ("byte level", {**FAST, "split_special_tokens": True}, None),
    "more special tokens": ("byte level", {**FAST, "extra_special_tokens": {"image_token": "<img>"}}, None),
    "a list of more special tokens": ("byte level", {**FAST, "additional_special_tokens": ["<img>"]}, None),
    "truncated": ("truncated", FAST, None),
    "an ordinary token added by the configuration": ("byte level", {**NAMES, "added_tokens_decoder": ORDINARY}, None),
    "a space before a text": ("byte level", {**FAST, "add_prefix_space": True}, None),
    "of BERT, cased": ("byte level", {**BERT, "do_lower_case": False}, None),
    "of BERT, uncased": ("byte level", {**BERT, "do_lower_case": True}, None),
    "with a chat template": ("byte level", {**FAST, "model_max_length": 7, "chat_template": "{{ messages }}"}, "llama"),
    "a setting that is not known": ("byte level", {**FAST, "of_tomorrow": True}, None),
}
READ = ("as Llama 3's", "as Llama 3.1's", "as Megatron's, without BOS", "truncated", "with a chat template")
"""Those of which tokenizer.json is taken as it is."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind."""
    root = tmp_path_factory.mktemp("huggingface")
    metaspace = pre_tokenizers.Metaspace(), decoders.Metaspace()
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    definitions = {"metaspace": trained(*metaspace)}
    definitions["byte level"] = trained(pre_tokenizers.Sequence([split, byte_level[0]]), byte_level[1])
    whole = json.loads(definitions["byte level"])
    definitions["no post-processor"] = json.dumps({**whole, "post_processor": None})
    padding = {"direction": "Right", "pad_id": 3, "pad_type_id": 0, "pad_token": "<pad>", "pad_to_multiple_of": None}
    definitions["padded"] = json.dumps({**whole, "padding": {"strategy": "BatchLongest", **padding}})
    truncation = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    definitions["truncated"] = json.dumps({**whole, "truncation": truncation})
    made = {}
    for number, (name, (kind, configuration, model_type)) in enumerate(FOLDERS.items()):
        made[name] = root / str(number)
        made[name].mkdir()
        (made[name] / "tokenizer.json").write_text(definitions[kind])
        if configuration:
            (made[name] / "tokenizer_config.json").write_text(json.dumps(configuration))
        if model_type:
            (made[name] / "config.json").write_text(json.dumps({"model_type": model_type}))
    return made


def trained(pre_tokenizer: Any, decoder: Any) -> str:
    """A tokenizer.json of 800 tokens that puts <s> before a text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(topics(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer.to_str()


@pytest.fixture(scope="module")
def made(folders: dict[str, Path]) -> dict[str, Any]:
    """What is made of each folder in one process without PyTorch, without and with a further special token."""
    code = (
        "import sys, json; sys.modules['torch'] = None\n"
        "from megatron_meap.tokenization.without_torch import made\n"
        "print(json.dumps([[made(folder, extra) for extra in ([], ['<extra>'])] for folder in sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", code, *map(str, folders.values())]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(zip(folders, json.loads(output), strict=True))


@pytest.mark.parametrize("name", FOLDERS)
def test_what_megatron_loads(name: str, folders: dict[str, Path], made: dict[str, Any], monkeypatch) -> None:
    from tests.unit.test_preprocessing_encoders import megatron

    monkeypatch.setattr(without_torch, "_made_apart", lambda path, additional: without_torch.of(made[name][1]))
    args = tokenizer_args("HuggingFaceTokenizer", tokenizer_model=str(folders[name]), special_tokens=["<extra>"])
    theirs, ours = megatron(args), load_reference(args)
    assert ours.tokenizer.library == theirs.library == "huggingface"
    assert ours.vocab_size == theirs.vocab_size
    for part in ("bos", "eod", "unk", "pad"):
        assert getattr(ours.tokenizer, part) == getattr(theirs, part), part
    assert ours.model.get_vocab() == theirs._tokenizer.tokenizer.get_vocab()
    for text in [*TEXTS[:3], *TEXTS[4:], *topics()[:5], "a <|im_end|> b", "<extra>", "<img></s>"]:
        whole = ours.model(text)["input_ids"]
        assert whole == theirs.tokenize(text)
        if "<" not in text:
            assert [*ours.prefix, *ours.encode(text), *ours.suffix] == whole
        assert ours.tokenizer.detokenize(whole) == theirs.detokenize(whole)
    assert ids_fingerprint(ours.tokenizer) == ids_fingerprint(theirs)


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_read_without_transformers(name: str, folders: dict[str, Path], made: dict[str, Any]) -> None:
    """The same as transformers makes of it, or nothing: then it is asked."""
    found, theirs = without_torch._read(folders[name]), made[name][0]
    assert (found is not None) == (name in READ)
    if not found:
        return
    (ours, special), (other, theirs_special) = found, without_torch.of(theirs)
    assert special == theirs_special
    assert ours.get_vocab() == other.get_vocab()
    assert ours.added_tokens_decoder == other.added_tokens_decoder
    for text in [*TEXTS[:3], *TEXTS[4:], *topics()[:5], "a </s> b"]:
        assert ours(text) == other(text)
        assert ours.plain(text) == other.plain(text)


def test_what_is_set_beside_a_vocabulary_shows_in_the_ids(folders: dict[str, Path], made: dict[str, Any]) -> None:
    """Two folders have the same fingerprint of ids if and only if they give other texts the same ids."""
    models = {name: without_torch.of(made[name][0])[0] for name in FOLDERS}
    texts = [*TEXTS, *topics()[:5], "a <|im_end|> b </s>", "IN the END"]
    ids = {name: json.dumps([model.plain(text) for text in texts]) for name, model in models.items()}
    prints = {
        name: ids_fingerprint(SimpleNamespace(library="huggingface", _tokenizer=SimpleNamespace(tokenizer=model)))
        for name, model in models.items()
    }
    for one, other in combinations(FOLDERS, 2):
        assert (prints[one] == prints[other]) == (ids[one] == ids[other]), (one, other)
    of_files = {name: fingerprint_of_files(folder) for name, folder in folders.items()}
    same_file = {prints[name] for name in FOLDERS if of_files[name] == of_files["as Llama 3's"]}
    assert len(same_file) > 4


def fingerprint_of_files(folder: Path) -> str:
    return tokenizer_fingerprint(tokenizer_args("HuggingFaceTokenizer", tokenizer_model=str(folder)))


def test_files_that_transformers_may_act_on(folders: dict[str, Path], tmp_path: Path) -> None:
    """Another list of special tokens, added tokens, a vocabulary of another kind: nothing is read without it."""
    folder = shutil.copytree(folders["as Llama 3's"], tmp_path / "folder")
    (folder / "special_tokens_map.json").write_text(json.dumps(NAMES))
    assert without_torch._read(folder)
    for name, text in (
        ("special_tokens_map.json", '{"eos_token": "<sep>"}'),
        ("added_tokens.json", "{}"),
        ("tokenizer.model", ""),
        ("tokenizer.4.0.0.json", "{}"),
    ):
        (folder / name).write_text(text)
        assert without_torch._read(folder) is None, name
        (folder / name).unlink()


def test_pieces_of_bytes_are_shown_as_text(folders: dict[str, Path]) -> None:
    """Whole characters as themselves, parts of one as the bytes that they are, ids of all kinds of vocabularies."""
    from megatron_meap.inspection.samples import token_texts
    from tests.unit.test_preprocessing_encoders import megatron

    text = "It’s 東京, naïve café\n\tand code()"
    for name in ("as Llama 3's", "rebuilt by the class of Llama 2"):
        args = tokenizer_args("HuggingFaceTokenizer", tokenizer_model=str(folders[name]))
        tokenizer = megatron(args)
        shown = list(token_texts(tokenizer, tokenizer.tokenize("plain words " + text)[1:]))
        whole = "".join(shown)
        assert "plain words It" in whole
        assert not set("âĢĻĠĊ") & set(whole)
        if name == "as Llama 3's":
            assert whole.encode().decode("unicode_escape").encode("latin1").decode() == "plain words " + text


def test_a_tokenizer_written_in_python(tmp_path: Path) -> None:
    """It has no form that `tokenizers` runs: Megatron loads it."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    args = tokenizer_args("HuggingFaceTokenizer", tokenizer_model=str(tmp_path))
    assert without_torch.load(args) is None
    assert load_reference(args).encode("ab") == [100, 101]


def test_what_a_job_imports(folders: dict[str, Path], tmp_path: Path) -> None:
    """Neither PyTorch nor Megatron nor transformers, in the job and its workers, of any tokenizer that does without."""
    write_jsonl(tmp_path / "a.jsonl", topics()[:20])
    code = (
        "import sys\n"
        "from megatron_meap.commands.preprocess_data import main\n"
        "main()\n"
        "print({'torch', 'megatron', 'transformers'} & set(sys.modules))"
    )
    model = make_tokenizer(tmp_path)
    for number, (kind, path) in enumerate(
        (("HuggingFaceTokenizer", folders["as Llama 3's"]), ("SentencePieceTokenizer", model))
    ):
        flags = ["--input", "a.jsonl", "--output-prefix", str(number), "--append-eod", "--tokenizer-type", kind]
        command = [sys.executable, "-c", code, *flags, "--tokenizer-model", str(path)]
        found = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        assert found.stdout.splitlines()[-1] == "set()", kind
        assert "encoder: gigatoken" in found.stderr
    args = tokenizer_args("HuggingFaceTokenizer", tokenizer_model=str(folders["as Llama 3's"]))
    run_job([tmp_path / "a.jsonl"], tmp_path / "slow", args, encoder="reference")
    assert (tmp_path / "slow_text_document.bin").read_bytes() == (tmp_path / "0_text_document.bin").read_bytes()
