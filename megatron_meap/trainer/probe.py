"""The retrieval probe while a model trains: its flag, its forward passes in any layout, its report."""

import math
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_meap.errors import UsageError, refuse
from megatron_meap.flags import Settings, flag
from megatron_meap.trainer.after_step import publish, whole_parameters
from megatron_meap.trainer.probe_task import CHANCE, FEWEST_TOKENS, PROBE, QUARTERS, SHORTEST, Probe, build, score

BEARABLE = 0.01
"""Share of the training time that the probe should not exceed."""


@dataclass(frozen=True)
class ProbeSettings(Settings):
    """When the retrieval probe is taken."""

    probe_interval: int | None = flag(
        None,
        "every so many steps, report how well the model retrieves tokens from its context, and the cost of that "
        "(default: never)",
        metavar="STEPS",
    )

    def check(self, args: Namespace) -> None:
        """Refuse arguments with which the probe cannot work."""
        if self.probe_interval is None:
            return
        flag = f"--meap-probe-interval {self.probe_interval}"
        length = args.seq_length
        short = length is not None and length < SHORTEST
        refuse(
            (self.probe_interval < 1, f"{flag}: must be at least 1"),
            (short, f"{flag}: a probe has at least {SHORTEST} tokens, more than --seq-length {length}"),
            (args.hybrid_context_parallel, f"{flag}: does not work with --hybrid-context-parallel; drop one of them"),
        )


def ordinary_tokens(args: Namespace, special: tuple[int, ...]) -> np.ndarray:
    """Ids that may occur in a probe: the tokenizer's, without the special ones and the mask token."""
    ids = np.setdiff1d(np.arange(args.meap_tokenizer_vocab_size), [*special, args.meap_mask_token_id])
    if len(ids) < FEWEST_TOKENS:
        raise UsageError(
            f"--meap-probe-interval: needs {FEWEST_TOKENS} ordinary tokens, the tokenizer has only {len(ids)}"
        )
    return ids


