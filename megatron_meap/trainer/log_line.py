"""Additions to the lines that Megatron logs: speed, share of the peak, time left; spikes and skipped steps."""

import collections
import math
import re
import time
from argparse import Namespace
from dataclasses import dataclass

import numpy as np
import torch

from megatron_meap.backend import device
from megatron_meap.backend.megatron_patches import Step
from megatron_meap.backend.peak import GPUS, matrix_peak
from megatron_meap.errors import UsageError
from megatron_meap.flags import Settings, flag
from megatron_meap.meap.losses import BITS_PER_BYTE
from megatron_meap.trainer import batch_sizes
from megatron_meap.trainer.after_step import publish, write
from megatron_meap.trainer.embedding_norm import embedding_norms, has_mask_token
from megatron_meap.trainer.log_names import EMBEDDING_NORM, MFU, RANK_TOKENS, SKIPPED, SPIKE, TFLOPS, TOKENS

MEASURED = "measured"
SPIKE_WINDOW, FEWEST = 1000, 50
"""Number of earlier steps that a loss is compared with, as in OLMo 2 (arXiv 2501.00656), and the least number."""
SMALLEST = 0.01
"""Lower limit of the standard deviation in nats, so that tiny changes are not spikes."""

_STEP = re.compile(r"elapsed time per iteration \(ms\): (?P<ms>[\d.]+) \|.* global batch size: +(?P<batch>\d+) \|")
_NO_PERPLEXITY = re.compile(rf"{BITS_PER_BYTE} PPL: \S+ \| ")


@dataclass(frozen=True)
class LogSettings(Settings):
    """What the log says about speed and spikes."""

    peak_tflops: str | None = flag(
        None,
        f"log MFU, the model's own operations as a share of this peak per rank (GPU): a number in TFLOP/s, a kind of "
        f"GPU (its data sheet's bf16 peak; {', '.join(GPUS)}), or {MEASURED}, the fastest matrix product at the start "
        "(default: no MFU)",
        metavar="PEAK",
    )
    loss_spike: float = flag(
        7.0,
        f"report in a separate line if a step's loss is this many standard deviations above the mean of the last "
        f"{SPIKE_WINDOW} steps; 0: never (default: %(default)s)",
        metavar="DEVIATIONS",
    )

    def check(self) -> None:
        """Refuse an invalid peak or number of deviations.

        Raises:
            UsageError: names the flag.
        """
        if self.loss_spike < 0 or not math.isfinite(self.loss_spike):
            raise UsageError(f"--meap-loss-spike {self.loss_spike}: must be 0 or more")
        self.peak()

    def peak(self) -> float | None:
        """The peak in TFLOP/s; None if there is none, or if it will be measured."""
        if self.peak_tflops in (None, MEASURED):
            return None
        if self.peak_tflops in GPUS:
            return GPUS[self.peak_tflops].tflops
        try:
            found = float(self.peak_tflops or "")
        except ValueError:
            found = 0.0
        if not 0 < found < math.inf:
            raise UsageError(
                f"--meap-peak-tflops {self.peak_tflops}: expected a number above 0, {MEASURED}, or one of "
                f"{', '.join(GPUS)}"
            )
        return found


def lines(args: Namespace) -> list[str]:
    """The peak that MFU refers to, in one line; empty if MFU is not logged."""
    settings = LogSettings.of(args)
    if settings.peak_tflops is None:
        return []
    peak = settings.peak()
    of = "the fastest matrix product measured at the start" if peak is None else f"{peak:g} TFLOP/s a rank"
    kind = settings.peak_tflops
    return [f"MFU           against {of}{f' ({GPUS[kind].name}, bf16)' if kind in GPUS else ''}"]


