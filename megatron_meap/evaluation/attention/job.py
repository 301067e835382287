"""An attention analysis from start to end: open the models, make the inputs, measure, write."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_meap.errors import UsageError, refuse_to_overwrite
from megatron_meap.evaluation.attention import pictures
from megatron_meap.evaluation.attention import report as pages
from megatron_meap.evaluation.attention.inputs import SEGMENTS, Inputs, make_inputs
from megatron_meap.evaluation.attention.measures import measure, uniform_attention
from megatron_meap.evaluation.attention.recipe import Recipe
from megatron_meap.evaluation.models import parse
from megatron_meap.huggingface.generation import Generator

LONGEST = 4096
"""Length of the paper's samples, and the default unless the models' context is shorter."""


@dataclass(frozen=True)
class AttentionJob:
    """What to analyze."""

    models: list[str]
    """`[NAME=]PATH[@ITERATION]` each."""
    text: str
    output: Path
    recipe: Recipe = field(default_factory=Recipe)
    tokenizer: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuse models that cannot be compared."""
        if len(self.models) > 2:
            raise UsageError(f"{' '.join(self.models)}: {len(self.models)} models; compare two, the first a baseline")
        if len(set(self.names)) < len(self.names):
            raise UsageError(f"two models are called {self.names[0]!r}; name them: NAME=PATH")
        refuse_to_overwrite("--output", self.output / "attention.json", self.overwrite)

    @property
    def names(self) -> list[str]:
        """What the models are called."""
        return [parse(spec)[0] for spec in self.models]


def analyze(job: AttentionJob) -> dict[str, Any]:
    """Measure the models, print a summary, write the report and its pictures; returns the report."""
    generators = [_open(spec, job.tokenizer) for spec in job.models]
    recipe = dataclasses.replace(job.recipe, length=_length(job, generators))
    inputs = make_inputs(job.text, generators[0].tokenizer, recipe)
    _refuse_different_tokenizers(job, generators, inputs)
    measured = []
    with tqdm(total=recipe.samples * len(generators), unit="sample", disable=None) as bar:
        for name, generator in zip(job.names, generators, strict=True):
            bar.set_description(name)
            measured.append(measure(generator.model, inputs, generator.mask_id, bar.update))
    uniform = {f"{name} mass": float((inputs.segments == i).mean()) for i, name in enumerate(SEGMENTS)}
    report: dict[str, Any] = {
        "settings": {"text": job.text, **dataclasses.asdict(recipe)},
        "uniform": {"masked attention": uniform_attention(inputs.masked), **uniform},
        "models": {
            name: {key: pages.summary(values) for key, values in pages.by_name(each).items()}
            for name, each in zip(job.names, measured, strict=True)
        },
    }
    if len(measured) == 2:
        report["comparison"] = pages.comparison(*measured)
        report["paper"] = pages.PAPER
    pages.write(report, job.output)
    pictures.draw(report, job.output)
    print(*pages.lines(report), sep="\n")
    print(f"wrote {job.output}/attention.json, attention.csv, {', '.join(pictures.FILES)}")
    return report


def _open(spec: str, tokenizer: str | None) -> Generator:
    """A model whose tokenizer has a mask token."""
    _, path, iteration = parse(spec)
    if iteration == "all":
        raise UsageError(f"{spec}: name one iteration")
    generator = Generator(str(path), int(iteration) if iteration else None, tokenizer)
    if generator.mask_id is None:
        raise UsageError(
            f"{path}: its tokenizer has no mask token, so nothing can be masked; name one with --tokenizer"
        )
    rows = generator.model.get_input_embeddings().weight.shape[0]
    if generator.mask_id >= rows:
        raise UsageError(f"{path}: the mask token has the id {generator.mask_id}, the model only {rows} embeddings")
    return generator


def _length(job: AttentionJob, generators: list[Generator]) -> int:
    """Tokens of a sample, which must fit into the context of every model."""
    contexts = [generator.model.config.max_position_embeddings for generator in generators]
    length = min(*contexts, LONGEST) if job.recipe.length is None else job.recipe.length
    for path, context in zip(job.models, contexts, strict=True):
        if length > context:
            raise UsageError(f"--length {length}: the context of {path} has only {context} tokens")
    if length < 2:
        raise UsageError(f"--length {length}: must be at least 2")
    return length


def _refuse_different_tokenizers(job: AttentionJob, generators: list[Generator], inputs: Inputs) -> None:
    """Refuse models whose ids do not mean the same text, or whose mask tokens differ."""
    first = generators[0]
    known = int(inputs.texts.max()) + 1
    pieces = first.tokenizer.convert_ids_to_tokens(range(known))
    for path, other in zip(job.models[1:], generators[1:], strict=True):
        same = other.tokenizer.convert_ids_to_tokens(range(min(known, len(other.tokenizer)))) == pieces
        if not same or other.mask_id != first.mask_id:
            raise UsageError(
                f"{job.models[0]} and {path} have different tokenizers, so they cannot read the same inputs; "
                "give models with the same one"
            )
