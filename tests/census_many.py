"""Where one micro batch would wait for the GPU, on ranks of many layouts: `census_many.py RUNS.json`; prints JSON.

The training step's own forward pass, loss and backward pass run on tensors without memory. An operation that needs a
number of a tensor on the host (`.item()`, a condition, indexing by a mask) is counted with the line that asked for it.
"""

import collections
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_meap.backend import device

device.prepare_to_look()

import torch  # noqa: E402
from megatron.core.models.common.embeddings import rope_utils  # noqa: E402
from megatron.core.rerun_state_machine import RerunMode, initialize_rerun_state_machine  # noqa: E402
from megatron.training.training import destroy_global_state  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from megatron_meap.backend import megatron_patches  # noqa: E402
from megatron_meap.planning import trace  # noqa: E402
from megatron_meap.planning.world import pretended  # noqa: E402
from megatron_meap.trainer import arguments, batches, run  # noqa: E402

ON_THE_HOST = "aten._local_scalar_dense.default"
COUNTED = ("aten.nonzero.default", "aten.masked_select.default", "aten._unique2.default")


class Census(TorchDispatchMode):
    """Counts, by file and line, the operations that would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: collections.Counter[str] = collections.Counter()
        self.operations = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = str(operation)
        self.operations += 1
        by_mask = name == "aten.index.Tensor" and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name == ON_THE_HOST or name in COUNTED or by_mask:
            self.sites[asked_by()] += 1
        if name == ON_THE_HOST:
            return {torch.bool: False, torch.int64: 1, torch.int32: 1}.get(args[0].dtype, 1.0)
        if name == "aten.nonzero.default":
            return args[0].new_empty((7, args[0].dim()), dtype=torch.long)
        if by_mask:  # how many is what the host would have to know
            return args[0].new_empty((7, *args[0].shape[args[1][0].dim() :]))
        return operation(*args, **(kwargs or {}))


def asked_by() -> str:
    """File and line of the innermost caller outside of PyTorch and this script."""
    frames = [each for each in traceback.extract_stack() if "/torch/" not in each.filename]
    frame = next(each for each in reversed(frames) if Path(each.filename) != Path(__file__))
    return f"{frame.filename}:{frame.lineno} {frame.line}"


def micro_batch(args: Any, model: Any) -> dict[str, torch.Tensor]:
    """A sample batch; where this stage is not the first, what it receives is set as well."""
    shape = args.micro_batch_size, args.seq_length
    batch = {name: torch.zeros(shape, dtype=torch.long) for name in ("tokens", "labels", "position_ids")}
    batch["loss_mask"] = torch.ones(shape)
    if batches.has_packed_sequences(args):  # two documents in each sample
        batch["cu_seqlens"] = torch.tensor([[0, 100, args.seq_length]] * args.micro_batch_size, dtype=torch.int32)
    if not model.pre_process:
        parts = args.context_parallel_size * (args.tensor_model_parallel_size if args.sequence_parallel else 1)
        received = torch.zeros(shape[1] // parts, shape[0], args.hidden_size, dtype=torch.bfloat16)
        model.set_input_tensor(received.requires_grad_())
    return batch


def count(stage: int, waits: bool) -> dict[str, Any]:
    """Number of operations of a micro batch on the first rank of a stage, and the waiting ones by line."""
    args = arguments.parse_arguments()
    refuse = torch.Tensor.item if waits else lambda _: None  # Megatron's check for NaN waits, and is not in question
    with (
        mock.patch("megatron_meap.trainer.bad_steps.refuse", refuse),
        mock.patch.object(run, "update_seqlen_stats_from_cu_seqlens"),  # it asks the driver for the device's number
        # Transformer Engine's and Apex's fused kernels read the borders on the device
        mock.patch.object(rope_utils, "_apply_rotary_pos_emb_thd", lambda hidden, *_, **__: hidden),
        pretended(args, stage),
        FakeTensorMode(allow_non_fake_inputs=True),
        trace._kernels_of(args),
    ):
        initialize_rerun_state_machine(mode=RerunMode.VALIDATE_RESULTS)
        models = trace._build(args)
        model = models[-1] if stage else models[0]
        batch = micro_batch(args, model)
        with Census() as census:
            output, loss_of = run.forward_step(iter([batch]), model)
            result = loss_of(output)[0] if model.post_process else output.sum()
            result.backward()
    return {"operations": census.operations, "sites": dict(census.sites)}


def main() -> None:
    megatron_patches.apply()
    found = {}
    for name, (world, stage, waits, flags) in json.loads(Path(sys.argv[1]).read_text()).items():
        os.environ |= {"RANK": "0", "WORLD_SIZE": str(world)}
        sys.argv = ["pretrain_gpt_meap.py", *flags]
        found[name] = count(stage, waits)
        destroy_global_state()
    print("\nfound: " + json.dumps(found))


if __name__ == "__main__":
    main()
