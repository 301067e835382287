"""The paper's commonsense tasks: the hub's names, and PIQA from its original files for machines without a hub."""

from pathlib import Path
from typing import Any

from megatron_meap.errors import UsageError, refusing
from megatron_meap.evaluation.tasks.files import lines, rows
from megatron_meap.evaluation.tasks.options import Options, as_dataset

HUB_TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "piqa", "winogrande")
"""lm-eval's own tasks that the paper reports (zero-shot); they load their data from the hub."""


def from_folder(name: str, folder: Path, definition: Path) -> Any | None:
    """One of lm-eval's own tasks on a local file instead of the hub's.

    Args:
        name: of the task.
        folder: may hold `<name>.jsonl`, with the fields that the hub's data set has.
        definition: lm-eval's file of the task.

    Returns:
        The task, or None where the folder has no such file.

    Raises:
        UsageError: the file has other fields.
    """
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    path = folder / f"{name}.jsonl"
    if not path.is_file():
        return None
    config = load_yaml(definition, resolve_func=True)
    split = config.get("test_split") or config["validation_split"]
    config |= {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path.resolve())}},
        "training_split": None,
        "validation_split": None,
        "test_split": split,
        "metadata": {"version": config.get("metadata", {}).get("version")},
    }
    for key in ("tag", "group"):
        config.pop(key, None)
    with refusing(f"--commonsense-data: {path}: does not have the fields of the hub's {name}"):
        return ConfigurableTask(config=config)  # whose templates and functions may meet other fields


def piqa(**metadata: Any) -> dict[str, Any]:
    """PIQA's validation set (`goal`, `sol1`, `sol2`), its labels in the `-labels.lst` beside it or in the rows."""
    options = Options.from_metadata(metadata)
    if options.piqa_file is None:
        raise UsageError("--piqa-file: needed for meap_piqa; give the original's valid.jsonl")
    found = list(rows(options.piqa_file, "--piqa-file"))
    for place, row in found:
        if not all(isinstance(row.get(name), str) for name in ("goal", "sol1", "sol2")):
            raise UsageError(f"--piqa-file {place}: expected goal, sol1 and sol2")
    labels = [row.get("label") for _, row in found]
    if None in labels:
        path = options.piqa_file.removesuffix(".jsonl")
        labels = [int(line) for _, line in lines(f"{path}_labels.lst", "--piqa-file: its labels")]
    if len(labels) != len(found):
        raise UsageError(f"--piqa-file {options.piqa_file}: has {len(found)} rows, but {len(labels)} labels")
    chosen = [
        {name: row[name] for name in ("goal", "sol1", "sol2")} | {"label": label}
        for (_, row), label in zip(found, labels, strict=True)
    ]
    return as_dataset(chosen[: options.piqa_rows])
