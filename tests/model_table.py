"""The tables of docs/huggingface.md: what converts, measured, and what is refused, with its line.

TORCHDYNAMO_DISABLE=1 python -m tests.model_table        writes them anew (a minute or two)
"""

import re
import shlex
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from megatron_meap.checkpoint.reader import open_checkpoint
from megatron_meap.errors import UsageError
from megatron_meap.huggingface.architecture import from_huggingface, not_exported
from megatron_meap.huggingface.export import ExportJob, export
from megatron_meap.huggingface.importer import FLAGS_FILE, ImportJob, import_model
from megatron_meap.huggingface.selfcheck import compare
from tests.launch import REPOSITORY, launch_many
from tests.models import LLAMA3, MODELS, SMALL, save_random_model

PAGE = REPOSITORY / "docs" / "huggingface.md"
LENGTH = 96
RUN = [
    *("--seq-length", str(LENGTH), "--micro-batch-size", "1", "--fp32", "--split", "1,0,0", "--eval-iters", "0"),
    *("--log-interval", "1", "--num-workers", "0"),
]
STANDING_STILL = [
    *("--global-batch-size", "1", "--train-iters", "1", "--lr", "0", "--min-lr", "0", "--weight-decay", "0"),
    *("--meap-mask-ratio", "0"),
]

REFUSED_IMPORTS: dict[str, dict[str, Any]] = {
    "Qwen3-MoE with some dense layers": {"model_type": "qwen3_moe", "mlp_only_layers": [0]},
    "one expert a token": {"model_type": "mixtral", "num_experts_per_tok": 1},
    "Qwen2-MoE (shared experts)": {"model_type": "qwen2_moe"},
    "DeepSeek-V3": {"model_type": "deepseek_v3"},
    "OLMo 2 (norms after the layers)": {"model_type": "olmo2"},
    "Gemma 2": {"model_type": "gemma2"},
    "Phi-3": {"model_type": "phi3"},
    "GPT-2": {"model_type": "gpt2"},
    "dynamic NTK scaling": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
    "a part of a head rotated": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    },
    "Llama 3's scaling, other frequencies": {"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}},
    "a window in some layers": {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
    "quantized weights": {"quantization_config": {"quant_method": "awq"}},
}
"""Settings of a config.json, by what makes it another model."""

EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "moe_ffn_hidden_size": 96,
    "moe_layer_freq": 1,
    "moe_router_topk": 2,
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "softmax",
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.0,
}
"""Arguments of a mixture of experts that converts."""

REFUSED_EXPORTS: dict[str, dict[str, Any]] = {
    "shared experts": EXPERTS | {"moe_shared_expert_intermediate_size": 32},
    "experts in some layers": EXPERTS | {"moe_layer_freq": 2},
    "experts by sigmoid": EXPERTS | {"moe_router_score_function": "sigmoid"},
    "experts that drop tokens": EXPERTS | {"moe_expert_capacity_factor": 1.25},
    "experts with biases": EXPERTS | {"add_bias_linear": True},
    "softmax over all experts without normalised queries": EXPERTS | {"moe_router_pre_softmax": True},
    "hybrid models": {"hybrid_layer_pattern": "M*-"},
    "multi-latent attention": {"multi_latent_attention": True},
    "LayerNorm": {"normalization": "LayerNorm"},
    "another activation": {"swiglu": False},
    "learned positions": {"position_embedding_type": "learned_absolute"},
    "a part of a head rotated": {"rotary_percent": 0.5},
    "a window in some layers": {"window_size": (64, 0), "window_attn_skip_freq": 2},
    "extras that no class has together": {"qk_layernorm": True, "window_size": (64, 0)},
}
"""Arguments of a training run, by what makes its model another one."""


@dataclass(frozen=True)
class Measured:
    """One model, imported, trained and exported."""

    imported: float
    """Largest difference of the logits."""
    exported: float
    """The same for the export."""
    trained: float
    """The loss in the trainer's log, less that of transformers."""


def measure(names: Iterable[str], tokenizer: Path, folder: Path) -> dict[str, Measured]:
    """Import each model, start a training of learning rate 0 with the flags written, and export it."""
    runs = {name: [*flags, *STANDING_STILL] for name, flags in imported_runs(names, tokenizer, folder).items()}
    losses = {name: run.losses()[0] for name, run in launch_many(1, runs, folder).items()}
    found = {}
    for name, loss in losses.items():
        original, imported, exported = (folder / name / part for part in ("original", "imported", "exported"))
        export(ExportJob(str(imported), str(exported), check=False))
        differences = [
            compare(original, imported / "release", torch.float32, 600),
            compare(exported, imported / "release", torch.float32, None),
        ]
        found[name] = Measured(*differences, abs(loss - _loss(original, imported)))
    return found


