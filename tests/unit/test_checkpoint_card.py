"""The model card says how the model was trained."""

import hashlib
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_meap.huggingface.architecture import Architecture
from megatron_meap.huggingface.card import write_card
from tests.unit.preprocessing import write_manifest

MODEL = Architecture(
    layers=2, hidden=64, ffn=96, heads=4, groups=2, head_dim=16, vocabulary=512, max_positions=128, tied=True,
    norm_epsilon=1e-5, rope_base=10000,
)  # fmt: skip


@pytest.mark.parametrize(
    ("ratio", "objective"), [(0.15, "MEAP (arXiv 2502.07490, 15%"), (0.0, "next-token prediction")]
)
def test_training_settings_and_data(tmp_path: Path, ratio: float, objective: str) -> None:
    """Ratio, strategy, tokens seen, and the hash of every data manifest that can be found."""
    write_manifest(tmp_path / "corpus_text", tokens=1234567)
    manifest = (tmp_path / "corpus_text.manifest.json").read_bytes()
    args = Namespace(
        meap_mask_ratio=ratio, meap_mask_strategy="span", meap_mask_token="[MASK]", meap_mask_token_id=511,
        consumed_train_samples=100, seq_length=128, data_path=["0.7", str(tmp_path / "corpus_text"), "0.3", "gone"],
    )  # fmt: skip
    write_card(tmp_path, "demo", MODEL, 2_000_000, args, 40)
    card = (tmp_path / "README.md").read_text()
    assert objective in card
    assert f"| MEAP mask strategy | {'span' if ratio else 'none'} |" in card
    assert "| Tokens seen | 12,800 |" in card
    assert f"1,234,567 tokens, manifest sha256 `{hashlib.sha256(manifest).hexdigest()}`" in card
    assert "(id 511)" in card
