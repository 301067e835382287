"""The local layers and the CPU kernels against Megatron's own modules and PyTorch's formulas, forward and backward."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_meap.backend import device
from tests import warm
from tests.launch import free_port

device.prepare()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.common.embeddings import rope_utils  # noqa: E402
from megatron.core.optimizer import clip_grads  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel import cross_entropy as megatrons_cross_entropy  # noqa: E402
from megatron.core.tensor_parallel import layers as megatrons_layers  # noqa: E402
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.mlp import MLP  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_meap.backend import cpu_patches, kernels, layers, native  # noqa: E402
from megatron_meap.backend.attention import causal_attention  # noqa: E402
from megatron_meap.backend.layers import (  # noqa: E402
    CPUAttention,
    CPUNorm,
    CPUSwiGLU,
    Norm,
    SDPAttention,
    local_block_spec,
)

# Megatron's own functions, as they are before the CPU kernels take their places.
STOCK_ROTARY = rope_utils._apply_rotary_pos_emb_bshd
STOCK_CROSS_ENTROPY = megatrons_cross_entropy.vocab_parallel_cross_entropy
STOCK_LINEAR = megatrons_layers.linear_with_grad_accumulation_and_async_allreduce

pytestmark = pytest.mark.usefixtures("one_rank")

S, B, N, G, D = 48, 2, 6, 2, 16
TYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["compiled", "plain"])
def either(request, monkeypatch):
    """The kernels in C, and those in PyTorch where no compiler is."""
    if request.param == "plain":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C compiler")


def assert_same(own, reference, inputs: list[Tensor], tolerance: float | None = None) -> None:
    """Two functions of the same inputs agree in value and in all gradients, relative to the largest number."""
    results = []
    for function in (own, reference):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        out = function(*leaves)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        out.backward(weights)
        results.append([out, *(leaf.grad for leaf in leaves)])
    tolerance = tolerance or (1e-5 if inputs[0].dtype == torch.float32 else 2e-2)
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()


def config(**settings) -> TransformerConfig:
    defaults = {
        "num_layers": 1,
        "hidden_size": N * D,
        "num_attention_heads": N,
        "num_query_groups": G,
        "attention_dropout": 0.0,
        "masked_softmax_fusion": False,
        "normalization": "RMSNorm",
        "params_dtype": torch.float32,
    }
    return TransformerConfig(**(defaults | settings))


def attention(kind: type, **settings):
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    return kind(config(**settings), 1, AttnMaskType.causal, "self", pg_collection=groups)


def queries_keys_values(dtype: torch.dtype = torch.float32, groups: int = G) -> list[Tensor]:
    return [torch.randn(S, B, heads, D).to(dtype) for heads in (N, groups, groups)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("groups", [1, G, N])
@pytest.mark.parametrize("kind", [SDPAttention, CPUAttention])
def test_attention_is_megatrons(kind, groups, dtype):
    mine, theirs = (attention(each, num_query_groups=groups) for each in (kind, DotProductAttention))
    mask = torch.ones(1, 1, S, S, dtype=torch.bool).triu(1)
    assert_same(
        lambda *qkv: mine(*qkv, None), lambda *qkv: theirs(*qkv, mask), queries_keys_values(dtype, groups), None
    )


@pytest.mark.parametrize("length", [7, 131, 1030])
@pytest.mark.parametrize(("groups", "size", "dimensions"), [(G, 1.0, 16), (N, 4.0, 24), (1, 6.0, 64)])
def test_attention_by_products_rounds_as_pytorchs_does(either, length, groups, size, dimensions):
    """Against exact arithmetic: long rows and short ones, heads that share keys, scores of a hundred, any scale."""
    given = [(torch.randn(1, h, length, dimensions) * size).bfloat16() for h in (N, groups, groups)]
    scale = dimensions**-0.5
    weights = torch.randn(1, N, length, dimensions).bfloat16()
    plain = {"is_causal": True, "enable_gqa": True, "scale": scale}

    def results(function, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in given]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(dtype))]

    exact = results(lambda *qkv: functional.scaled_dot_product_attention(*qkv, **plain), torch.float64)
    pytorchs = results(lambda *qkv: functional.scaled_dot_product_attention(*qkv, **plain), torch.bfloat16)
    ours = results(lambda *qkv: causal_attention(*qkv, scale), torch.bfloat16)
    for truth, theirs, mine in zip(exact, pytorchs, ours, strict=True):
        allowed = 3 * (theirs - truth).norm() + 2**-8 * truth.norm()
        assert mine.shape == truth.shape
        assert (mine - truth).norm() <= allowed


def test_attention_by_products_where_the_processor_is_for_it_and_nothing_forbids_it(monkeypatch):
    calls = []
    monkeypatch.setattr(layers, "causal_attention", lambda *qkv: calls.append(1) or causal_attention(*qkv))
    monkeypatch.setattr(kernels, "attends_by_products", lambda dtype: dtype == torch.bfloat16)
    narrow, wide = queries_keys_values(torch.bfloat16), queries_keys_values()
    mask = torch.ones(1, 1, S, S, dtype=torch.bool).triu(1)
    attention(CPUAttention)(*narrow, None)
    assert calls == [1]
    attention(CPUAttention)(*wide, None)
    attention(CPUAttention)(*narrow, mask)
    attention(CPUAttention, window_size=(5, 0))(*narrow, None)
    attention(CPUAttention, attention_dropout=0.5).train()(*narrow, None)
    attention(CPUAttention)(narrow[0], narrow[1], narrow[2][..., :8], None)
    assert calls == [1]


@pytest.mark.parametrize("kind", [SDPAttention, CPUAttention])
def test_attention_obeys_a_mask(kind):
    mask = torch.rand(B, 1, S, S) < 0.3
    mask |= torch.ones(S, S, dtype=torch.bool).triu(1)
    mask &= ~torch.eye(S, dtype=torch.bool)
    mine, theirs = (attention(each) for each in (kind, DotProductAttention))
    assert_same(lambda *qkv: mine(*qkv, mask), lambda *qkv: theirs(*qkv, mask), queries_keys_values())


@pytest.mark.parametrize("window", [(5, 0), (1, 0), (S, 0), (-1, 0), (5, 3)])
@pytest.mark.parametrize("kind", [SDPAttention, CPUAttention])
def test_a_window_narrows_the_causal_mask_and_any_other(kind, window):
    """Against Megatron's attention under the mask of both together; nobody sees what comes after them."""
    distance = torch.arange(S)[:, None] - torch.arange(S)
    outside = (distance < 0) | ((distance > window[0]) if window[0] >= 0 else False)
    document = torch.bucketize(torch.arange(S), torch.tensor([7, 20]))
    other = ((document[:, None] != document) | (distance < 0)).expand(B, 1, S, S)
    mine, theirs = attention(kind, window_size=window), attention(DotProductAttention)
    for mask, both in ((None, outside.expand(B, 1, S, S)), (other, other | outside)):
        assert_same(lambda *qkv, m=mask: mine(*qkv, m), lambda *qkv, m=both: theirs(*qkv, m), queries_keys_values())


