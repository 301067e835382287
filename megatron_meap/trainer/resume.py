"""Which checkpoint a run starts from, and whether it may: its model, its tokenizer, and all that determines it."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from megatron.core.safe_globals import register_safe_globals
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import FileSystemReader

from megatron_meap.checkpoint import latest, model_arguments
from megatron_meap.errors import UsageError, refuse, refusing
from megatron_meap.tokenization.fingerprint import known_to_differ
from megatron_meap.trainer import batch_sizes, schedule
from megatron_meap.trainer.optimizers import is_distributed
from megatron_meap.trainer.record import ALLOW, BEGINS, Verdict, differences


def choose_start(args: Namespace, hash_files: latest.HashFiles | None) -> dict[str, Any]:
    """Choose the checkpoint to load, and compare it with this run.

    Args:
        args: with this run's record, `meap_record`.
        hash_files: how the files of a checkpoint are hashed.

    Returns:
        `iteration`, for `ckpt_step`, and `start`, the checkpoint that the run starts from (None for a new run);
        `warnings`, one per line.

    Raises:
        UsageError: a required checkpoint does not exist, or this run cannot start from it.
    """
    _keep_checkpoints(args)
    if args.load is not None:
        choice = latest.choose(Path(args.load), args.ckpt_step, args.meap_refuse_damaged_checkpoint, hash_files)
        if choice is not None:
            warnings = [] if choice.warning is None else [choice.warning]
            warnings += _later_ones(choice, args)
            warnings += _compare("--load", choice.path, args)
            warnings += nothing_left(choice, args)
            return {"iteration": _settle(choice, args), "start": str(choice.path), "warnings": warnings}
        if not _continues_in_place(args) or (args.exit_on_missing_checkpoint and args.pretrained_checkpoint is None):
            raise UsageError(f"--load {args.load}: holds no checkpoint; {_hint(Path(args.load))}")
    if args.pretrained_checkpoint is not None:  # Megatron starts from it where --load holds none yet
        flag = f"--pretrained-checkpoint {args.pretrained_checkpoint}"
        choice = latest.choose(Path(args.pretrained_checkpoint), None, refuse_damaged=False, hash_files=hash_files)
        if choice is None:
            raise UsageError(f"{flag}: holds no checkpoint; check the path")
        if choice.warning is not None:
            raise UsageError(f"{flag}: {choice.warning.partition(';')[0]}; copy or convert it again")
        warnings = _compare("--pretrained-checkpoint", choice.path, args)
        return {"iteration": args.ckpt_step, "start": str(choice.path), "warnings": warnings}
    return {"iteration": args.ckpt_step, "start": None, "warnings": []}


def _continues_in_place(args: Namespace) -> bool:
    """Whether the run saves where it loads from."""
    return args.save is not None and args.load is not None and Path(args.load).resolve() == Path(args.save).resolve()


def _hint(path: Path) -> str:
    """What to do if a directory holds no checkpoint."""
    if (step := latest.iteration_of(path)) is not None and path.is_dir():
        return f"give the directory around it: --load {path.parent} --ckpt-step {step}"
    return "check the path, or drop the flag to start anew"


def _later_ones(choice: latest.Choice, args: Namespace) -> list[str]:
    """A line if a run that goes back will replace checkpoints."""
    later = [str(step) for step in latest.iterations(Path(args.load)) if step > choice.iteration]
    if not later or args.finetune or not _continues_in_place(args):
        return []
    return [
        f"--save {args.save}: the later checkpoints there ({', '.join(later)}) are replaced as this run comes to them"
    ]


def nothing_left(choice: latest.Choice, args: Namespace) -> list[str]:
    """A line if the checkpoint already has all the steps asked for."""
    steps = sum(phase.steps for phase in batch_sizes.phases(args))
    reached = choice.iteration if args.override_ckpt_iteration is None else args.override_ckpt_iteration
    if args.finetune or args.skip_train or reached < steps:
        return []
    return [
        f"{choice.path}: has all {steps:,} steps, nothing is left to train; docs/first_runs.md says how to train longer"
    ]


def _keep_checkpoints(args: Namespace) -> None:
    """Refuse to start at iteration 0 if older checkpoints would be replaced one by one."""
    if args.save is None or args.meap_overwrite_checkpoints:
        return
    newest = latest.newest_saved(Path(args.save))
    resumes = _continues_in_place(args)
    if newest is None or (resumes and not args.finetune):
        return
    how = "drop --finetune" if resumes else f"add --load {args.save}"
    raise UsageError(
        f"--save {args.save}: holds checkpoints up to iteration {newest}, which this run would not resume but replace; "
        f"{how} to resume, name another directory, or add --meap-overwrite-checkpoints to start anew there"
    )


def _settle(choice: latest.Choice, args: Namespace) -> int | None:
    """The iteration to ask for; if it is an older one, the pointer is changed if this job owns the directory."""
    if choice.warning is None:
        return args.ckpt_step
    if not args.dry_run and _continues_in_place(args):
        latest.set_pointer(Path(args.load), choice.iteration)
    return choice.iteration


def _compare(flag: str, path: Path, args: Namespace) -> list[str]:
    """Refuse a checkpoint of another model or tokenizer; and, when resuming, of a run with other settings.

    Returns:
        Differences that are only reported, one per line.
    """
    from megatron.core import dist_checkpointing

    is_old = any(path.glob("mp_rank_*"))
    if latest.is_from_fsdp(path):
        state = _state_from_fsdp(flag, path, args)
    elif is_old:
        state = _state_in_old_format(flag, path)
    else:
        state = dist_checkpointing.load_common_state_dict(str(path))
    saved = state.get("args")
    if saved is None:
        return []
    resumes = flag == "--load" and not args.finetune and path.name != "release"
    warnings = _compare_model(flag, path, saved, args, resumes)
    if not resumes:
        changed = [said for _, said in differences(saved, args, BEGINS)]
        return warnings + ([f"{flag}: {path} was trained with {'; '.join(changed)}"] if changed else [])
    if is_old:
        _refuse_what_the_old_format_cannot(path, saved, args)
    _refuse_another_place_in_the_data(path, saved, args)
    _refuse_another_optimizer(path, saved, args)
    found = list(differences(saved, args))
    refused = [said for outcome, said in found if outcome is Verdict.REFUSED]
    if refused and not args.meap_allow_changed_settings:
        raise UsageError(
            f"--load: {path} was trained with other settings: {'; '.join(refused)}; give the same here, or add {ALLOW} "
            "if the change is meant"
        )
    if found:
        warnings.append(f"{path} was trained with other settings: {'; '.join(said for _, said in found)}")
    warnings += schedule.compare(path, state, args)
    if getattr(saved, "no_save_rng", False) and not args.no_load_rng:
        warnings.append(f"{path} has no state of random generators (--no-save-rng): dropout will draw other numbers")
    layers = getattr(saved, "transformer_impl", args.transformer_impl)
    if layers != args.transformer_impl:
        warnings.append(f"{path} was trained with the layers of {layers}; {args.transformer_impl} layers resume it")
    if not hasattr(saved, "meap_record"):
        warnings.append(f"{path} is older than the record of data and versions: whether these are the same is unknown")
    return warnings


def _refuse_another_place_in_the_data(path: Path, saved: Namespace, args: Namespace) -> None:
    """Refuse an iteration to continue at that the run does not have, or whose first sample cannot be told."""
    place, steps = args.override_ckpt_iteration, sum(phase.steps for phase in batch_sizes.phases(args))
    if place is None:
        return
    flag, batch = f"--override-ckpt-iteration {place}", getattr(saved, "global_batch_size", args.global_batch_size)
    grows = args.step_batch_size_schedule or getattr(saved, "step_batch_size_schedule", None)
    refuse(
        (
            grows,
            f"{flag}: Megatron would count samples in steps of one size; not possible with --step-batch-size-schedule",
        ),
        (not 0 <= place <= steps, f"{flag}: this run has {steps:,} steps; give one from 0 to {steps}"),
        (
            batch != args.global_batch_size,
            f"{flag}: needs the global batch size of {path}, {batch}; --global-batch-size {args.global_batch_size} is "
            "another",
        ),
    )


def _state_in_old_format(flag: str, path: Path) -> dict[str, Any]:
    """What a checkpoint in Megatron's old format (`--ckpt-format torch`) holds, its tensors not read; {} for none."""
    first = min(path.glob("mp_rank_*/model_optim_rng.pt"), default=None)
    if first is None:
        return {}
    register_safe_globals()
    with refusing(f"{flag}: {first} is damaged", remedy="name another checkpoint (--ckpt-step)"):
        return torch.load(first, map_location="cpu", mmap=True)


