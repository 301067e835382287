"""The kernels in C: where they are available, and their arithmetic at its limits."""

from pathlib import Path

import pytest
import torch

from megatron_meap.backend import kernels, native
from megatron_meap.backend.attention import causal_attention

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler")


@needs_compiler
def test_they_are_compiled_once_into_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native._loaded.__wrapped__()[0] is not None
    (built,) = (tmp_path / "megatron-meap").iterdir()
    before = built.stat().st_mtime_ns
    assert native._loaded.__wrapped__()[0] is not None
    assert built.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("name", "value"), [("CC", "no-such-compiler"), ("CC", "false"), ("MEAP_CPU_COMPILE", "0"), ("XDG_CACHE_HOME", "")]
)
def test_without_them_pytorch_computes(tmp_path, monkeypatch, name, value):
    """No compiler, one that fails, not wanted, no place to put them."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(name, value or str(tmp_path / "file"))
    assert native._loaded.__wrapped__()[0] is None
    assert not list(Path(tmp_path).rglob("*.so"))


@needs_compiler
def test_every_number_that_a_logit_can_be_has_its_exponential():
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite() & (every.abs() < 80)]
    pairs = torch.stack([every, torch.zeros_like(every)], dim=1).contiguous()
    loss = kernels.cross_entropy(pairs, torch.ones(len(pairs), dtype=torch.int64))
    exact = torch.nn.functional.softplus(every.double(), threshold=1000)
    assert ((loss - exact).abs() <= 1e-6 * exact + 1e-7).all()


@needs_compiler
def test_what_is_no_number_stays_none():
    """A step whose loss is NaN is refused by what comes after it."""
    nan = torch.zeros(1, 1, 16, 16).bfloat16()
    nan[0, 0, 3, 3] = float("nan")
    rows, weight = nan.view(16, 16), torch.ones(16).bfloat16()
    cos, sin = torch.ones(2, 16, 1, 16).bfloat16()
    results = [
        kernels.rms_norm(rows, weight, 1e-5),
        kernels.swiglu(rows),
        kernels.rotate(rows.view(16, 1, 16), cos, sin),
        kernels.cross_entropy(rows.clone(), torch.zeros(16, dtype=torch.int64)),
        causal_attention(nan, nan, nan, 1.0),
    ]
    assert all(result.isnan().any() for result in results)


@needs_compiler
def test_bits_do_not_depend_on_the_threads():
    """Otherwise a repeated run, or one resumed beside other processes, would differ in the last bit."""
    generator = torch.Generator().manual_seed(1)
    x, grad, weight = (torch.randn(*shape, generator=generator) for shape in ((333, 96), (333, 96), (96,)))
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        inputs = [each.bfloat16().requires_grad_() for each in (x, weight)]
        kernels.rms_norm(*inputs, 1e-5).backward(grad.bfloat16())
        found.append([each.grad for each in inputs])
    torch.set_num_threads(before)
    assert all(torch.equal(*pair) for one in found[1:] for pair in zip(found[0], one, strict=True))
