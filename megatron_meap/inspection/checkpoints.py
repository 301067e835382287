"""Checkpoints by their records: the settings of the run, differences between two, whether the files are intact."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from megatron_meap.checkpoint import latest, model_arguments
from megatron_meap.checkpoint.integrity import FILE
from megatron_meap.checkpoint.reader import Checkpoint, directory_of, open_checkpoint
from megatron_meap.errors import UsageError
from megatron_meap.tokenization.fingerprint import known_to_differ
from megatron_meap.trainer import carried, schedule
from megatron_meap.trainer.optimizers import is_distributed
from megatron_meap.trainer.record import Verdict, differences, record_of, verdict
from megatron_meap.trainer.resume import unusable_optimizer_state


def describe(path: str, iteration: int | None) -> Iterator[str]:
    """A few lines on a checkpoint, and the entries of its record by what happens if they differ on resume."""
    checkpoint = open_checkpoint(path, iteration)
    args = checkpoint.args
    parameters = sum(math.prod(shape) for shape in checkpoint.weights().values())
    yield f"{checkpoint.directory}: iteration {checkpoint.iteration}, {parameters:,} parameters"
    samples = getattr(args, "consumed_train_samples", None)
    yield f"  trained on {samples if samples is None else f'{samples:,}'} samples by {_saved_by(checkpoint)}"
    yield f"  carries {', '.join(_carries(checkpoint))}"
    record = record_of(args)
    if not hasattr(args, "meap_record"):
        yield "  was saved before data and versions were recorded; these are the arguments that Megatron keeps"
    for outcome in (Verdict.REFUSED, Verdict.WARNED):
        yield f"\n{outcome.value}, if it differs when the run resumes (what is not set is left out):"
        for entry, value in record.items():
            if value not in (None, False) and verdict(entry, args) is outcome:
                yield f"  {entry:<40} {_written(value)}"


def compare(path: str, iteration: int | None, other: str) -> tuple[list[str], bool]:
    """Differences between the runs of two checkpoints, one per line; and whether the first may resume the other."""
    here, there = open_checkpoint(path, iteration), open_checkpoint(other)
    lines = [f"here: {here.directory}", f"there: {there.directory}"]
    names = [name for name in (*model_arguments.SHAPE, *model_arguments.FUNCTION) if hasattr(here.args, name)]
    model = model_arguments.differences(there.args, here.args, names)
    for name, what in (("sha256", "files"), ("ids", "ids for fixed texts")):
        then, now = (getattr(each.args, f"meap_tokenizer_{name}", None) for each in (there, here))
        if known_to_differ(then, now):
            model.append(f"the tokenizer (SHA-256 of its {what}) {then} there, {now} here")
    lines += [f"another model: {said}" for said in model]
    if problem := unusable_optimizer_state(there.directory, there.args, here.args):
        lines.append(f"another optimizer: the state there {problem}")
    schedules = schedule.differences(there.scheduler, here.scheduler)
    lines += [f"another schedule: {said}" for said in schedules]
    found = sorted(differences(there.args, here.args), key=lambda each: list(Verdict).index(each[0]))
    lines += [f"{outcome.value}: {said}" for outcome, said in found]
    if len(lines) == 2:
        lines.append("no setting that determines a run differs")
    return lines, not (model or problem or schedules) and all(outcome is not Verdict.REFUSED for outcome, _ in found)


def verify(path: str, iteration: int | None) -> str:
    """A line on the files, if they are as they were saved.

    Raises:
        UsageError: some are not; the message names them.
    """
    folder = directory_of(Path(path), iteration)
    if wrong := latest.damage(folder):
        raise UsageError(f"{folder}: damaged: {wrong}; copy it again, or use an older one (--ckpt-step)")
    if not (folder / FILE).exists():
        return f"{folder}: no hashes were recorded (--verify-integrity); only the presence of its parts was checked"
    files = json.loads((folder / FILE).read_text())["files"]
    size = sum((folder / name).stat().st_size for name in files)
    return f"{folder}: {len(files)} files, {size / 1e6:,.1f} MB, all as they were saved"


def _saved_by(checkpoint: Checkpoint) -> str:
    args, record = checkpoint.args, record_of(checkpoint.args)
    versions = [f"{name} {record[name]}" for name in ("megatron-meap", "megatron-core", "torch") if name in record]
    layout = [
        ("TP", "tensor_model_parallel_size"),
        ("PP", "pipeline_model_parallel_size"),
        ("DP", "data_parallel_size"),
    ]
    sizes = [f"{short} {getattr(args, name)}" for short, name in layout if hasattr(args, name)]
    optimizer = "distributed" if is_distributed(args) else "plain"
    layers = getattr(args, "transformer_impl", "unknown")
    return ", ".join([*versions, *sizes, f"{layers} layers", f"{optimizer} optimizer"])


def _carries(checkpoint: Checkpoint) -> list[str]:
    """Its tokenizer and manifests, in words."""
    args = carried.arguments_of(checkpoint)
    tokenizer = args.tokenizer_model or args.vocab_file
    names = [f"the tokenizer {tokenizer}"] if args.tokenizer_model != checkpoint.args.tokenizer_model else []
    if hasattr(args, "meap_manifests"):
        names.append(f"manifests of {', '.join(name for name, _, _ in carried.manifests(args))}")
    return names or ["neither its tokenizer nor manifests"]


def _written(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
