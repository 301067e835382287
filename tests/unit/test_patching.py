"""A replacement of a Megatron function handles the cases it knows; all others reach the original."""

import torch

from megatron_meap.backend import device

device.prepare()

from megatron.core.models.common.embeddings import rope_utils  # noqa: E402
from megatron.core.tensor_parallel import layers  # noqa: E402

from megatron_meap.backend import cpu_patches  # noqa: E402
from megatron_meap.backend.patching import original_of, replace, replaced, where_possible  # noqa: E402


class Owner:
    """Holds a function as a module does."""

    @staticmethod
    def rotate(t, freqs, interleaved=False, mscale=1.0, inverse=False):
        return "original", t, freqs, interleaved, mscale, inverse


def fast(t, freqs, mscale=1.0):
    return "fast", t, freqs, mscale


def test_the_fast_path_takes_what_it_knows_and_nothing_else():
    replace(Owner, "rotate", where_possible(fast))
    replace(Owner, "rotate", where_possible(fast))  # twice is once
    assert original_of(Owner, "rotate")(1, 2)[0] == "original"
    for known in (Owner.rotate(1, 2), Owner.rotate(1, freqs=2, inverse=False), Owner.rotate(1, 2, False, 1.0, False)):
        assert known == ("fast", 1, 2, 1.0)
    assert Owner.rotate(1, 2, mscale=3.0) == ("fast", 1, 2, 3.0)
    assert Owner.rotate(1, 2, inverse=True) == ("original", 1, 2, False, 1.0, True)
    assert Owner.rotate(1, 2, True) == ("original", 1, 2, True, 1.0, False)
    with replaced(Owner, "rotate", None):
        assert Owner.rotate is None
    assert Owner.rotate(1, 2)[0] == "fast"


def recorded(signature: str, calls: list) -> object:
    """A function with the given parameters that notes its calls."""
    scope = {"calls": calls}
    exec(f"def original({signature}): calls.append(locals())", scope)
    return scope["original"]


LINEAR = (
    "input, weight, bias, gradient_accumulation_fusion, allreduce_dgrad, sequence_parallel, grad_output_buffer=None, "
    "wgrad_deferral_limit=0, tp_group=None, gtp_remat_size=1, output_dtype=None"
)
ROTARY = (
    "t, freqs, rotary_interleaved=False, mla_rotary_interleaved=False, mscale=1.0, multi_latent_attention=None, "
    "inverse=False"
)


def test_arguments_of_megatron_core_0_20_reach_the_original(monkeypatch):
    """As on its main branch: the linear layer gained `output_dtype`, the rotary embedding `inverse`."""
    calls: list[dict] = []
    monkeypatch.setattr(layers, "linear_with_grad_accumulation_and_async_allreduce", recorded(LINEAR, calls))
    monkeypatch.setattr(rope_utils, "_apply_rotary_pos_emb_bshd", recorded(ROTARY, calls))
    cpu_patches._multiply_in_the_fast_type()
    cpu_patches.rotate_in_one_step()
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    linear = layers.linear_with_grad_accumulation_and_async_allreduce
    flags = {"gradient_accumulation_fusion": False, "allreduce_dgrad": False, "sequence_parallel": False}
    assert torch.allclose(linear(x, weight, None, **flags, wgrad_deferral_limit=None), x @ weight.t())
    assert not calls
    linear(x, weight, None, **flags, output_dtype=torch.float32)
    linear(x, weight, None, **flags, grad_output_buffer=[])
    assert [call["output_dtype"] for call in calls] == [torch.float32, None]
    angles, queries = torch.randn(3, 1, 1, 4), torch.randn(3, 2, 2, 4)
    forwards = rope_utils._apply_rotary_pos_emb_bshd(queries, angles, mscale=1.0, inverse=False)
    assert forwards.shape == queries.shape
    assert len(calls) == 2
    rope_utils._apply_rotary_pos_emb_bshd(queries, angles, inverse=True)
    assert calls[2]["inverse"] is True