def _state_from_fsdp(flag: str, path: Path, args: Namespace) -> dict[str, Any]:
    """What a checkpoint of a run of FSDP holds besides tensors: the arguments, and the scheduler's state if saved."""
    reader, schedule_of = FileSystemReader(path), "opt_param_scheduler"
    with refusing(f"{flag}: {path} is damaged", remedy="name another checkpoint (--ckpt-step)"):
        names = [name.split(".", 1) for name in reader.read_metadata().state_dict_metadata]
        state: dict[str, Any] = {"args": None}
        if found := {rest[0]: None for start, *rest in names if start == schedule_of and rest}:
            state[schedule_of] = found
        distributed_checkpoint.load(state, storage_reader=reader, no_dist=True)
    if (there := getattr(state["args"], "ckpt_format", args.ckpt_format)) != args.ckpt_format:
        raise UsageError(f"{flag}: {path} is a checkpoint of FSDP; add --ckpt-format {there}, and its other flags")
    return state


def _refuse_what_the_old_format_cannot(path: Path, saved: Namespace, args: Namespace) -> None:
    """Refuse another layout or layers, and state that is not there: Megatron would end, saying so, without an error."""
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "transformer_impl"):
        if getattr(saved, name, getattr(args, name)) != getattr(args, name):
            raise UsageError(
                f"--load: {path} is in Megatron's old format, which fits its own layout and layers alone: --"
                f"{name.replace('_', '-')} {getattr(saved, name)} there, {getattr(args, name)} here"
            )
    if getattr(saved, "no_save_rng", False) and not args.no_load_rng:
        raise UsageError(f"--load: {path} has no state of random generators (--no-save-rng); add --no-load-rng")


