"""Runs tasks on models through lm-evaluation-harness, one after the other, and keeps what is finished.

The answers of the models are also kept, batch by batch, in lm-eval's own cache: an interrupted command resumes there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

from megatron_meap.errors import UsageError, one_line
from megatron_meap.evaluation import models
from megatron_meap.evaluation.models import Model
from megatron_meap.evaluation.reporting.results import ModelResults
from megatron_meap.evaluation.suites import TASKS, Plan
from megatron_meap.evaluation.tasks.commonsense import HUB_TASKS, from_folder
from megatron_meap.evaluation.tasks.judge import JudgeUnavailable
from megatron_meap.evaluation.tasks.options import Unsuitable, counter

JUDGED = "meap_faithfulness"


@dataclass(frozen=True)
class Machine:
    """Where and how models run."""

    batch_size: int | str = 8
    device: str | None = None
    dtype: str | None = None
    chat_template: bool = False
    """Whether prompts go through the tokenizer's chat template."""
    answers: Path | None = None
    """Folder in which the models' answers are kept and looked up."""

    def kept_answers(self, model: Model) -> str | None:
        """Where lm-eval keeps a model's answers, which depend on its files, the device and the type."""
        if self.answers is None:
            return None
        return str(self.answers / "-".join(filter(None, (models.identity(model), self.device, self.dtype))))


def load_tasks(plan: Plan, tokenizer: str) -> dict[str, Any]:
    """lm-eval's task objects by name, with their samples; every model gets the same ones.

    Args:
        plan: which; a suite's task whose data cannot be loaded moves to `plan.left_out`.
        tokenizer: directory of the tokenizer that measures the prompts.

    Raises:
        UsageError: a task does not exist, or cannot load its data.
    """
    from lm_eval.tasks import TaskManager

    ours = {path.stem for path in TASKS.glob("*.yaml")}
    manager = TaskManager(
        include_path=str(TASKS),
        include_defaults=not ours.issuperset(plan.tasks),  # indexing lm-eval's own takes seconds
        metadata=plan.metadata | {"pretrained": tokenizer, "tokenizer": tokenizer},
    )
    tasks: dict[str, Any] = {}
    folder = plan.metadata.get("commonsense_data")
    for name in plan.tasks:
        if name not in ours and name not in manager.all_tasks:
            raise UsageError(f"--tasks {name}: neither one of ours ({', '.join(sorted(ours))}) nor one of lm-eval's")
        try:
            print(f"preparing {name}", flush=True)
            local = None
            if folder and name in HUB_TASKS:
                local = from_folder(name, Path(folder), Path(manager.task_index[name].yaml_path))
            tasks |= {name: local} if local else manager.load(name)["tasks"]
        except Unsuitable as error:
            if plan.suite is None:
                raise
            plan.left_out[name] = str(error)
        except UsageError:
            raise
        except Exception as error:  # the libraries raise many things if the hub cannot be reached
            if plan.suite is None:
                raise UsageError(f"--tasks {name}: its data cannot be loaded ({one_line(error)})") from error
            plan.left_out[name] = f"its data cannot be loaded ({one_line(error)})"
    return tasks


def evaluate(
    chosen: list[Model], tasks: dict[str, Any], machine: Machine, finished: Callable[[list[ModelResults]], None]
) -> list[ModelResults]:
    """Run all tasks on all models.

    Args:
        chosen: the models; the first is the baseline of comparisons.
        tasks: as `load_tasks` returns them.
        machine: where.
        finished: called with the results so far whenever a model is done, and before an error is raised.

    Raises:
        UsageError: a model cannot be loaded, or the judge does not answer.
    """
    judged_last = sorted(tasks.values(), key=lambda task: task.task_name == JUDGED)  # it may fail
    found: list[ModelResults] = []
    silent: JudgeUnavailable | None = None
    for number, model in enumerate(chosen, 1):
        loaded = models.load(model, machine.batch_size, machine.device, machine.dtype, machine.chat_template)
        found.append(ModelResults(model))
        try:
            for task in judged_last:
                if silent and task.task_name == JUDGED:
                    continue
                print(f"model {number}/{len(chosen)}, {model.name}: {task.task_name}", flush=True)
                add_tasks(found[-1], [task], loaded, machine.chat_template, machine.kept_answers(model))
        except JudgeUnavailable as error:
            silent = error
        finally:
            finished([result for result in found if result.samples])
        del loaded
    if silent:
        raise silent
    return found


