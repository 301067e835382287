"""The model's configuration, where it differs from that of Megatron's own builders."""

import pytest
import torch

from megatron_meap.backend import device
from megatron_meap.errors import UsageError
from megatron_meap.trainer import model
from tests.launch import MODEL
from tests.unit.test_planning_sizes import checked


@pytest.mark.parametrize("is_cpu", [True, False])
def test_a_model_that_the_cpu_has_initialised_goes_to_the_gpu(is_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's builder leaves it there; its older `get_model` does not."""
    args = checked([*MODEL, "--use-cpu-initialization"])
    args.padded_vocab_size = 64
    monkeypatch.setattr(device, "is_cpu", lambda: is_cpu)
    sent = []
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self, where: sent.append(self) or self)
    chunk = torch.nn.Linear(1, 1)
    for hook in model.model_config(args).pre_wrap_hooks:
        assert hook([chunk]) == [chunk]
    assert sent == ([] if is_cpu else [chunk])


@pytest.mark.parametrize("spec", ["nowhere a_spec", "megatron.core nothing", "local"])
def test_a_spec_that_is_lost_is_not_replaced(spec: str) -> None:
    args = checked([*MODEL, "--spec", *spec.split()])
    with pytest.raises(UsageError, match=f"^--spec {spec}: "):
        model.check(args)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--dataloader-inter-document-masking --softmax-type learnable", "--softmax-type learnable: its local layers"),
        ("--dataloader-inter-document-masking --apply-query-key-layer-scaling", "--apply-query-key-layer-scaling: its"),
        ("--recompute-granularity selective --recompute-modules layernorm", "--recompute-modules layernorm: needs"),
    ],
)
def test_what_local_layers_cannot_is_refused_before_they_are_asked(flags: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"^{said}"):
        checked([*MODEL, *flags.split()])