@pytest.mark.parametrize("window", [None, (5, 0)])
@pytest.mark.parametrize("kind", [SDPAttention, CPUAttention])
def test_packed_sequences_attend_as_separate_ones(kind, window):
    borders = [0, 7, 8, 30, S]
    layer = attention(kind, window_size=window)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor(borders, dtype=torch.int32))

    def separately(*qkv: Tensor) -> Tensor:
        parts = [layer(*(t[a:b].unsqueeze(1) for t in qkv), None) for a, b in itertools.pairwise(borders)]
        return torch.cat(parts)

    together = [torch.randn(S, heads, D) for heads in (N, G, G)]
    assert_same(lambda *qkv: layer(*qkv, None, packed_seq_params=packed), separately, together)


@pytest.mark.parametrize("window", [None, (5, 0)])
def test_the_kernel_for_packed_sequences_is_told_all_that_matters(window, monkeypatch):
    """It runs on GPUs only; a stand-in with its arguments does here what they say, a row and a column at a time."""
    borders = [0, 7, 8, 30, S]

    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert torch.equal(cu_seq_q, cu_seq_k)
        assert min(max_q, max_k) >= int(cu_seq_q.diff().max())
        before, after = (sys.maxsize if side < 0 else side for side in window_size)
        document = torch.searchsorted(cu_seq_q, torch.arange(len(q)), right=True)
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        seen = (document[:, None] == document) & (distance <= before) & (distance >= -after)
        heads = (tensor.transpose(0, 1) for tensor in (q, k, v))
        attend = functional.scaled_dot_product_attention
        return attend(*heads, attn_mask=seen, scale=scale, enable_gqa=enable_gqa).transpose(0, 1)

    layer = attention(SDPAttention, window_size=window)
    borders_tensor = torch.tensor(borders, dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=borders_tensor, max_seqlen_q=S, max_seqlen_kv=S)
    together = [torch.randn(S, heads, D).bfloat16() for heads in (N, G, G)]
    alone = layer(*together, None, packed_seq_params=packed)
    monkeypatch.setattr(layers.device, "is_cpu", lambda: False)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    by_kernel = layer(*together, None, packed_seq_params=packed)
    assert by_kernel.shape == alone.shape
    assert (by_kernel - alone).abs().max() <= 2e-2 * alone.abs().max()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("settings", [{}, {"layernorm_zero_centered_gamma": True}, {"normalization": "LayerNorm"}])
