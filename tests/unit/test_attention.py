"""The attention measures, compared with a forward pass written by hand; their inputs; their comparison."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
)

from megatron_meap.errors import UsageError
from megatron_meap.evaluation.attention.inputs import SEGMENTS, Inputs, make_inputs
from megatron_meap.evaluation.attention.measures import measure, observe, segment_mass, text_measures, uniform_attention
from megatron_meap.evaluation.attention.recipe import Recipe
from megatron_meap.evaluation.attention.report import comparison

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Grouped-query attention, with weights large enough that its attention is far from uniform."""
    torch.manual_seed(1)
    config = LlamaConfig(
        **SIZE, num_key_value_heads=2, vocab_size=610, max_position_embeddings=128, initializer_range=0.3
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer(huggingface_folder: Path) -> Any:
    loaded = AutoTokenizer.from_pretrained(huggingface_folder)
    loaded.add_special_tokens({"mask_token": "[MASK]"})
    return loaded


def attention_by_hand(model: LlamaForCausalLM, tokens: np.ndarray) -> np.ndarray:
    """[layers, heads, s, s] from the weights alone: RMSNorm, q and k with RoPE, softmax, SwiGLU, residuals."""
    weights = {name: value.double() for name, value in model.state_dict().items()}
    s, heads, groups, d = len(tokens), 4, 2, 8
    angles = torch.arange(s).double()[:, None] * 10000.0 ** (-torch.arange(0, d, 2).double() / d)
    cos, sin = angles.cos(), angles.sin()

    def rope(x: torch.Tensor) -> torch.Tensor:  # [n, s, d]
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt() * weights[name]

    x = weights["model.embed_tokens.weight"][torch.from_numpy(tokens)]
    every = []
    for layer in range(2):
        own = f"model.layers.{layer}."
        h = norm(x, own + "input_layernorm.weight")
        q, k, v = (
            (h @ weights[f"{own}self_attn.{name}_proj.weight"].T).view(s, n, d).transpose(0, 1)
            for name, n in (("q", heads), ("k", groups), ("v", groups))
        )
        k, v = (each.repeat_interleave(heads // groups, dim=0) for each in (rope(k), v))
        scores = rope(q) @ k.transpose(1, 2) / d**0.5
        attention = scores.masked_fill(torch.ones(s, s).triu(1).bool(), -torch.inf).softmax(dim=-1)
        every.append(attention)
        x = x + (attention @ v).transpose(0, 1).reshape(s, -1) @ weights[own + "self_attn.o_proj.weight"].T
        h = norm(x, own + "post_attention_layernorm.weight")
        gate, up = (h @ weights[f"{own}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ weights[own + "mlp.down_proj.weight"].T
    return torch.stack(every).numpy()


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    random = np.random.default_rng(0)
    segments = np.repeat([0, 1, 2, 3], [30, 4, 50, 13])
    return Inputs(
        random.integers(0, 600, (3, 97)), random.random((3, 97)) < 0.15, random.integers(0, 600, (3, 97)),
        np.tile(segments, (3, 1)),
    )  # fmt: skip


def test_figures_agree_with_the_weights(model: LlamaForCausalLM, inputs: Inputs) -> None:
    """Every measure, layer and head, entry by entry from the attention by hand."""
    measures = measure(model, inputs, mask_id=600)
    for i in range(3):
        masked = inputs.masked[i]
        for tokens, mass, variance in (
            (np.where(masked, 600, inputs.texts[i]), measures.masked_attention, measures.variance),
            (inputs.texts[i], measures.clean_attention, measures.clean_variance),
        ):
            attention = attention_by_hand(model, tokens)
            rows = range(48, 97)
            expected_mass = np.mean([attention[:, :, q, : q + 1][..., masked[: q + 1]].sum(-1) for q in rows], axis=0)
            expected = np.mean([attention[:, :, q, : q + 1][..., ~masked[: q + 1]].var(-1) for q in rows], axis=0)
            assert mass[i] == pytest.approx(expected_mass, rel=1e-4)
            assert variance[i] == pytest.approx(expected, rel=1e-3)
        last = attention_by_hand(model, inputs.prompts[i])[:, :, -1]
        for number in range(len(SEGMENTS)):
            expected = last[:, :, inputs.segments[i] == number].sum(-1)
            assert measures.segments[i, number] == pytest.approx(expected, rel=1e-4)
    assert measures.segments.sum(axis=1) == pytest.approx(1.0)
    assert np.ptp(measures.masked_attention) > 0.01


@pytest.mark.parametrize("room", [1, 97 * 10, 97 * 97])
def test_blocks_give_the_whole_attention(model: LlamaForCausalLM, inputs: Inputs, room: int) -> None:
    whole = np.zeros((2, 4, 97, 97))
    seen = []

    def see(layer: int, first: int, weights: torch.Tensor) -> None:
        assert weights.shape[1] * 97 <= max(room, 97)
        whole[layer, :, first : first + weights.shape[1], : weights.shape[2]] = weights.numpy()
        seen.append(layer)

    observe(model, inputs.texts[0], see, room)
    assert seen == sorted(seen)
    assert whole == pytest.approx(attention_by_hand(model, inputs.texts[0]), abs=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SIZE, num_key_value_heads=2, vocab_size=610, sliding_window=20),
        Qwen2Config(**SIZE, num_key_value_heads=2, vocab_size=610),
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=610),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures(config: Any, inputs: Inputs) -> None:
    """What transformers itself returns where it keeps every layer's attention whole."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    whole = np.zeros((2, 4, 97, 97))

    def see(layer: int, first: int, weights: torch.Tensor) -> None:
        whole[layer, :, first : first + weights.shape[1], : weights.shape[2]] = weights.numpy()

    observe(model, inputs.texts[0], see, room=1000)
    with torch.no_grad():
        attentions = model(torch.from_numpy(inputs.texts[:1]), output_attentions=True).attentions
    assert whole == pytest.approx(torch.cat(attentions).numpy(), abs=1e-6)
    assert whole.sum(axis=-1) == pytest.approx(1.0, abs=1e-5)


def test_observing_leaves_the_model_as_it_was(model: LlamaForCausalLM, inputs: Inputs) -> None:
    tokens = torch.from_numpy(inputs.texts[:1])
    before = model.config._attn_implementation, model(tokens).logits
    observe(model, inputs.texts[0], lambda *_: None)
    assert model.config._attn_implementation == before[0]
    assert torch.equal(model(tokens).logits, before[1])


def test_uniform_attention_is_known(inputs: Inputs) -> None:
    """A model without queries attends to all alike."""
    model = LlamaForCausalLM(LlamaConfig(**SIZE, vocab_size=610)).eval()
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    mass, variance = text_measures(model, inputs.texts[0], inputs.masked[0])
    assert mass == pytest.approx(uniform_attention(inputs.masked[:1]), rel=1e-5)
    assert variance == pytest.approx(0.0, abs=1e-9)
    segments = segment_mass(model, inputs.prompts[0], inputs.segments[0])
    assert segments[:, 0, 0] == pytest.approx(np.array([30, 4, 50, 13]) / 97, rel=1e-5)


def test_comparison_is_the_papers_ratios(model: LlamaForCausalLM, inputs: Inputs) -> None:
    measures = measure(model, inputs, mask_id=600)
    assert comparison(measures, measures)["attention decay"] == {"value": 0.0, "interval": [0.0, 0.0]}
    half = type(measures)(measures.masked_attention / 2, measures.variance * 3, *[measures.clean_attention] * 2,
                          measures.segments * 2)  # fmt: skip
    changes = comparison(measures, half)
    assert changes["attention decay"]["value"] == pytest.approx(0.5)
    assert changes["variance increase"]["value"] == pytest.approx(2.0)
    assert changes["answer mass"]["value"] == pytest.approx(1.0)
    decay = 1 - half.masked_attention.mean() / measures.clean_attention.mean()
    reading = changes["attention decay, baseline reads clean text"]
    assert reading["value"] == pytest.approx(decay)
    assert reading["interval"][0] <= decay <= reading["interval"][1]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, corpus: Any) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(corpus.documents[:20]))
    return str(path)


def test_inputs(tokenizer: Any, text: str) -> None:
    made = make_inputs(text, tokenizer, Recipe(128, samples=5))
    again = make_inputs(text, tokenizer, Recipe(128, samples=5))
    other = make_inputs(text, tokenizer, Recipe(128, samples=5, seed=2))
    assert all(np.array_equal(getattr(made, name), getattr(again, name)) for name in vars(made))
    assert not np.array_equal(made.masked, other.masked)
    assert not np.array_equal(made.prompts, other.prompts)
    assert (made.masked.sum(axis=1) == int(0.15 * 128)).all()
    assert Path(text).read_text().startswith(tokenizer.decode(made.texts[:2].ravel()))
    starts = []
    for tokens, segments in zip(made.prompts, made.segments, strict=True):
        parts = [tokenizer.decode(tokens[segments == i]) for i in range(len(SEGMENTS))]
        assert re.fullmatch(r" The secret number of \w+ is", parts[3])
        assert parts[0].rstrip().endswith(parts[3])
        assert re.fullmatch(r" ?\d{5}", parts[1])
        assert parts[2].startswith(". ")
        assert (np.diff(segments) >= 0).all()
        starts.append(len(parts[0]))
    assert starts == sorted(starts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 4}, "--length 4: too short for the needle and the question"),
        ({"samples": 100_000}, r"has [\d,]+ tokens, 100000 samples of 128 need 12,800,000; give more text"),
        ({"samples": 0}, "--samples 0: must be at least 1"),
        ({"mask_ratio": 1.0}, "--mask-ratio 1.0: must lie between 0 and 1"),
        ({"needle": "no place"}, "--needle: must contain {key} and {value}"),
        ({"question": "no key"}, "--question: must contain {key}"),
    ],
)
def test_bad_recipes_are_one_line(tokenizer: Any, text: str, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_inputs(text, tokenizer, Recipe(**{"length": 128, **changes}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b'{"text": "a"}\n{"txt": "b"}\n', "document 2: no key 'text', only txt"),
        (b"\x00\x01", "document 1: not JSON"),
        (b"", "has 0 tokens"),
    ],
)
def test_bad_text_is_one_line(tmp_path: Path, tokenizer: Any, content: bytes | None, message: str) -> None:
    path = tmp_path / "text.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        make_inputs(str(path), tokenizer, Recipe(128))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
