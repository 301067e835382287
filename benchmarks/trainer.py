"""Megatron's trainer step by step, for the benchmarks: its own `train_step`, schedule, optimizer and clipping."""

import importlib
import os
import socket
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch

SHAPE = {"layers": 6, "hidden": 384, "heads": 6, "groups": 2, "ffn": 1024, "vocabulary": 8064}
"""The 15.6M-parameter Llama-style model of the speed figures."""


def flags(batch: int, length: int, *more: str) -> list[str]:
    """Megatron's flags for the model, with micro batch = global batch = `batch` sequences of `length` tokens."""
    model = (
        f"--num-layers {SHAPE['layers']} --hidden-size {SHAPE['hidden']} --num-attention-heads {SHAPE['heads']} "
        f"--group-query-attention --num-query-groups {SHAPE['groups']} --ffn-hidden-size {SHAPE['ffn']} "
        "--position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear "
        "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
        f"--tokenizer-type NullTokenizer --vocab-size {SHAPE['vocabulary'] - 64} --make-vocab-size-divisible-by 64 "
    )
    run = (
        f"--seq-length {length} --max-position-embeddings {length} --micro-batch-size {batch} "
        f"--global-batch-size {batch} --train-iters 100000 --lr 1e-3 --clip-grad 1.0 --weight-decay 0.01 "
        "--adam-beta2 0.999 --eval-iters 0 --mock-data --num-workers 0 "
    )
    return [*(model + run).split(), *more]


class Trainer:
    """One rank of Megatron's trainer, built from a command line.

    Args:
        command_line: Megatron's and this project's flags.
        stock: build Megatron's own local layers, and leave this project's CPU kernels out.
    """

    def __init__(self, command_line: list[str], stock: bool = False) -> None:
        device = import_megatron()
        _be_the_only_rank()
        from megatron.core.enums import ModelType
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.utils import get_model_config
        from megatron.training import training as megatrons
        from megatron.training.argument_utils import pretrain_cfg_container_from_args
        from megatron.training.initialize import initialize_megatron

        from megatron_meap.backend import cpu_patches, megatron_patches
        from megatron_meap.trainer import run
        from megatron_meap.trainer.arguments import parse_arguments

        sys.argv = ["benchmark", *command_line]
        megatron_patches.apply()
        if device.is_cpu() and not stock:
            cpu_patches.install()
        self.args: Namespace = parse_arguments()
        initialize_megatron(get_embedding_ranks=run.embedding_ranks)
        model = run.model_config(self.args)
        if stock:
            model.transformer_layer_spec = None
        self.model, self.optimizer, self.scheduler = megatrons.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=pretrain_cfg_container_from_args(self.args, model),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        self.config = get_model_config(self.model[0])
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = megatrons.finalize_model_grads
        self.schedule = get_forward_backward_func()
        self.train_step: Callable = megatrons.train_step
        self.forward_step = run.forward_step
        for chunk in self.model:
            chunk.train()

    def step(self, batches: Any) -> float:
        """One training step on the next batch; returns its loss, NaN on a pipeline stage that has none."""
        report = self.train_step(
            self.forward_step,
            batches,
            self.model,
            self.optimizer,
            self.scheduler,
            self.config,
            self.schedule,
            iteration=0,
        )[0]
        return float(report.get("lm loss", "nan"))


def import_megatron() -> Any:
    """Megatron, adapted to this machine, with everything that training imports; returns `backend.device`."""
    from megatron_meap.backend import device

    device.prepare()
    importlib.import_module("megatron_meap.trainer.run")
    return device


def random_batches(
    batch: int, length: int, vocabulary: int = SHAPE["vocabulary"] - 64
) -> Iterator[dict[str, torch.Tensor]]:
    """The same random tokens for every contender, in the form of Megatron's data loader."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(length).repeat(batch, 1)
    while True:
        tokens = torch.randint(0, vocabulary, (batch, length + 1), generator=generator)
        yield {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": torch.ones(batch, length),
            "position_ids": positions,
        }


def _be_the_only_rank() -> None:
    """What torchrun would set for one process, where it has not started this one."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
