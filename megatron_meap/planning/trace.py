"""One micro batch through a rank's part of the model, on tensors without memory: what is alive, and when.

PyTorch's `FakeTensorMode` runs Megatron's own modules on shapes only. Every storage that an operation creates is
counted while it lives: what remains after the forward pass is what autograd keeps, with recomputation taken into
account, and the peak until the end of the backward pass is what must fit.
"""

import contextlib
import copy
import weakref
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.optimizer.layer_wise_optimizer import is_managed_by_layer_wise_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_meap.backend import cpu, cpu_patches, device, layers
from megatron_meap.backend.patching import original_of, replaced
from megatron_meap.errors import UsageError
from megatron_meap.trainer.arguments import LOCAL_LAYERS, NOT_COMPILED
from megatron_meap.trainer.model import model_config


@dataclass
class Chunk:
    """A rank's model chunk (one, or several in an interleaved pipeline). Bytes are for one micro batch."""

    parameters: int
    """Elements on this rank."""
    whole: int
    """Elements that this chunk contributes to the model, on all its tensor- and expert-parallel ranks together."""
    weight_bytes: int
    matrices: int = 0
    """Elements in matrices that Muon updates: not embeddings, norms, biases, the output layer."""
    whole_matrices: int = 0
    """The same, of `whole`."""
    kept_layers: int = 0
    """Kept from the forward to the backward pass: embedding, layers, final norm."""
    kept_loss: int = 0
    """The same for logits and loss."""
    working: int = 0
    """In addition to what is kept, at the worst moment of forward and backward pass."""

    @property
    def kept(self) -> int:
        """Everything that is kept for the backward pass."""
        return self.kept_layers + self.kept_loss


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that were created under this mode and are still alive.

    Args:
        known: tensors whose storages do not count: parameters, of which views are created.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._live or key in self._known:
            return
        self._live[key] = storage.nbytes()
        self.now += self._live[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._live.pop(key, 0)


def trace_stage(args: Namespace, activations: bool = True) -> list[Chunk]:
    """Build this rank's chunks, within `world.pretended`, and run a micro batch through each.

    Args:
        args: checked, with `padded_vocab_size` set.
        activations: if false, only parameters are counted.

    Raises:
        UsageError: the memory depends on the data (mixture of experts).
    """
    if activations and args.num_experts is not None:
        raise UsageError("--num-experts: what experts keep depends on the data; only dense models can be planned")
    with FakeTensorMode(allow_non_fake_inputs=True), _kernels_of(args):
        models = _build(args)
        chunks = [_count(model, args) for model in models]
        if activations:
            for model, chunk in zip(models, chunks, strict=True):
                _run(model, chunk, args)
    return chunks


def _build(args: Namespace) -> list[Any]:
    """The chunks as Megatron's trainer builds them, but with local layers: Transformer Engine's need CUDA.

    Both have the same parameters.
    """
    local = copy.copy(args)
    vars(local).update(
        LOCAL_LAYERS | NOT_COMPILED, use_cpu_initialization=True, perform_initialization=False, fp8=None, fp4=None
    )
    local.cuda_graph_impl, local.tp_comm_overlap = "none", False
    config = model_config(local)
    builder = config.get_builder_cls()(config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    models = []
    for virtual in range(args.virtual_pipeline_model_parallel_size or 1):
        stage = virtual if args.virtual_pipeline_model_parallel_size else None
        ends = {
            "pre_process": mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            "post_process": mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        }
        models.append(builder.build_model(groups, vp_stage=stage, **ends).train())
    return models


def _count(model: torch.nn.Module, args: Namespace) -> Chunk:
    """Parameters and their bytes."""
    chunk = Chunk(0, 0, 0)
    for parameter in model.parameters():
        size = parameter.numel()
        chunk.parameters += size
        chunk.weight_bytes += size * parameter.element_size()
        is_matrix = is_managed_by_layer_wise_optimizer(parameter)
        chunk.matrices += size * is_matrix
        if getattr(parameter, "shared_embedding", False) and not model.pre_process:
            continue  # tied to the first stage's
        expert = not getattr(parameter, "allreduce", True)
        cut = args.expert_tensor_parallel_size if expert else args.tensor_model_parallel_size
        copies = cut if getattr(parameter, "tensor_model_parallel", False) else 1
        whole = size * copies * (args.expert_model_parallel_size if expert else 1)
        chunk.whole += whole
        chunk.whole_matrices += whole * is_matrix
    return chunk


def _run(model: Any, chunk: Chunk, args: Namespace) -> None:
    """Forward and backward pass of one micro batch; records what is kept, and the peak."""
    length = args.seq_length // args.context_parallel_size
    shape = args.micro_batch_size, length
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_drop_gradient)  # Megatron adds it to its own buffer
    live = LiveBytes([*model.parameters(), *model.buffers()])
    after_layers = 0

    def note(*_: Any) -> None:
        nonlocal after_layers
        after_layers = live.now

    model.decoder.register_forward_hook(note)
    with live:
        tokens, labels, positions = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
        if not model.pre_process:
            own = length // args.tensor_model_parallel_size if args.sequence_parallel else length
            received = torch.zeros(own, args.micro_batch_size, args.hidden_size, dtype=args.params_dtype)
            model.set_input_tensor(received.requires_grad_())
            del received
        output = model(tokens, positions, None, labels=labels)
        sent = 0 if model.post_process else output.untyped_storage().nbytes()  # freed when the next stage has it
        chunk.kept_layers = after_layers - sent
        chunk.kept_loss = live.now - after_layers
        output.sum().backward()
    chunk.working = live.peak - chunk.kept


def _first_part(angles: Tensor, dimension: int, group: torch.distributed.ProcessGroup) -> Tensor:
    return angles.narrow(dimension, 0, angles.shape[dimension] // group.size())


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@contextlib.contextmanager
def _kernels_of(args: Namespace) -> Iterator[None]:
    """Use kernels that keep the same tensors as those of the target: a CPU's own, or stand-ins for a GPU's fused ones.

    The fused norm, SwiGLU and rotary embedding that `kernels` has for CPUs keep what Transformer Engine's and Apex's
    keep: their inputs. Cross-entropy and linear layers are Megatron's own on a GPU.
    """
    if device.is_cpu():
        cpu.adapt_megatron()
        cpu_patches.install()
        yield
        return
    from megatron.core.models.common.embeddings import rope_utils, rotary_pos_embedding

    fused = args.transformer_impl != "local"
    mlp = layers.CPUSwiGLU if args.bias_swiglu_fusion else layers.MLP
    modules = layers.Modules(layers.CPUNorm, layers.SDPAttention, mlp)
    rotate = "_apply_rotary_pos_emb_bshd"
    with (
        layers.made_of(modules),
        # Megatron's own selects a context-parallel rank's positions by an index in pinned memory, which needs a driver.
        replaced(rotary_pos_embedding, "get_pos_emb_on_this_cp_rank", _first_part),
        replaced(rope_utils, rotate, original_of(rope_utils, rotate)),
    ):
        if fused:
            cpu_patches.rotate_in_one_step()
        yield
