"""How much data is laid out for a run, so that a shorter or longer run reads the same samples.

Megatron shuffles the samples of all epochs that a run reads: a run of another length may read other samples from the
first step on.
"""

from argparse import Namespace
from dataclasses import dataclass

from megatron_meap.errors import UsageError
from megatron_meap.flags import Settings, flag


@dataclass(frozen=True)
class DataSettings(Settings):
    """The training data of a run, beyond Megatron's flags."""

    data_samples: int | None = flag(
        None,
        "lay out the data for this many training samples, of which this run may read fewer, so that runs of other "
        "lengths read the same data (default: the number of samples of this run)",
        metavar="SAMPLES",
    )
    data_stages: str | None = flag(
        None,
        "YAML file, instead of --data-path, with blends that follow each other by consumed tokens or samples; no "
        "sample that an earlier stage has read is read again (docs/data.md)",
        metavar="FILE",
    )

    def check(self, args: Namespace) -> None:
        """Refuse data that is shorter than the run, and settings that would have no effect.

        Args:
            args: validated by Megatron.

        Raises:
            UsageError: names the flag.
        """
        if self.data_stages is not None:
            self._check_stages(args)
        if self.data_samples is None:
            return
        asked = f"--meap-data-samples {self.data_samples}"
        if args.meap_sft or args.phase_transition_iterations:
            other = "--meap-sft" if args.meap_sft else "--phase-transition-iterations"
            raise UsageError(f"{asked}: of no use with {other}, whose samples do not depend on it; drop one of them")
        if self.data_samples < run_samples(args):
            raise UsageError(f"{asked}: this run reads {run_samples(args)}; give at least as many")

    def _check_stages(self, args: Namespace) -> None:
        """Refuse other flags that name training data, or read it differently."""
        given = {
            "--data-path": args.data_path,
            "--train-data-path": args.train_data_path,
            "--data-args-path": args.data_args_path,
            "--per-split-data-args-path": args.per_split_data_args_path,
            "--per-dataset-sequences-path": args.per_dataset_sequences_path,
            "--mock-data": args.mock_data,
            "--meap-sft": args.meap_sft,
            "--phase-transition-iterations": args.phase_transition_iterations,
            "--dataloader-defer-npy-index-mmap": args.dataloader_defer_npy_index_mmap,
        }
        for flag_given, value in given.items():
            if value:
                raise UsageError(
                    f"{flag_given}: not possible with --meap-data-stages {self.data_stages}, which names the training "
                    "data; drop one of them (validation data has --valid-data-path)"
                )


def run_samples(args: Namespace) -> int:
    """Training samples of the whole run."""
    return args.train_samples or (args.train_iters or 0) * args.global_batch_size


def planned_samples(args: Namespace) -> int:
    """Number of training samples for which the data is laid out."""
    return getattr(args, "meap_data_samples", None) or run_samples(args)


def of_the_data(args: Namespace, samples: int) -> int:
    """Samples of the datasets for this many training samples: with noised copies, each comes twice."""
    return samples if args.meap_copy_weight is None else -(-samples // 2)


def planned(args: Namespace, num_samples: list[int | None]) -> list[int | None]:
    """Samples of each split for which the data is laid out.

    Args:
        args: Megatron's global arguments.
        num_samples: those that this run reads.
    """
    from megatron.training.training import get_train_valid_test_num_samples

    if args.meap_data_samples is None:
        return num_samples
    own = args.train_samples, args.train_iters
    try:  # a longer run also has more validation samples
        args.train_samples, args.train_iters = args.meap_data_samples, args.meap_data_samples // args.global_batch_size
        return list(get_train_valid_test_num_samples())
    finally:
        args.train_samples, args.train_iters = own
