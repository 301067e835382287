"""The planner's parameter counts match the weight files of published models."""

import contextlib
import io
from argparse import Namespace

import pytest
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
from torch import distributed

from megatron_meap.backend import device
from megatron_meap.planning.memory import count_parameters
from megatron_meap.planning.world import pretended
from megatron_meap.trainer import arguments

LLAMA = (
    "--seq-length 64 --max-position-embeddings 64 --position-embedding-type rope --normalization RMSNorm --swiglu "
    "--disable-bias-linear --untie-embeddings-and-output-weights"
)
RUN = "--micro-batch-size 1 --train-iters 1 --lr 1e-4 --mock-data --bf16"
SHAPES = {
    "Llama-2-7B": "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32",
    "Llama-3-70B": (
        "--num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64 --group-query-attention "
        "--num-query-groups 8"
    ),
    "Mixtral-8x7B": (
        "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention "
        "--num-query-groups 8 --num-experts 8 --moe-router-topk 2"
    ),
}


def checked(model: list[str]) -> Namespace:
    """The arguments of a run of one process, as Megatron completes them."""
    with contextlib.redirect_stdout(io.StringIO()):
        args = arguments.parse_flags([*model, *RUN.split()])
        try:
            arguments.check(args)
        finally:
            destroy_num_microbatches_calculator()
    return args


@pytest.mark.parametrize(
    ("shape", "rows", "parameters"),
    [
        ("Llama-2-7B", 32_000, 6_738_415_616),
        ("Llama-2-7B", 32_001, 6_738_423_808),  # with the mask token's row in both embeddings
        ("Llama-3-70B", 128_256, 70_553_706_496),
        ("Llama-3-70B", 128_264, 70_553_837_568),  # filled up to a multiple of 8, with the mask token's
        ("Mixtral-8x7B", 32_000, 46_702_792_704),
        ("Mixtral-8x7B", 32_001, 46_702_800_896),
    ],
)
def test_parameters_of_published_models(shape: str, rows: int, parameters: int) -> None:
    args = checked([*LLAMA.split(), *SHAPES[shape].split()])
    args.padded_vocab_size = rows
    assert count_parameters(args) == (parameters, [parameters])


def test_streams_of_nccl_are_no_obstacle_to_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron sets one for FSDP, and `--high-priority-stream-groups` does."""
    monkeypatch.setattr(device, "_plans_for_gpu", True)
    args = checked([*LLAMA.split(), *SHAPES["Llama-2-7B"].split()])
    args.high_priority_stream_groups = ["dp_cp"]
    with pretended(args):
        assert distributed.get_world_size() == 1
