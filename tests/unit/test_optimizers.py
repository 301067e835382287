"""Optimizers other than Adam: what cannot run is refused before the start."""

from argparse import Namespace

import pytest
import torch
from megatron.core.optimizer import emerging_optimizers

from megatron_meap.errors import UsageError
from megatron_meap.trainer import optimizers


def muon(**changes: object) -> Namespace:
    given = {
        "optimizer": "muon", "bf16": False, "fp16": False, "use_distributed_optimizer": False,
        "use_layer_wise_distributed_optimizer": False, "muon_coefficient_type": "quintic", "muon_num_ns_steps": 5,
        "muon_fp32_matmul_prec": "medium", "num_distributed_optimizer_instances": 1,
        "overlap_param_gather_with_optimizer_step": False, "expert_model_parallel_size": 1, "add_bias_linear": True,
        "use_layer_wise_param_layout": True,
    }  # fmt: skip
    return Namespace(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fp16": True}, "--optimizer muon: .* drop --fp16"),
        ({"use_layer_wise_distributed_optimizer": True}, "--use-distributed-optimizer: .* --bf16"),
        ({"muon_coefficient_type": "quartic"}, "--muon-coefficient-type quartic: none of simple, quintic"),
        ({"muon_coefficient_type": "custom"}, "--muon-coefficient-type custom: none of"),
        ({"muon_num_ns_steps": 0}, "--muon-num-ns-steps 0: must be at least 1"),
        ({"muon_fp32_matmul_prec": "low"}, "--muon-fp32-matmul-prec low: PyTorch has no such precision"),
    ],
)
def test_what_cannot_run_is_refused(changes, message) -> None:
    pytest.importorskip("emerging_optimizers")
    optimizers.check(muon())
    optimizers.check(muon(bf16=True, use_layer_wise_distributed_optimizer=True))
    with pytest.raises(UsageError, match=message):
        optimizers.check(muon(**changes))


@pytest.mark.parametrize("changed", ["num_distributed_optimizer_instances", "expert_model_parallel_size"])
def test_matrices_are_shared_out_only_where_megatron_can(changed: str) -> None:
    pytest.importorskip("emerging_optimizers")
    shared = {"bf16": True, "use_layer_wise_distributed_optimizer": True}
    optimizers.check(muon(bf16=True, **{changed: 2}))
    with pytest.raises(UsageError, match=f"--{changed.replace('_', '-')}: .*--optimizer muon and --use-distributed-"):
        optimizers.check(muon(**shared, **{changed: 2}))
    optimizers.check(muon(**shared, expert_model_parallel_size=2, add_bias_linear=False))


def test_adaptive_muon_is_refused_where_megatrons_lacks_its_scale() -> None:
    pytest.importorskip("emerging_optimizers")
    adaptive = emerging_optimizers.TensorParallelAdaptiveMuon
    weight = torch.nn.Parameter(torch.ones(4, 4))
    weight.grad = torch.ones(4, 4)
    with pytest.raises(AttributeError, match="scale_mode"):  # else the refusal is not needed any longer
        adaptive([weight]).step()
    with pytest.raises(UsageError, match=r"--optimizer adaptive_muon: .* in the first step; use muon"):
        optimizers.check(muon(optimizer="adaptive_muon"))


@pytest.mark.parametrize("name", ["muon", "soap", "lion"])
def test_a_missing_package_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emerging_optimizers, "HAVE_EMERGING_OPTIMIZERS", False)
    optimizers.check(muon(optimizer="adam"))
    with pytest.raises(UsageError, match=rf"--optimizer {name}: needs the package emerging-optimizers.*pip install"):
        optimizers.check(muon(optimizer=name))
