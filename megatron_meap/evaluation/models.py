"""The models to evaluate: Hugging Face directories, and Megatron checkpoints that are exported to a cache first."""

import hashlib
import json
import logging
import multiprocessing
import os
import re
import warnings
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_meap.backend import device
from megatron_meap.checkpoint import latest
from megatron_meap.checkpoint.reader import open_checkpoint
from megatron_meap.errors import UsageError, refusing

_SPEC = re.compile(r"(?:(?P<name>[^=/]+)=)?(?P<path>.+?)(?:@(?P<iteration>\d+|all))?")


@dataclass(frozen=True)
class Model:
    """One model of a comparison."""

    name: str
    """What it is called in tables and pictures."""
    directory: Path
    """Hugging Face directory."""
    source: str
    """What the user named."""
    run: str
    """The checkpoints of one run share it: they are one curve."""
    tokens: int | None = None
    """Tokens it was trained on; None where that is not known."""


def open_models(specs: list[str], cache: Path, tokenizer: str | None = None) -> list[Model]:
    """The models named on the command line.

    Args:
        specs: `[NAME=]PATH[@ITERATION]`; `@all` is every checkpoint of the directory.
        cache: folder for exports of Megatron checkpoints.
        tokenizer: of these checkpoints, if it is no longer where it was during training.

    Raises:
        UsageError: a path holds no model, an iteration does not exist, or two models have the same name.
    """
    models = [model for spec in specs for model in _open(spec, cache, tokenizer)]
    names = [model.name for model in models]
    for model in models:
        if names.count(model.name) > 1:
            raise UsageError(f"{model.source}: two models are called {model.name!r}; name them: NAME=PATH")
    return models


def parse(spec: str) -> tuple[str, Path, str | None]:
    """Name, path and iteration (as written) of a model named on the command line as `[NAME=]PATH[@ITERATION]`.

    Raises:
        UsageError: it is not of that form.
    """
    if spec and Path(spec).exists():  # even if it contains = or @
        return _default_name(Path(spec)), Path(spec), None
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise UsageError(f"{spec or 'an empty name'}: expected [NAME=]PATH[@ITERATION]")
    path = Path(match["path"])
    return match["name"] or _default_name(path), path, match["iteration"]


def _open(spec: str, cache: Path, tokenizer: str | None) -> list[Model]:
    name, path, wanted = parse(spec)
    if (path / "config.json").is_file():
        if wanted:
            raise UsageError(f"{spec}: a Hugging Face directory has no iterations; leave out @{wanted}")
        return [Model(name, path, str(path), name)]
    if wanted == "all":
        steps = latest.iterations(path) if path.is_dir() else []
        if not steps:
            raise UsageError(f"{path}: holds no checkpoint; name a --save directory or a Hugging Face directory")
        return [replace(_export(path, step, name, cache, tokenizer), name=f"{name}@{step}") for step in steps]
    return [_export(path, int(wanted) if wanted else None, name, cache, tokenizer)]


def _default_name(path: Path) -> str:
    """The last part of a path that is not a generic name."""
    says_nothing = ("checkpoints", "checkpoint", "hf", "..", "/")
    parts = [part for part in path.parts if part not in says_nothing]
    return parts[-1] if parts else path.resolve().name


def _export(path: Path, iteration: int | None, name: str, cache: Path, tokenizer: str | None) -> Model:
    """A Megatron checkpoint as a Hugging Face directory in the cache, exported unless it is there already."""
    checkpoint = open_checkpoint(path, iteration)
    written = (checkpoint.directory / ".metadata").stat().st_mtime_ns
    identity = f"{checkpoint.directory.resolve()}\n{written}" + (f"\n{tokenizer}" if tokenizer else "")
    directory = cache / f"{checkpoint.directory.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if not (directory / "config.json").is_file():
        print(f"{checkpoint.directory}: exporting to {directory}", flush=True)
        # In a separate process: the export's self-check runs Megatron on the CPU, whatever this machine has.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(export_here, str(path), str(directory), iteration, tokenizer).result()
    source = str(path) if iteration is None else f"{path}@{iteration}"
    return Model(name, directory, source, name, trained_tokens(checkpoint.args))


def trained_tokens(args: Namespace) -> int | None:
    """Tokens that a checkpoint was trained on, by the arguments in it; None if they do not say."""
    return (getattr(args, "consumed_train_samples", 0) or 0) * args.seq_length or None


def prepare_export() -> None:
    """Make this a process that only exports: quietly, and on the CPU, whatever this machine has."""
    os.environ["MEAP_DEVICE"] = "cpu"
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    device.prepare()


def export_here(load: str, output: str, iteration: int | None, tokenizer: str | None) -> None:
    """Export a checkpoint, in place of an earlier export, in a process that does nothing else."""
    prepare_export()
    from megatron_meap.huggingface.export import ExportJob, export

    export(ExportJob(load=load, output=output, iteration=iteration, tokenizer=tokenizer, overwrite=True))


def default_cache() -> Path:
    """Where exports are kept: `$MEAP_CACHE`, or `megatron_meap` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MEAP_CACHE") or Path(home) / "megatron_meap") / "exports"


def context_length(model: Model) -> int:
    """Tokens of the model's context.

    Raises:
        UsageError: its configuration does not say.
    """
    from transformers import AutoConfig

    with refusing(f"{model.directory}/config.json: transformers cannot read it"):
        config = AutoConfig.from_pretrained(model.directory).get_text_config()
    found = getattr(config, "max_position_embeddings", None)
    if not isinstance(found, int) or found < 1:
        raise UsageError(f"{model.directory}/config.json: does not say how long the context is")
    return found


def identity(model: Model) -> str:
    """A digest that changes whenever the files of a model do: their names, sizes and times."""
    files = sorted(path for path in model.directory.iterdir() if path.is_file())
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps([str(model.directory.resolve()), facts]).encode()).hexdigest()[:16]


def load(model: Model, batch_size: int | str, where: str | None, dtype: str | None, chat: bool = False) -> Any:
    """The model as lm-eval's `HFLM`.

    Args:
        model: which.
        batch_size: samples at once, or `auto`.
        where: PyTorch device; if not given, a GPU if there is one.
        dtype: PyTorch type; if not given, fp32 on a CPU, elsewhere as stored.
        chat: whether prompts use its chat template.

    Raises:
        UsageError: transformers cannot load it, or its tokenizer has neither BOS nor EOS.
    """
    import torch
    from lm_eval.models.huggingface import HFLM

    from megatron_meap.evaluation.chat import ChatHFLM

    chosen = where or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with refusing("cannot be loaded"):
            loaded = (ChatHFLM if chat else HFLM)(
                pretrained=str(model.directory),
                batch_size=batch_size,
                device=chosen,
                dtype=dtype or ("float32" if chosen == "cpu" else "auto"),
                max_length=context_length(model),
            )
    except UsageError as error:  # may be about the template, which no flag names here
        raise UsageError(f"{model.source}: {str(error).replace('--meap-sft-template', 'its chat template')}") from error
    if loaded.tokenizer.eos_token_id is None and loaded.tokenizer.bos_token_id is None:
        raise UsageError(f"{model.source}: its tokenizer has neither BOS nor EOS, which lm-eval needs to score text")
    return loaded
