"""How fast a device multiplies matrices: by its maker's data sheet, or measured here."""

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GPU:
    """A kind of GPU: speed from its maker's data sheet, memory as its driver reports it."""

    name: str
    tflops: float
    """Dense bf16 matrix products, 10^12 operations a second."""
    memory: float
    """GiB (2^30 bytes), rounded down."""


GPUS = {
    "a100-40": GPU("A100 40GB", 312, 39),
    "a100": GPU("A100 80GB", 312, 79),
    "h100": GPU("H100 SXM", 989, 79),
    "h200": GPU("H200 SXM", 989, 139),
    "b200": GPU("B200", 2250, 178),
    "l40s": GPU("L40S", 362, 44),
}


def matrix_peak(dtype: torch.dtype, cpu: bool) -> float:
    """FLOP/s of the fastest matrix product among some sizes that models have: the best of some repetitions."""
    device, repetitions, sizes = ("cpu", 20, (1024,)) if cpu else ("cuda", 50, (4096, 8192, 16384))
    best = 0.0
    for size in sizes:
        a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
        for count in (3, repetitions):  # the first warms up
            seconds = _seconds(a, b, out, count, cpu)
        best = max(best, 2 * size**3 / seconds)
    return best


def _seconds(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, count: int, cpu: bool) -> float:
    """Of one product: on a CPU, which others use too, the fastest; on a GPU, whose host runs ahead, the mean."""
    times = []
    for repetitions in [1] * count if cpu else [count]:
        if not cpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repetitions):
            torch.mm(a, b, out=out)
        if not cpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / repetitions)
    return min(times)