class LogLine:
    """Rewrites Megatron's lines, on all ranks."""

    def __init__(self, args: Namespace) -> None:
        settings = LogSettings.of(args)
        self.args = args
        self.peak = settings.peak()
        self._measure = settings.peak_tflops == MEASURED
        self._spikes = Spikes(settings.loss_spike)
        self._left_out = frozenset(args.iterations_to_skip)
        self._total = batch_sizes.samples(args)
        self._since: tuple[float, int] | None = None

    def begin(self) -> None:
        """Measure the peak, if asked, on all ranks at once, because they also train at once."""
        if not self._measure:
            return
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
        torch.distributed.barrier()
        peak = torch.tensor([1e-12 * matrix_peak(dtype, device.is_cpu())], device=torch.cuda.current_device())
        torch.distributed.all_reduce(peak)
        self.peak = peak.item() / self.args.world_size
        if self.args.rank == 0:
            print(f"MFU: the peak is {self.peak:.4g} TFLOP/s a rank, the fastest product in {dtype}", flush=True)

    def see(self, step: Step) -> None:
        """Report in a separate line that a step was skipped, or that its loss is a spike."""
        if step.iteration in self._left_out:
            publish(SKIPPED, "its data is left out (--iterations-to-skip) |", {}, step.iteration)
        elif step.skipped:
            what = f"gradients that are not finite, nothing learned | loss scale: {step.loss_scale:.1f} |"
            publish(SKIPPED, what, {"loss scale": step.loss_scale}, step.iteration)
        elif self._spikes.limit and self.args.rank == self.args.world_size - 1:  # as it logs
            self._see_loss(step.losses["lm loss"].item(), step.iteration)

    def _see_loss(self, loss: float, iteration: int) -> None:
        if (found := self._spikes.add(loss)) is not None:
            mean, deviations = found
            line = f"lm loss: {loss:.6E} | mean before: {mean:.6E} | standard deviations above it: {deviations:.1f} |"
            publish(SPIKE, line, {"standard deviations": deviations}, iteration)

    def rewrite(self, line: str, step: Step | None) -> str:
        """The line to log."""
        match = _STEP.search(line)
        if match is None or step is None:
            return _NO_PERPLEXITY.sub("", line)
        values = self._speed(float(match["ms"]) / 1000, int(match["batch"]), step)
        added = "".join(
            f" {name}: {value:.4g} |" if value < 1000 else f" {name}: {value:.0f} |" for name, value in values.items()
        )
        added += self._time_left()
        if "lm loss" in step.losses and not step.skipped and " lm loss: " not in line:
            added += " lm loss: NAN |"  # which Megatron leaves out
        if has_mask_token(self.args):
            norms = embedding_norms(self.args, step.model, step.optimizer)
            added += "".join(f" {EMBEDDING_NORM} {name}: {value:.6E} |" for name, value in norms.items())
            values |= {f"{EMBEDDING_NORM}/{name}": value for name, value in norms.items()}
        write(values, step.iteration)
        return line + added

    def _speed(self, seconds: float, batch: int, step: Step) -> dict[str, float]:
        """Speeds by name. Tokens are positions of the batch, with padding and noised copies; FLOPs as in Megatron."""
        from megatron.training.training import num_floating_point_operations

        if not seconds:
            return {}
        tokens = batch * self.args.seq_length / seconds
        flops = num_floating_point_operations(self.args, batch, **step.lengths)
        tflops = 1e-12 * flops / seconds / self.args.world_size
        values = {TOKENS: tokens, RANK_TOKENS: tokens / self.args.world_size, TFLOPS: tflops}
        return values | ({MFU: 100 * tflops / self.peak} if self.peak else {})

    def _time_left(self) -> str:
        """Time until the last step, with evaluations and checkpoints, at the pace since this start's first line."""
        now, done = time.monotonic(), self.args.consumed_train_samples
        if self._since is None:
            self._since = now, done
        began, samples = self._since
        if done == samples:
            return ""
        left = round(max(0, self._total - done) * (now - began) / (done - samples))
        return f" ETA: {left // 3600}:{left // 60 % 60:02}:{left % 60:02} |"


class Spikes:
    """Finds losses that stand out from those of earlier steps."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._before: collections.deque[float] = collections.deque(maxlen=SPIKE_WINDOW)

    def add(self, loss: float) -> tuple[float, float] | None:
        """Add a loss; if it is a spike, return the mean before it and how many standard deviations it is above that."""
        if not math.isfinite(loss):
            return None
        before = np.fromiter(self._before, float)
        self._before.append(loss)
        if len(before) < FEWEST:
            return None
        mean, deviation = float(before.mean()), max(float(before.std()), SMALLEST)
        return (mean, (loss - mean) / deviation) if loss - mean > self.limit * deviation else None
