"""The model card of an exported model: how it was trained, as far as its checkpoint and data say."""

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_meap.huggingface.architecture import Architecture
from megatron_meap.meap.settings import MaskSettings
from megatron_meap.trainer.carried import manifests

TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [meap, megatron-core]
---

# {name}

*This card is a stub, written by `tools/convert_checkpoint.py export`: describe the data and the intended use here.*

A causal language model of {parameters:.1f}M parameters, {objective} on NVIDIA Megatron Core.

| | |
|---|---|
{table}

The mask token {mask} (id {mask_id}) belongs to training: `generation_config.json` suppresses it in generation. To mask
an input, write the id into `input_ids`; text that merely contains the characters is best tokenized with
`split_special_tokens=True`.
"""


def write_card(directory: Path, name: str, model: Architecture, parameters: int, args: Namespace, step: int) -> None:
    """Write README.md.

    Args:
        directory: where to.
        name: of the model.
        model: its architecture.
        parameters: number of weights.
        args: arguments of the training run.
        step: iteration of the checkpoint.
    """

    def get(argument: str) -> Any:
        return getattr(args, argument, None)

    ratio = get("meap_mask_ratio") or 0
    strategy = get("meap_mask_strategy")
    settings = dataclasses.replace(MaskSettings.of(args), mask_ratio=ratio)
    tokens = (get("consumed_train_samples") or 0) * (get("seq_length") or 0)
    rows = {
        "Layers, hidden, heads, key/value heads": f"{model.layers}, {model.hidden}, {model.heads}, {model.groups}",
        "Context": f"{get('seq_length')} tokens in training, {model.max_positions} at most",
        "MEAP mask ratio": ratio or "0 (next-token prediction)",
        "MEAP mask strategy": strategy if ratio else "none",
        "MEAP mask seed": get("meap_mask_seed") if ratio else "none",
        "Objective": settings.expanded(),
        "Input noise": settings.words("answer tokens" if get("meap_sft") else "input tokens"),
        **({"Budget": f"half of it noised copies, {tokens // 2:,} tokens of the data"} if settings.copy_weight else {}),
        "Tokens seen": f"{tokens:,}" if tokens else "unknown",
        "Iteration": step,
        "Global batch": f"{get('global_batch_size')} sequences",
        "Learning rate": f"{get('lr')} to {get('min_lr')}, {get('lr_decay_style')}",
        "Weight decay": get("weight_decay"),
        "Precision": "bf16" if get("bf16") else "fp16" if get("fp16") else "fp32",
        "Seed": get("seed"),
    }
    for dataset, digest, manifest in manifests(args):
        size = f"{manifest['tokens']:,} tokens, " if "tokens" in manifest else ""
        rows[f"Data `{dataset}`"] = f"{size}manifest sha256 `{digest}`"
    verb, masked = ("fine-tuned", "answer") if get("meap_sft") else ("pretrained", "input")
    method = "next-token prediction"
    if ratio and settings.is_meap:
        method = f"MEAP (arXiv 2502.07490, {ratio:.0%} of the {masked} tokens masked)"
    elif ratio:
        method = f"noised inputs ({settings.words(f'{masked} tokens')})"
    text = TEMPLATE.format(
        name=name,
        parameters=parameters / 1e6,
        objective=f"{verb} with {method}",
        table="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        mask=get("meap_mask_token"),
        mask_id=get("meap_mask_token_id"),
    )
    (directory / "README.md").write_text(text)
