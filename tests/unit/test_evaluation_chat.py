"""Log-probabilities under chat templates equal those of teacher forcing over the ids of fine-tuning."""

from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_meap.errors import UsageError
from megatron_meap.evaluation import models
from megatron_meap.evaluation.models import Model
from megatron_meap.sft.published import TEMPLATES
from megatron_meap.tokenization.huggingface import add_mask_token, begin_with_bos, from_sentencepiece, save_tokenizer
from tests.conftest import Corpus
from tests.templates import CHAT_TOKENS, GEMMA, GPT_OSS, QWEN3, R1, R1_FIRST

ALL = {**TEMPLATES, "qwen3": QWEN3, "gpt-oss": GPT_OSS, "r1 as it was": R1_FIRST, "r1": R1, "gemma": GEMMA}
QUESTION = {"role": "user", "content": "What is a list? "}
ANSWERS = [" A sequence.", "A mapping of keys", " nothing at all,\n or so"]


def model_folder(kind: str, corpus: Corpus, huggingface_folder: Path, made: Path) -> Path:
    """A random model, with a tokenizer that puts BOS before every text."""
    if kind == "sentencepiece":
        tokenizer = from_sentencepiece(Path(corpus.tokenizer))
    else:
        tokenizer = AutoTokenizer.from_pretrained(str(huggingface_folder))
        tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": CHAT_TOKENS})
    add_mask_token(tokenizer, "[MASK]")
    begin_with_bos(tokenizer)
    save_tokenizer(tokenizer, made, 256)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def folders(corpus: Corpus, huggingface_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model for each kind of tokenizer."""
    kinds = ("sentencepiece", "huggingface")
    return {kind: model_folder(kind, corpus, huggingface_folder, tmp_path_factory.mktemp(kind)) for kind in kinds}


CASES = [("huggingface", name) for name in ALL] + [("sentencepiece", name) for name in ("alpaca", "vicuna", "llama-2")]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_scores_are_those_of_teacher_forcing(folders: dict[str, Path], kind: str, name: str) -> None:
    """The generation prompt's ids, then what transformers has behind them in the whole conversation, to its end."""
    folder = folders[kind]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = ALL[name]
    tokenizer.save_pretrained(folder)
    loaded = models.load(Model("m", folder, str(folder), "m"), 2, "cpu", None, chat=True)
    text = loaded.apply_chat_template([QUESTION])
    requests = [Instance("loglikelihood", {}, (text, answer), number) for number, answer in enumerate(ANSWERS)]
    scores = loaded.loglikelihood(requests, disable_tqdm=True)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True, return_dict=False)
    for answer, (found, greedy) in zip(ANSWERS, scores, strict=True):
        chat = [QUESTION, {"role": "assistant", "content": answer.lstrip()}]
        whole = tokenizer.apply_chat_template(chat, return_dict=False)
        if name == "r1":  # its prompt opens thoughts, which the whole conversation does not
            whole = [*prompt, *tokenizer.encode(chat[1]["content"], add_special_tokens=False), tokenizer.eos_token_id]
        assert whole[: len(prompt)] == prompt
        scored = whole[len(prompt) :]
        while scored.pop() not in tokenizer.all_special_ids:
            pass
        while not tokenizer.decode(scored[-1:]).strip():  # Llama-2's space before EOS ends the answer, too
            scored.pop()
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + scored])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logits.gather(1, torch.tensor(scored)[:, None]).sum().item()
        assert chat[1]["content"].replace("\n", "") in tokenizer.decode(scored).replace("\n", "")
        assert found == pytest.approx(expected, abs=1e-3)
        assert greedy == bool((logits.argmax(-1) == torch.tensor(scored)).all())
    ids, mask = loaded.tok_batch_encode([text, loaded.apply_chat_template([QUESTION, *chat[1:], QUESTION])])
    assert ids[0][mask[0].bool()].tolist() == prompt


def test_a_system_prompt_that_the_template_refuses_is_left_out(folders: dict[str, Path]) -> None:
    """As lm-eval leaves it out of the text: a task's description is one."""
    folder = folders["huggingface"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = GEMMA
    tokenizer.save_pretrained(folder)
    loaded = models.load(Model("m", folder, str(folder), "m"), 2, "cpu", None, chat=True)
    plain, described = ([*system, QUESTION] for system in ([], [{"role": "system", "content": "Be brief."}]))
    pairs = [loaded._encode_pair(loaded.apply_chat_template(chat), " yes") for chat in (plain, described)]
    assert pairs[0] == pairs[1]
    with pytest.raises(UsageError, match="a prompt is refused by the chat template: Conversation roles"):
        loaded._taken([QUESTION, QUESTION])