class RetrievalProbe:
    """Takes the probe after every `--meap-probe-interval` steps, on all ranks, without any effect on training.

    Args:
        args: Megatron's arguments, after parsing.
        special: ids of the tokenizer's special tokens.
    """

    def __init__(self, args: Namespace, special: tuple[int, ...]) -> None:
        self.args = args
        self.probe: Probe = build(args.seq_length, ordinary_tokens(args, special))
        self._since: tuple[int, float] | None = None  # step and time since which training is counted

    def after_step(self, model: list[Any], optimizer: Any, iteration: int) -> None:
        """Called by the trainer after every step.

        Args:
            model: this rank's model chunks.
            optimizer: Megatron's; it may hold parameters that are not gathered yet.
            iteration: steps done.
        """
        if self._since is None:  # the first step of a process is slower than the others
            self._since = iteration, time.perf_counter()
        if iteration % self.args.meap_probe_interval:
            return
        from megatron.training import get_timers

        get_timers()("interval-time").stop()  # the step's time and tokens/s in the log stay those of training
        torch.cuda.synchronize()
        start = time.perf_counter()
        totals = self.measure(model, optimizer)
        torch.cuda.synchronize()
        end = time.perf_counter()
        if totals is not None:
            steps, trained = iteration - self._since[0], start - self._since[1]
            self._report(iteration, totals.tolist(), (end - start) / trained if steps else None, steps)
        self._since = iteration, time.perf_counter()
        get_timers()("interval-time", log_level=0).start(barrier=True)

    def measure(self, model: list[Any], optimizer: Any) -> Tensor | None:
        """Sums over all questions, [QUARTERS, 3]: log-probability, hits, questions; None off the last stage."""
        from megatron.core import mpu
        from megatron.core.utils import get_model_config

        config = get_model_config(model[0])
        timers, config.timers = config.timers, None
        for chunk in model:
            chunk.eval()
        try:
            with whole_parameters(self.args, model, optimizer), torch.no_grad():
                parts = self._forward_all(model, config)
        finally:
            for chunk in model:
                chunk.train()
            config.timers = timers
        if not mpu.is_pipeline_last_stage(ignore_virtual=True):
            return None
        totals = torch.stack(parts).sum(dim=0)
        torch.distributed.all_reduce(totals, group=mpu.get_data_parallel_group(with_context_parallel=True))
        return totals

    def _forward_all(self, model: list[Any], config: Any) -> list[Tensor]:
        """Run this rank's samples forward; on the last pipeline stage the sums of every micro batch."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        batches = self._batches(config.microbatch_group_size_per_vp_stage if len(model) > 1 else 1)
        iterators = [iter(batches) for _ in model]
        return get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=iterators if len(model) > 1 else iterators[0],
            model=model,
            num_microbatches=len(batches),
            seq_length=self.args.seq_length,
            micro_batch_size=batches[0]["tokens"].shape[0],
            decoder_seq_length=self.args.decoder_seq_length,
            forward_only=True,
            collect_non_loss_data=True,
        )

    def _batches(self, multiple: int) -> list[dict[str, Tensor]]:
        """This rank's micro batches: the same number on every rank, and a multiple of what the pipeline schedule needs.

        Samples added for that have no questions.
        """
        from megatron.core import mpu
        from megatron.core.utils import get_batch_on_this_cp_rank

        probe, ranks = self.probe, mpu.get_data_parallel_world_size()
        samples = len(probe.tokens)
        each = math.ceil(samples / ranks)
        size = min(self.args.micro_batch_size, each)
        count = math.ceil(math.ceil(each / size) / multiple) * multiple
        mine = mpu.get_data_parallel_rank() + ranks * np.arange(count * size)
        batches = []
        for rows in mine.reshape(count, size):
            real, rows = rows < samples, rows % samples
            question = np.where(real[:, None], probe.question[rows], -1)
            positions = np.broadcast_to(np.arange(probe.tokens.shape[1]), question.shape).copy()
            arrays = {"tokens": probe.tokens[rows], "position_ids": positions, "question": question}
            batch = {name: torch.from_numpy(array).cuda() for name, array in arrays.items()}
            batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
            batch["candidates"] = torch.from_numpy(probe.candidates[rows]).cuda()
            batch["quarter"] = torch.from_numpy(probe.quarter[rows]).cuda()
            batches.append(batch)
        return batches

    def _forward(self, batches: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
        """Megatron's forward step for one micro batch of the probe."""
        batch = next(batches)
        return model(batch["tokens"], batch["position_ids"], None), partial(self._sums, batch)

    def _sums(self, batch: dict[str, Tensor], logits: Tensor, non_loss_data: bool) -> Tensor:
        """Sums [QUARTERS, 3] over the questions of a micro batch.

        Args:
            batch: from `_batches`.
            logits: [b, s, rows], this rank's part of the sequence and of the vocabulary.
            non_loss_data: always true, Megatron's word for values other than a loss.
        """
        from megatron.core import mpu

        def reduce(tensor: Tensor, how: str) -> Tensor:
            operation = torch.distributed.ReduceOp.MAX if how == "max" else torch.distributed.ReduceOp.SUM
            torch.distributed.all_reduce(tensor, operation, group=mpu.get_tensor_model_parallel_group())
            return tensor

        sample, position = (batch["question"] >= 0).nonzero(as_tuple=True)
        sums = torch.zeros(QUARTERS, 3, dtype=torch.float64, device=logits.device)
        if len(sample) == 0:
            return sums
        question = batch["question"][sample, position]
        vocab_size = max(self.args.meap_tokenizer_vocab_size, self.args.meap_mask_token_id + 1)
        first = mpu.get_tensor_model_parallel_rank() * logits.shape[-1]
        likelihood, hit = score(
            logits[sample, position], batch["candidates"][sample, question], vocab_size, first, reduce
        )
        each = torch.stack([likelihood, hit, torch.ones_like(hit)], dim=1)
        return sums.index_add_(0, batch["quarter"][sample, question], each)

    def _report(self, iteration: int, totals: list[list[float]], cost: float | None, steps: int) -> None:
        """One line in the log, and the values to TensorBoard and W&B."""
        likelihood, hits, asked = (sum(column) for column in zip(*totals, strict=True))
        values = {"answer log-probability": likelihood / asked, "accuracy": hits / asked}
        quarters = " ".join(f"{100 * hits / asked:.1f}" for _, hits, asked in totals)
        line = (
            f"answer log-probability: {values['answer log-probability']:.6E} | "
            f"accuracy: {100 * values['accuracy']:.2f} % (chance {100 * CHANCE:.2f} %) | "
            f"by quarter of the context: {quarters} % |"
        )
        if cost is not None:
            values["share of training time"] = cost
            line += f" cost: {100 * cost:.2f} % of the training time since the last"
            if cost > BEARABLE:
                advised = math.ceil(steps * cost / BEARABLE)
                line += f", above {100 * BEARABLE:.0f} %: advised is --meap-probe-interval {advised} or more"
        publish(PROBE, line, values, iteration)
