"""The training data of a command line, read as in its training run, but without training."""

import contextlib
import io
import logging
from argparse import Namespace
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.datasets.utils import Split
from megatron.training import get_tokenizer
from megatron.training.datasets.data_samplers import build_pretraining_data_loader
from megatron.training.initialize import initialize_megatron
from megatron.training.training import get_train_valid_test_num_samples, update_train_iters

from megatron_meap.errors import UsageError, refusing
from megatron_meap.inspection.samples import has_colors, mask_statistics, page, sample_digest, stream_digest, view
from megatron_meap.meap.positions import STRATEGIES
from megatron_meap.meap.settings import MaskSettings
from megatron_meap.sft.data import describe
from megatron_meap.trainer import batch_sizes
from megatron_meap.trainer.batches import datasets_provider
from megatron_meap.trainer.run import prepare


class Streams:
    """The data of a run, on every rank of its layout."""

    def __init__(self) -> None:
        logging.disable(logging.WARNING)
        with contextlib.redirect_stdout(io.StringIO()):  # Megatron's table of arguments and what it builds
            self.args, store = prepare(data_only=True)
            self.args.iteration = 0
            initialize_megatron(store=store)
            update_train_iters(self.args)
            self.dataset = datasets_provider(list(get_train_valid_test_num_samples()))[0]
        if mpu.get_tensor_model_parallel_rank() == 0 and self.dataset is None:
            raise UsageError("--data-path: names no training data to show")

    def print_digest(self, first: int, end: int) -> None:
        """Print the digest of the samples from `first` up to `end`, read by the data loaders of all ranks."""
        args = self.args
        step = args.micro_batch_size * mpu.get_data_parallel_world_size()
        if (end - first) % step:
            raise UsageError(
                f"--digest: {end - first} samples are not a multiple of micro batch x data-parallel size = {step}"
            )
        samples = batch_sizes.samples(args)
        if end > samples:
            raise UsageError(f"--digest: the run has {samples} samples, not {end}")
        mine: dict[int, str] = {}
        if self.dataset is not None:
            loader = iter(build_pretraining_data_loader(self.dataset, first))
            index = first + mpu.get_data_parallel_rank() * args.micro_batch_size
            while index < end:
                batch = next(loader)
                for row in range(args.micro_batch_size):
                    mine[index + row] = sample_digest({key: value[row] for key, value in batch.items()})
                index += step
        gathered: list[dict[int, str]] = [{} for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(gathered, mine)
        whole = {index: digest for part in gathered for index, digest in part.items()}
        if torch.distributed.get_rank() == 0:
            digest = stream_digest(whole[index] for index in range(first, end))
            print(f"digest of samples {first} to {end - 1}: {digest}", flush=True)

    def print_samples(self, indices: list[int], statistics: int, page_path: Path | None) -> None:
        """Print decoded samples and mask statistics on rank 0, and write them as a page if asked."""
        if torch.distributed.get_rank() != 0:
            return
        assert self.dataset is not None
        assert getattr(self.dataset, "split", Split.train) is Split.train
        args = self.args
        for index in indices:
            if not 0 <= index < len(self.dataset):
                raise UsageError(f"--show {index}: the training data has samples 0 to {len(self.dataset) - 1}")
        views = [view(self.dataset, index, get_tokenizer(), args.meap_mask_token_id) for index in indices]
        for each in views:
            print(each.for_terminal(has_colors()), flush=True)
        figures = ""
        if statistics:
            if args.meap_sft:
                figures = describe(self.dataset, args)
            else:
                figures = mask_statistics(
                    self.dataset, statistics, args.meap_mask_token_id, args.meap_mask_ratio, _exact(args)
                )
            print(figures, flush=True)
        if page_path is not None:
            with refusing(f"--html {page_path}: cannot be written", OSError):
                page_path.write_text(page(views, figures, self._source()))
            print(f"wrote {page_path}", flush=True)

    def _source(self) -> str:
        """The data, and what is masked in it."""
        args = self.args
        what = "answer tokens" if args.meap_sft else "input tokens"
        names = args.data_path or args.train_data_path or [args.data_args_path or args.meap_data_stages or "mock data"]
        return f"{' '.join(names)}: {MaskSettings.of(args).words(what)}"


def _exact(args: Namespace) -> bool:
    """Whether every sample has the same number of noised positions."""
    settings = MaskSettings.of(args)
    varies = settings.mask_ratio_min is not None or settings.noised_share < 1 or settings.kept_share > 0
    return settings.mask_strategy in STRATEGIES and not varies