def add_tasks(
    result: ModelResults, tasks: list[Any], loaded: Any, chat_template: bool = False, answers: str | None = None
) -> None:
    """Run tasks on a model and add the outcome to its results.

    Args:
        result: of the model.
        tasks: lm-eval's.
        loaded: lm-eval's model.
        chat_template: whether prompts go through it.
        answers: how the name of the file that keeps the answers begins; None keeps none.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    outcome = simple_evaluate(
        loaded,
        tasks=tasks,
        batch_size=getattr(loaded, "batch_size", None),
        apply_chat_template=chat_template,
        use_cache=answers,
        task_manager=TaskManager(include_defaults=False),  # otherwise it would index all of its task files each time
    )
    assert outcome is not None
    result.samples |= outcome.pop("samples")
    for key, value in outcome.items():
        if isinstance(value, dict) and isinstance(result.results.get(key), dict):
            result.results[key] |= value
        else:
            result.results[key] = value


def measuring_tokenizer(chosen: list[Model]) -> str:
    """Directory of the model whose tokenizer needs most tokens: prompts that fit its context fit the others' too."""
    text = " ".join(topics.topics[name] for name in sorted(topics.topics)[:5]) + f" {list(range(10_000, 11_000, 7))}"
    return max((str(model.directory) for model in chosen), key=lambda directory: counter(directory)(text))


def check_lengths(tasks: dict[str, Any], plan: Plan, chosen: list[Model]) -> dict[str, Any]:
    """The tasks whose prompts fit into every model's context: lm-eval would silently cut off their beginnings.

    Raises:
        UsageError: the prompts of a task named by the user do not fit; tasks of a suite move to `plan.left_out`.
    """
    fitting = {}
    for name, task in tasks.items():
        problems = (_too_long(name, task, model, plan.metadata.get("chat_template", False)) for model in chosen)
        problem = next(filter(None, problems), None)
        if problem is None:
            fitting[name] = task
        elif plan.suite is None:
            raise UsageError(f"{name}: {problem}; use shorter --context-lengths, or meap_multidoc with --qa-documents")
        else:
            plan.left_out[name] = problem
    return fitting


def _too_long(name: str, task: Any, model: Model, chat_template: bool) -> str | None:
    """What is too long for the model among the samples of a task.

    Of lm-eval's own tasks only the scored texts must fit: they cut prompts from the left on purpose.
    """
    count, context = counter(str(model.directory), chat_template), models.context_length(model)
    ours = name.startswith("meap_") and "prompt" in task.features
    room = (task.config.generation_kwargs or {}).get("max_gen_toks", 0)
    for doc in task.eval_docs:
        needed = max([room, *count.each([f" {text}" for text in _scored(task, doc)])])
        needed += count(doc["prompt"]) if ours else 0
        if needed > context:
            what = "a prompt takes {} tokens with its answer" if ours else "a text to score has {} tokens"
            return f"{what.format(needed)}, the context of {model.source} is {context}"
    return None


def _scored(task: Any, doc: dict[str, Any]) -> list[str]:
    """Texts of a sample whose likelihood is asked for."""
    if task.OUTPUT_TYPE == "multiple_choice":
        return task.doc_to_choice(doc)
    return [task.doc_to_target(doc)] if task.OUTPUT_TYPE == "loglikelihood" else []