def imported_runs(names: Iterable[str], tokenizer: Path, folder: Path) -> dict[str, list[str]]:
    """Import each model; the flags of a run that starts with it: those written, and its data."""
    prefix, runs = _data(folder), {}
    for name in names:
        original, imported = folder / name / "original", folder / name / "imported"
        save_random_model(MODELS[name], tokenizer, original)
        import_model(ImportJob(str(original), str(imported), check=False))
        flags = shlex.split((imported / FLAGS_FILE).read_text())
        runs[name] = [*flags, *RUN, "--data-path", prefix, "--pretrained-checkpoint", str(imported)]
    return runs


def _data(folder: Path) -> str:
    """A dataset of a single sample; its prefix."""
    builder = IndexedDatasetBuilder(str(folder / "data.bin"), dtype=DType.optimal_dtype(600))
    builder.add_document(_tokens(), [LENGTH + 1])
    builder.finalize(str(folder / "data.idx"))
    return str(folder / "data")


def _tokens() -> torch.Tensor:
    """The sample: inputs and, one further, labels."""
    return torch.randint(5, 600, (LENGTH + 1,), generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def _loss(original: Path, imported: Path) -> float:
    """The loss by transformers, with the head that the import has made longer."""
    model, checkpoint = AutoModelForCausalLM.from_pretrained(original), open_checkpoint(imported)
    head = "embedding.word_embeddings.weight" if model.config.tie_word_embeddings else "output_layer.weight"
    logits = model.model(_tokens()[None, :-1]).last_hidden_state[0] @ checkpoint.read(head).T
    return torch.nn.functional.cross_entropy(logits, _tokens()[1:]).item()


def refusals() -> Iterator[tuple[str, str, str]]:
    """Direction, what it is, and what the line says of it, of all that is refused."""
    for what, changes in REFUSED_IMPORTS.items():
        settings = {"model_type": "llama", "vocab_size": 640, **SMALL, **changes}
        try:
            from_huggingface(AutoConfig.for_model(settings.pop("model_type"), **settings))
        except UsageError as error:
            yield "import", what, str(error).partition("; supported are")[0]
    for what, changes in REFUSED_EXPORTS.items():
        for line in not_exported(Namespace(**PLAIN | changes)):
            yield "export", what, line.partition("Hugging Face: ")[2].partition("; supported are")[0]


PLAIN: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "group_query_attention": True,
    "kv_channels": 16,
    "padded_vocab_size": 640,
    "max_position_embeddings": 128,
    "untie_embeddings_and_output_weights": True,
    "layernorm_epsilon": 1e-5,
    "rotary_base": 10000,
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
}
"""Arguments of a model that converts."""


def refused_table() -> str:
    """In Markdown."""
    lines = [f"| {way} | {what} | `{line}` |" for way, what, line in refusals()]
    return "\n".join(["| | what | the line |", "|---|---|---|", *lines])


def measured_table(found: dict[str, Measured]) -> str:
    """In Markdown."""
    lines = [
        f"| {name} | `{type(MODELS[name]).__name__.removesuffix('Config')}ForCausalLM` | {row.imported:.0e} | "
        f"{row.exported:.0e} | {row.trained:.0e} |"
        for name, row in found.items()
    ]
    head = "| model | class | logits, imported | logits, exported | loss of the trainer |"
    return "\n".join([head, "|---|---|---|---|---|", *lines])


def on_page(mark: str, text: str | None = None) -> str:
    """The table under a mark of the page, replaced by `text` where given."""
    page = PAGE.read_text()
    found = re.search(rf"<!-- {mark} -->\n(.*?)\n<!-- end -->", page, re.DOTALL)
    assert found is not None, mark
    if text is not None:
        PAGE.write_text(page[: found.start(1)] + text + page[found.end(1) :])
    return found[1]


def main() -> None:
    """Measure all, and write the page."""
    import pydoc_data.topics

    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, special_tokens=["<eos>"])
    model.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>").save_pretrained(folder / "tokenizer")
        on_page("measured: models", measured_table(measure(MODELS, folder / "tokenizer", folder)))
    on_page("drawn: refused", refused_table())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    from megatron_meap.backend import device

    device.prepare()
    main()