def _compare_model(flag: str, path: Path, saved: Namespace, args: Namespace, resumes: bool) -> list[str]:
    """Refuse another model or tokenizer, which no flag allows, and one that computes something else, unless allowed."""
    shape = set(model_arguments.SHAPE)
    if not resumes:
        shape.remove("rotary_base")  # no weight depends on it: contexts are extended by changing it
    if args.hybrid_layer_pattern and not getattr(saved, "hybrid_layer_pattern", None):
        shape.remove("num_layers")  # a GPTModel's, which Megatron pairs with the pattern itself
    if different := model_arguments.differences(saved, args, sorted(shape)):
        raise UsageError(
            f"{flag}: {path} holds another model: {'; '.join(different)}; repeat its sizes, or name another"
        )
    if getattr(saved, "meap_tokenizer_sha256", args.meap_tokenizer_sha256) != args.meap_tokenizer_sha256:
        raise UsageError(
            f"{flag}: {path} was trained with another tokenizer ({saved.tokenizer_model} there, "
            f"{args.tokenizer_model} here); use the same one"
        )
    if known_to_differ(getattr(saved, "meap_tokenizer_ids", None), args.meap_tokenizer_ids):
        raise UsageError(
            f"{flag}: {path} was trained with a tokenizer that gives different ids ({saved.tokenizer_model} there, "
            f"{args.tokenizer_model} here): its vocabulary files are the same, but other settings differ "
            "(tokenizer_config.json); use the same tokenizer"
        )
    changed = model_arguments.differences(saved, args, model_arguments.FUNCTION)
    if changed and not args.meap_allow_changed_settings:
        raise UsageError(
            f"{flag}: {path} computes something else with its weights: {'; '.join(changed)}; repeat its settings, or "
            f"add {ALLOW} if the change is meant"
        )
    if not resumes:
        changed += model_arguments.differences(saved, args, ["rotary_base"])
    return [f"{flag}: the model is changed: {'; '.join(changed)}"] if changed else []


def unusable_optimizer_state(path: Path, saved: Namespace, args: Namespace) -> str | None:
    """Why a run cannot load a checkpoint's optimizer state: it would be lost, or be given to other parameters.

    Args:
        path: the checkpoint's directory.
        saved: its arguments.
        args: the run's.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    here = is_distributed(args)
    kinds = [is_distributed(saved) if hasattr(saved, "use_distributed_optimizer") else here, here]
    if kinds[0] != kinds[1]:
        this, that = ("a distributed" if distributed else "a plain" for distributed in kinds)
        repeat = "add" if kinds[0] else "drop"
        return f"is that of {this} optimizer, this run has {that} one; {repeat} --use-distributed-optimizer"
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "transformer_impl")
    changed = [
        f"--{name.replace('_', '-')} {getattr(saved, name)} there, {getattr(args, name)} here"
        for name in names
        if getattr(saved, name, getattr(args, name)) != getattr(args, name)
    ]
    if not (kinds[0] and changed) or latest.is_from_fsdp(path):
        return None
    kind = (dist_checkpointing.load_content_metadata(str(path)) or {}).get("distrib_optim_sharding_type")
    if kind is None or kind in DistributedOptimizer.checkpoint_fully_reshardable_formats:
        return None
    return (
        f"is flat, in the order of its run's parameters, and does not fit: {'; '.join(changed)}; repeat that, or save "
        "there once more with --dist-ckpt-optim-fully-reshardable"
    )


def _refuse_another_optimizer(path: Path, saved: Namespace, args: Namespace) -> None:
    """Refuse an optimizer state that this run cannot load."""
    if args.no_load_optim or args.skip_train:
        return
    if getattr(saved, "no_save_optim", False):
        raise UsageError(f"--load: {path} has no optimizer state (--no-save-optim); add --no-load-optim for a new one")
    if problem := unusable_optimizer_state(path, saved, args):
        raise UsageError(
            f"--load: the optimizer state in {path} {problem}, or start with a new optimizer (--no-load-optim)"
        )