def test_norm_is_pytorchs(either, settings, dtype):
    mine = CPUNorm(config(params_dtype=dtype, **settings), 96, 1e-5)
    shift = 1.0 if settings.get("layernorm_zero_centered_gamma") else 0.0
    own, x = torch.rand(96).to(dtype), (3 * torch.randn(S, B, 96) + 1).to(dtype)

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        if mine.bias is not None:
            return functional.layer_norm(x, (96,), weight + shift, mine.bias, 1e-5)
        return functional.rms_norm(x.float(), (96,), (weight + shift).float(), 1e-5).to(dtype)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(mine, {"weight": weight}, (x,))

    assert_same(norm, reference, [x, own])


def test_norm_parameters_are_marked_for_sequence_parallelism():
    weight = Norm(config(), 8).weight
    assert weight.sequence_parallel is False
    marked = Norm(SimpleNamespace(**(vars(config()) | {"sequence_parallel": True})), 8)
    assert marked.weight.sequence_parallel is True


@pytest.mark.parametrize("dtype", TYPES)
def test_norm_of_zeros_is_zero(dtype):
    x = torch.zeros(4, 8, dtype=dtype, requires_grad=True)
    out = kernels.rms_norm(x, torch.ones(8, dtype=dtype), 1e-5)
    out.sum().backward()
    assert out.abs().max() == 0
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_swiglu_is_pytorchs(either, dtype):
    def reference(x: Tensor) -> Tensor:
        gate, up = x.float().chunk(2, dim=-1)
        return (functional.silu(gate) * up).to(dtype)

    assert_same(kernels.swiglu, reference, [3 * torch.randn(S, B, 64).to(dtype)])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("turned", [D, D // 2])
def test_rotary_embedding_is_megatrons(either, turned, dtype):
    freqs = torch.rand(S, 1, 1, turned) * 6
    x = torch.randn(S, B, N, D).to(dtype)
    cos_sin = cpu_patches._cos_sin(freqs, dtype, 1.2)
    assert_same(lambda t: kernels.rotate(t, *cos_sin), lambda t: STOCK_ROTARY(t, freqs, mscale=1.2), [x])


@pytest.mark.parametrize("dtype", TYPES)
def test_cross_entropy_is_megatrons(either, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_CACHED_NUMBERS", 700)  # several parts, the last one shorter
    logits, target = (4 * torch.randn(S, B, 320)).to(dtype), torch.randint(0, 320, (S, B))
    group = parallel_state.get_tensor_model_parallel_group()
    assert_same(
        lambda x: kernels.cross_entropy(x, target, group),
        lambda x: STOCK_CROSS_ENTROPY(x, target, tp_group=group),
        [logits],
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_the_gradient_of_the_logits_takes_their_place_and_is_had_once(dtype):
    weight = torch.randn(5, 320, dtype=dtype, requires_grad=True)
    logits = weight * 1.0
    loss = kernels.cross_entropy(logits, torch.randint(0, 320, (5,)))
    (gradient,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("dtype", TYPES)
def test_cross_entropy_of_extreme_logits_is_finite(dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], dtype=dtype, requires_grad=True)
    loss = kernels.cross_entropy(logits.clone(), torch.tensor([1, 2]))  # it overwrites them
    loss.sum().backward()
    assert torch.allclose(loss, functional.cross_entropy(logits.float(), torch.tensor([1, 2]), reduction="none"))
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("wide", [True, False])
def test_linear_is_megatrons(wide, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_multiplies_bf16_fast", lambda: not wide)
    group = parallel_state.get_tensor_model_parallel_group()
    x, weight = torch.randn(S, B, 96).to(dtype), torch.randn(64, 96).to(dtype)
    assert_same(
        kernels.linear, lambda x, w: STOCK_LINEAR(x, w, None, False, False, False, tp_group=group), [x, weight], None
    )


@pytest.mark.parametrize("shared", [True, False])
def test_linear_adds_its_gradient_to_the_main_gradient(shared, monkeypatch):
    monkeypatch.setattr(kernels, "_multiplies_bf16_fast", lambda: False)
    x, weight = torch.randn(S, B, 96).bfloat16(), torch.randn(64, 96).bfloat16().requires_grad_()
    weight.main_grad, weight.zero_out_wgrad = torch.ones(64, 96), shared
    for micro_batch in (1, 2):
        weight.grad, weight.grad_added_to_main_grad = None, False
        kernels.linear(x, weight).sum().backward()
        assert weight.grad_added_to_main_grad
        expected = 1 + micro_batch * x.float().sum((0, 1)).expand(64, 96)
        assert torch.allclose(weight.main_grad, expected, rtol=1e-4, atol=1e-3)
        assert weight.grad is not None
        assert not shared or weight.grad.abs().max() == 0


def test_gradient_norm_and_clipping_are_megatrons(kernels_installed):
    gradients = [torch.randn(5, 7), torch.randn(11)]
    norm, _ = clip_grads.l2_norm_impl(0, None, [gradients], False)
    assert torch.allclose(norm, torch.cat([each.flatten() for each in gradients]).norm().view(1))
    half = [each / 2 for each in gradients]
    clip_grads.multi_tensor_scale_impl(0, None, [gradients, gradients], 0.5)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(gradients, half, strict=True))


def test_adamw_is_the_fused_one_and_resumes_exactly(kernels_installed):
    def parameter() -> list[Tensor]:
        return [torch.nn.Parameter(torch.arange(6.0).view(2, 3))]

    def steps(optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            for tensor in optimizer.param_groups[0]["params"]:
                tensor.grad = torch.full_like(tensor, 0.1 * number)
            optimizer.step()

    straight = torch.optim.AdamW(parameter(), lr=0.1)
    assert straight.param_groups[0]["fused"]
    steps(straight, range(1, 7))
    first = torch.optim.AdamW(parameter(), lr=0.1)
    steps(first, range(1, 4))
    resumed = torch.optim.AdamW([each.detach().clone() for each in first.param_groups[0]["params"]], lr=0.1)
    resumed.load_state_dict(first.state_dict())
    steps(resumed, range(4, 7))
    ends = [optimizer.param_groups[0]["params"][0] for optimizer in (straight, resumed)]
    assert torch.equal(*ends)


def test_block_is_built_of_the_cpu_modules():
    settings = config(gated_linear_unit=True, activation_func=functional.silu, add_bias_linear=False)
    block = local_block_spec(SimpleNamespace(transformer=settings))
    layer = block.layer_specs[0].submodules
    assert block.layer_norm is layer.input_layernorm is layer.pre_mlp_layernorm is CPUNorm
    assert layer.self_attention.submodules.core_attention is CPUAttention
    assert layer.mlp.func == CPUSwiGLU.as_mlp_submodule


def test_swiglu_layer_is_megatrons_mlp():
    settings = config(
        gated_linear_unit=True, activation_func=functional.silu, add_bias_linear=False, use_cpu_initialization=True
    )
    layer = local_block_spec(SimpleNamespace(transformer=settings)).layer_specs[0].submodules.mlp
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    mine = layer(config=settings, pg_collection=groups, is_mtp_layer=False, ffn_hidden_size=settings.ffn_hidden_size)
    assert_same(lambda x: mine(x)[0], lambda x: MLP.forward(mine, x)[0], [torch.randn(S, B, N * D)])


@pytest.fixture
def kernels_installed(monkeypatch):
    """The CPU kernels in place for one test."""
    from megatron.core import tensor_parallel

    monkeypatch.setattr(torch.optim, "AdamW", STOCK_ADAMW)
    monkeypatch.setattr(clip_grads, "l2_norm_impl", clip_grads.l2_norm_impl)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_impl", clip_grads.multi_tensor_scale_impl)
    monkeypatch.setattr(rope_utils, "_apply_rotary_pos_emb_bshd", STOCK_ROTARY)
    monkeypatch.setattr(tensor_parallel, "vocab_parallel_cross_entropy", STOCK_CROSS_ENTROPY)
    monkeypatch.setattr(megatrons_layers, "linear_with_grad_accumulation_and_async_allreduce", STOCK_LINEAR)
    cpu_patches.install()


STOCK_ADAMW = torch.optim.AdamW


def _columns_of_the_vocabulary(rank: int, port: int, results) -> None:
    """One of two ranks that share a vocabulary: losses and the gradient of its own columns."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(9, 2, 64, generator=generator), torch.randint(0, 64, (9, 2), generator=generator)
    mine = logits.chunk(2, dim=-1)[rank].clone().requires_grad_()
    whole = logits.clone().requires_grad_()
    loss = kernels.cross_entropy(mine, target, torch.distributed.group.WORLD)
    expected = functional.cross_entropy(whole.view(-1, 64), target.view(-1), reduction="none").view(9, 2)
    weights = torch.rand(9, 2, generator=generator)
    (loss * weights).sum().backward()
    (expected * weights).sum().backward()
    wrong = (loss - expected).abs().max(), (mine.grad - whole.grad.chunk(2, dim=-1)[rank]).abs().max()
    results.put((rank, *(float(each) for each in wrong)))


def test_cross_entropy_over_two_ranks():
    results = warm.SERVER.Queue()
    port = free_port()
    ranks = [warm.SERVER.Process(target=_columns_of_the_vocabulary, args=(rank, port, results)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    found = sorted(results.get(timeout=120) for _ in ranks)
    for rank in ranks:
        rank.join()
    assert [rank for rank, *_ in found] == [0, 1]
    assert max(wrong for _, *both in found for wrong in both) < 1e-5
