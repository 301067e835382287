"""One process that pretends to be a rank of any world: Megatron's process groups without anybody to talk to."""

import contextlib
from argparse import Namespace
from collections.abc import Iterator

from megatron.core import mpu
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_meap.errors import UsageError


@contextlib.contextmanager
def pretended(args: Namespace, stage: int = 0) -> Iterator[None]:
    """Be the first rank of a pipeline stage; collectives return at once and their results mean nothing.

    Args:
        args: checked; `world_size` may be any.
        stage: of the pipeline, from 0.
    """
    within_stage = args.tensor_model_parallel_size * args.context_parallel_size
    if not args.use_tp_pp_dp_mapping:  # ranks of all data-parallel replicas of a stage come before the next stage
        within_stage = args.world_size // args.pipeline_model_parallel_size
    distributed.init_process_group("fake", store=FakeStore(), rank=stage * within_stage, world_size=args.world_size)
    try:
        mpu.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.virtual_pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
            create_gloo_process_groups=False,
        )
        initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)  # draws nothing, so keeps no state
        yield
    except RuntimeError as error:
        if "world_size" not in str(error):
            raise
        raise UsageError(f"the layout does not divide {args.world_size} ranks: {error}") from error
    finally:
        mpu.destroy_model_parallel()
        mpu.destroy_global_memory_buffer()
        initialize_rng_tracker(force_reset=True)
        distributed.destroy_process_group()
