"""Generation: repeatable, within the context, and never the mask token."""

import io
import json
import logging
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_meap.errors import UsageError
from megatron_meap.huggingface.generation import Generator, Sampling
from megatron_meap.huggingface.importer import ImportJob, import_model
from megatron_meap.sft.published import TEMPLATES
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def folders(huggingface_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One random model as a Hugging Face directory with a mask token, and as a Megatron checkpoint."""
    folder = tmp_path_factory.mktemp("generate")
    tokenizer = AutoTokenizer.from_pretrained(str(huggingface_folder))
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "huggingface")
    tokenizer.save_pretrained(folder / "huggingface")
    import_model(ImportJob(str(folder / "huggingface"), str(folder / "megatron"), check=False))
    return {kind: folder / kind for kind in ("huggingface", "megatron")}


@pytest.mark.parametrize("kind", ["huggingface", "megatron"])
@pytest.mark.parametrize("sampling", [Sampling(20, 0.0), Sampling(20, 5.0, seed=1), Sampling(20, 1.0, 5, 0.9, seed=1)])
def test_repeatable_and_without_mask_token(folders: dict[str, Path], kind: str, sampling: Sampling) -> None:
    """The same text twice, from both forms of the model."""
    generator = Generator(str(folders[kind]))
    assert generator.mask_id == generator.tokenizer.mask_token_id
    first = generator.generate("the class", sampling)
    assert first.startswith("the class")
    assert generator.generate("the class", sampling) == first
    assert "[MASK]" not in generator.generate("the class", Sampling(40, 50.0, seed=7))


def test_both_forms_give_the_same_text(folders: dict[str, Path]) -> None:
    """The checkpoint is converted in memory: the same weights, the same text, whatever a generation config says."""
    recommended = folders["huggingface"] / "generation_config.json"
    settings = json.loads(recommended.read_text())
    recommended.write_text(json.dumps(settings | {"do_sample": True, "temperature": 0.1, "repetition_penalty": 5.0}))
    texts = {Generator(str(folder)).generate("a b c", Sampling(30, 1.0, seed=5)) for folder in folders.values()}
    assert len(texts) == 1


def test_mask_token_is_suppressed_even_where_it_is_the_likeliest(folders: dict[str, Path]) -> None:
    """Its logit is forbidden, not merely unlikely."""
    generator = Generator(str(folders["huggingface"]))
    with torch.no_grad():
        generator.model.lm_head.weight.zero_()
        generator.model.lm_head.weight[generator.mask_id] = 1.0
        generator.model.model.norm.weight.fill_(1.0)
    config = generator._config(Sampling(8, 0.0), 1)
    tokens = generator.model.generate(torch.tensor([[5]]), generation_config=config)
    assert generator.mask_id not in tokens[0].tolist()


def test_stops_at_the_end_of_the_context(folders: dict[str, Path]) -> None:
    """More tokens than fit are not made; a prompt that does not fit is refused."""
    generator = Generator(str(folders["megatron"]))
    config = generator._config(Sampling(1000, 1.0), 60)
    assert config.max_new_tokens == 4
    with pytest.raises(UsageError, match=r"the prompt has \d+ tokens, the model's context only 64"):
        generator.generate("word " * 100, Sampling(1))


def test_empty_prompt_starts_a_document(folders: dict[str, Path]) -> None:
    """From the end-of-document token, where there is no BOS."""
    generator = Generator(str(folders["megatron"]))
    assert generator._encode("").tolist() == [[generator.tokenizer.eos_token_id]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"top_k": -2}, "--top-k -2"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"top_p": 1.5}, "--top-p 1.5"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    """One line each."""
    with pytest.raises(UsageError, match=message):
        Sampling(**settings)


def test_prompts_from_a_file_and_from_standard_input(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One prompt a line; streaming gives the same text as printing at the end."""
    monkeypatch.setattr(logging, "disable", lambda _: None)  # the tool's, for its own process
    file = tmp_path / "prompts.txt"
    file.write_text("the class\na b c\n")
    outputs = []
    for source in (["--prompt-file", str(file)], ["--prompt-file", "-"], []):
        for how in ([], ["--no-stream"]):
            monkeypatch.setattr(sys, "stdin", io.StringIO(file.read_text()))
            flags = ["--load", str(folders["megatron"]), "--greedy", "--max-new-tokens", "5", *source, *how]
            monkeypatch.setattr(sys, "argv", ["generate.py", *flags])
            runpy.run_path(str(REPOSITORY / "tools" / "generate.py"), run_name="__main__")
            outputs.append(capsys.readouterr().out)
    assert outputs[0].startswith("the class")
    assert "\na b c" in outputs[0]
    assert set(outputs) == {outputs[0]}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num-samples", "0"], "--num-samples 0: must be at least 1"),
        (["--num-samples", "2", "--greedy"], "--num-samples 2: greedily chosen texts are all the same"),
        (["--system", "s"], "--system: belongs to a chat"),
    ],
)
def test_flags_without_a_meaning(
    flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(logging, "disable", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["g", "--load", "nowhere", *flags])
    with pytest.raises(SystemExit):
        runpy.run_path(str(REPOSITORY / "tools" / "generate.py"), run_name="__main__")
    assert said in capsys.readouterr().err


def test_missing_prompt_file(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Status 2."""
    monkeypatch.setattr(logging, "disable", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["g", "--load", str(folders["megatron"]), "--prompt-file", "nowhere.txt"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(REPOSITORY / "tools" / "generate.py"), run_name="__main__")
    assert caught.value.code == 2


def test_an_answer_ends_where_the_template_ends_it(folders: dict[str, Path]) -> None:
    """Whether or not a generation config says so."""
    generator = Generator(str(folders["huggingface"]))
    plain = generator._config(Sampling(8), 1).eos_token_id
    generator.tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    generator.model.resize_token_embeddings(len(generator.tokenizer))
    generator.tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<end>' }}{% endfor %}"
    generator.answer([{"role": "user", "content": "a"}], Sampling(1, 0.0))
    end = generator.tokenizer.convert_tokens_to_ids("<end>")
    assert generator._config(Sampling(8), 1).eos_token_id == [*plain, end]


def test_a_chat_is_asked_by_the_ids_of_fine_tuning(folders: dict[str, Path]) -> None:
    """The answer alone, the same from both forms; the template's text is tokens, a message's is not."""
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "<eos> the class"}]
    answers = []
    for folder in folders.values():
        generator = Generator(str(folder))
        generator.tokenizer.chat_template = TEMPLATES["vicuna"].replace("bos_token", "eos_token")
        answers.append(generator.answer(chat, Sampling(8, 1.0, seed=3)))
        ids = generator._encoder.prompt(chat).tolist()
        assert ids.count(generator.tokenizer.eos_token_id) == 1
    assert answers[0] == answers[1]
    assert "USER" not in answers[0]
