"""One process that pretends to be a rank of any world: Megatron's process groups without other processes."""

import contextlib
import copy
import io
from argparse import Namespace
from collections.abc import Iterator

from megatron.core import mpu, parallel_state
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.training import initialize
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_meap.backend import device
from megatron_meap.backend.patching import replaced


@contextlib.contextmanager
def pretended(args: Namespace, stage: int = 0) -> Iterator[None]:
    """Be the first rank of a pipeline stage; collectives return at once, with meaningless results.

    Args:
        args: checked; `world_size` may be any.
        stage: of the pipeline, from 0.
    """
    within_stage = args.tensor_model_parallel_size * args.context_parallel_size
    if not args.use_tp_pp_dp_mapping:  # ranks of all data-parallel replicas of a stage come before the next stage
        within_stage = args.world_size // args.pipeline_model_parallel_size
    distributed.init_process_group("fake", store=FakeStore(), rank=stage * within_stage, world_size=args.world_size)
    alone = copy.copy(args)
    alone.use_gloo_process_groups = False  # there is no other process to connect to
    if device.plans_for_gpu():
        alone.pipeline_model_parallel_comm_backend = None  # may not be available here
    try:
        with (
            replaced(initialize, "get_args", lambda: alone),
            # high-priority streams, for example: PyTorch without NCCL has no such options
            replaced(parallel_state, "get_nccl_options", lambda *_: None),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            initialize._initialize_distributed(None, None, None)
        initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)  # draws nothing, so keeps no state
        yield
    finally:
        mpu.destroy_model_parallel()
        mpu.destroy_global_memory_buffer()
        initialize_rng_tracker(force_reset=True)
        distributed.destroy_process_group()
