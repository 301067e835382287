"""Megatron made fast on a CPU: where its trainer relies on CUDA kernels, it gets the fastest of PyTorch's for a CPU.

Installed with the CPU adaptation, never on a GPU, and without effect on the results beyond rounding. The modules of a
layer (norm, attention, MLP) are chosen in `layers`; this module replaces what no layer specification can. Each function
says what it replaces and what that gained in a training step of the 15.6M-parameter model, 8 x 512 tokens, on one core
of a Xeon with AVX512_BF16 and without AMX (6.5 s a step in bf16 before). All are for megatron-core 0.19, where none of
this is a defect: its kernels are for GPUs. Arguments that a later Megatron adds reach Megatron's own functions.
"""

import contextlib
import ctypes
from typing import Any

import torch
from torch import Tensor

from megatron_meap.backend import kernels, optimizer_step
from megatron_meap.backend.patching import replace, where_possible


def install() -> None:
    """Install all patches; a second call has no effect. Megatron must be importable (`device.prepare`)."""
    if getattr(torch.optim.AdamW, "meap_fused", False):
        return
    _keep_freed_memory()
    _multiply_in_the_fast_type()
    rotate_in_one_step()
    _cross_entropy_in_one_step()
    _send_matrices_one_by_one()
    optimizer_step.fuse()


def _keep_freed_memory() -> None:
    """Keep freed memory: glibc returns every tensor above 32 MiB to the kernel, and gets it back page by page.

    Writing 63 MiB of logits takes 17 ms in memory the process has kept, and 56 ms in new pages. Freed memory now
    stays with the process, for its next tensor.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)


def _multiply_in_the_fast_type() -> None:
    """Linear layers: multiply in 32-bit floats where that is faster, and add weight gradients to Megatron's buffer.

    Many processors list AVX512_BF16 but multiply bf16 at half the speed of 32-bit floats (83 against 165 GFLOP/s per
    core here), or not natively at all. The 32-bit product of the same bf16 operands is also rounded less, and its
    weight gradient goes into Megatron's 32-bit buffer without a copy: 2.0 s a step instead of 3.7.
    """
    from megatron.core.tensor_parallel import layers, mappings

    def linear(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gradient_accumulation_fusion: bool,  # of Apex's kernel; ours always does it
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        wgrad_deferral_limit: int | None = 0,  # of the buffer, which this fast path does not handle
        tp_group: Any = None,
    ) -> Tensor:
        if sequence_parallel:
            # Kept for the backward pass, where Megatron's own layer would gather it again.
            input = mappings.gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = mappings.copy_to_tensor_model_parallel_region(input, group=tp_group)
        output = kernels.linear(input, weight)
        return output if bias is None else output + bias

    replace(layers, "linear_with_grad_accumulation_and_async_allreduce", where_possible(linear))


def rotate_in_one_step() -> None:
    """RoPE: Megatron computes cosines and sines in every layer and writes seven tensors of the queries' size."""
    from megatron.core.models.common.embeddings import rope_utils

    def rotate(t: Tensor, freqs: Tensor, mscale: float = 1.0) -> Tensor:
        return kernels.rotate(t, *_cos_sin(freqs, t.dtype, mscale))

    replace(rope_utils, "_apply_rotary_pos_emb_bshd", where_possible(rotate))


def _cos_sin(freqs: Tensor, dtype: torch.dtype, mscale: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles, kept with them: all layers and steps share one tensor of angles."""
    kept = freqs.__dict__.setdefault("meap_cos_sin", {})
    if (dtype, mscale) not in kept:
        kept[dtype, mscale] = tuple((turn(freqs) * mscale).to(dtype) for turn in (torch.cos, torch.sin))
    return kept[dtype, mscale]


def _cross_entropy_in_one_step() -> None:
    """Vocabulary-parallel cross-entropy: three passes within the cache instead of a dozen over 32-bit logits.

    It also replaces `--cross-entropy-loss-fusion`, whose gradients Megatron rounds to bf16.
    """
    from megatron.core import tensor_parallel
    from megatron.core.models.common.language_module import language_module
    from megatron.core.utils import get_tensor_model_parallel_group_if_none

    def cross_entropy(vocab_parallel_logits: Tensor, target: Tensor, tp_group: Any = None) -> Tensor:
        return kernels.cross_entropy(vocab_parallel_logits, target, get_tensor_model_parallel_group_if_none(tp_group))

    replace(tensor_parallel, "vocab_parallel_cross_entropy", where_possible(cross_entropy))
    replace(language_module, "fused_vocab_parallel_cross_entropy", where_possible(cross_entropy))


def _send_matrices_one_by_one() -> None:
    """Muon's matrices, each updated by one data-parallel rank: gloo only gathers tensors of the same size.

    Megatron's alternative, which it keeps as a reference, gathers them one by one.
    """
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    replace(LayerWiseDistributedOptimizer, "allgather_params", lambda _: LayerWiseDistributedOptimizer.broadcast_params)
