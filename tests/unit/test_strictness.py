"""A checkpoint may lack only the extra state of Transformer Engine's layers."""

from argparse import Namespace

import pytest
from megatron.core.dist_checkpointing import validation
from megatron.training import global_vars

from megatron_meap.backend import megatron_patches
from megatron_meap.errors import UsageError

EXTRA = {"decoder.final_layernorm._extra_state", "decoder.layers.mlp.linear_fc1._extra_state"}
WEIGHTS = {"decoder.layers.self_attention.q_layernorm.weight", "optimizer.state.exp_avg.output_layer.weight"}


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch):
    """Megatron's report with a strictness, after our patches."""
    megatron_patches.apply()

    def call(strictness: str, unexpected: set[str]) -> None:
        monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", Namespace(dist_ckpt_strictness=strictness))
        validation.maybe_report_missing_and_unexpected_keys(set(), unexpected, raise_error=False)

    return call


def test_extra_state_may_be_missing(report) -> None:
    report("log_unexpected", EXTRA)


@pytest.mark.parametrize("weight", sorted(WEIGHTS))
def test_weights_may_not(report, weight: str) -> None:
    with pytest.raises(UsageError, match=weight):
        report("log_unexpected", EXTRA | {weight})


def test_whoever_asks_for_it_starts_them_anew(report, caplog: pytest.LogCaptureFixture) -> None:
    report("log_all", EXTRA | WEIGHTS)
    assert all(weight in caplog.text for weight in WEIGHTS)
