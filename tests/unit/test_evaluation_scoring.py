"""Scoring of models whose scores are known: perfect, chance, and a bias at known places."""

import random
from pathlib import Path

import numpy as np
import pytest

from megatron_meap.evaluation.models import Model, parse
from megatron_meap.evaluation.reporting import statistics
from megatron_meap.evaluation.reporting.results import ModelResults, compare, headline, is_share
from megatron_meap.evaluation.reporting.statistics import Estimate, adjusted, difference, estimate
from megatron_meap.evaluation.run import add_tasks, load_tasks
from megatron_meap.evaluation.suites import Plan
from megatron_meap.evaluation.tasks.scoring import Cell, best_subspan_em, cell_name, contains, ranked
from tests.fake_models import RuleModel, look_up, nothing

GENERATED = ["meap_needle", "meap_kv", "meap_kinship"]
RANKED = [f"{task}_logprob" for task in GENERATED]


@pytest.fixture(scope="module")
def tasks(character_tokenizer: Path) -> dict:
    metadata = {"max_seq_lengths": [1024], "samples": 20, "kv_digits": 6, "kv_pairs": 10}
    return load_tasks(Plan([*GENERATED, *RANKED], metadata), str(character_tokenizer))


def scores(tasks: dict, rule, name: str = "model") -> ModelResults:
    result = ModelResults(Model(name, Path(), "", name))
    add_tasks(result, list(tasks.values()), RuleModel(rule))
    return result


def mean(result: ModelResults, task: str, cell: Cell | None = None) -> float:
    found = result.estimate(task, "acc", cell)
    assert found is not None
    return found.mean


def test_an_oracle_scores_everything_and_ignorance_scores_chance(tasks: dict) -> None:
    oracle, ignorant = scores(tasks, look_up, "oracle"), scores(tasks, nothing, "ignorant")
    for task in [*GENERATED, *RANKED]:
        assert mean(oracle, task) == 1.0, task
        assert oracle.results["results"][task]["acc,none"] == 1.0
    assert all(mean(ignorant, task) == 0.0 for task in GENERATED)
    chance = {
        "meap_needle_logprob": 0.1,
        "meap_kv_logprob": 0.1,
        "meap_kinship_logprob": (1 / 4 + 1 / 6 + 1 / 8 + 1 / 10) / 4,
    }
    for task, expected in chance.items():
        samples = len(ignorant.samples[task])
        assert abs(mean(ignorant, task) - expected) < 4 * np.sqrt(expected * (1 - expected) / samples), task
    found = compare([ignorant, oracle])
    assert all(one.adjusted_p < 0.001 and one.found.mean > 0.5 for one in found.values())
    assert oracle.estimate("meap_needle_logprob", "logprob").mean == -0.5


def test_a_short_value_is_not_likelier_for_being_short(tasks: dict) -> None:
    """A model that finds all tokens equally likely is right by chance, however many tokens the right value has."""
    for short in (2, 5):
        doc = {"gold": 1, "choice_tokens": [4, short, 4], "cell": {}}
        assert ranked(doc, [(-4.0, False), (-0.9 * short, False), (-4.0, False)])["acc"] == 1.0
        assert ranked(doc, [(-4.0, False), (-1.1 * short, False), (-4.0, False)])["acc"] == 0.0
    for doc in tasks["meap_kv_logprob"].test_docs():
        assert doc["choice_tokens"] == [len(each) for each in doc["choices"]]  # its tokens are characters


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/ntp/checkpoints", "ntp"),
        ("checkpoints", "checkpoints"),
        ("../checkpoints", "checkpoints"),
        ("out/hf", "out"),
        (".", "project"),
    ],
)
def test_a_model_is_called_by_what_was_typed(path: str, name: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    assert parse(path) == (name, Path(path), None)


def test_a_planted_position_bias_shows_at_its_positions(tasks: dict) -> None:
    def forgets_the_middle(prompt: str) -> str | None:
        answer = look_up(prompt)
        place = prompt.index(answer) / len(prompt) if answer else 0.0
        return answer if place < 0.4 or place > 0.6 else None

    biased = scores({"meap_kv": tasks["meap_kv"], "meap_needle": tasks["meap_needle"]}, forgets_the_middle)
    depths = [mean(biased, "meap_needle", {"length": 1024, "depth": depth}) for depth in (0, 50, 100)]
    places = [mean(biased, "meap_kv", {"pairs": 10, "position": place}) for place in (0, 4, 9)]
    assert depths == places == [1.0, 0.0, 1.0]
    assert biased.results["results"]["meap_kv"]["acc pairs=10 position=0,none"] == 1.0  # lm-eval's own table has it


def test_a_chat_template_is_around_every_prompt(tasks: dict) -> None:
    """The same scores as without it, from a model that answers within it only."""

    class ChatModel(RuleModel):
        tokenizer_name = "chat"

        def chat_template(self, chat_template: bool | str = False) -> str:
            return "[{{ messages[0].content }}]"

        def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
            (message,) = chat_history
            assert message["role"] == "user"
            return f"[{message['content']}]"

    def look_up_inside(prompt: str) -> str | None:
        return look_up(prompt[1:-1]) if prompt[0] + prompt[-1] == "[]" else None

    for chat_template, expected in ((True, 1.0), (False, 0.0)):
        result = ModelResults(Model("model", Path(), "", "model"))
        add_tasks(result, list(tasks.values()), ChatModel(look_up_inside), chat_template)
        assert all(mean(result, task) == 1.0 for task in tasks) == chat_template
        assert mean(result, "meap_needle") == expected


def test_names_of_cells() -> None:
    assert cell_name({"length": 1048576, "depth": 50.0}) == "length=1048576 depth=50"
    assert cell_name({"length": 4096, "depth": 33.3}) == "length=4096 depth=33.3"
    assert cell_name(None) == ""


def test_best_subspan_em() -> None:
    assert best_subspan_em("It was the Wilhelm Röntgen!", ["wilhelm röntgen"]) == 1.0
    assert best_subspan_em("An apple, a day", ["the apple day"]) == 1.0  # articles and punctuation do not count
    assert best_subspan_em("Wilhelm", ["Wilhelm Röntgen", "Conrad"]) == 0.0
    assert best_subspan_em("Wilhelm", ["*"]) == 0.0


def test_the_first_line_that_is_not_empty_counts() -> None:
    assert contains({"answer": "42"}, ["\n\n it is 42.\nor 43"])["acc"] == 1.0
    assert contains({"answer": "43"}, ["\n\n it is 42.\nor 43"])["acc"] == 0.0


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator = random.Random(0)
    covered = 0
    for _ in range(200):
        found = estimate([float(generator.random() < 0.3) for _ in range(80)])
        covered += found.low <= 0.3 <= found.high
    assert 180 <= covered <= 199  # 95% of 200 is 190


def records(values: np.ndarray, **more: object) -> list[dict]:
    """Samples [questions, places] as lm-eval keeps them."""
    return [
        {"doc": {"meap_group": f"question {q}"}, "doc_hash": f"{q} {p}", "metrics": ["acc"], "acc": value, **more}
        for (q, p), value in np.ndenumerate(values)
    ]


def test_places_of_one_question_are_no_independent_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal models: 5% of the comparisons may find a difference, and 5% of the intervals may miss the mean."""
    monkeypatch.setattr(statistics, "RESAMPLES", 499)
    generator = np.random.default_rng(0)
    significant = covered = 0
    for _ in range(200):
        questions = generator.normal(size=(2, 24, 1))  # of two models; what a question is worth to one, at every place
        results = [
            ModelResults(
                Model(name, Path(), "", name), {}, {"task": records(each + generator.normal(size=(24, 5)) / 5)}
            )
            for name, each in zip("ab", questions, strict=True)
        ]
        significant += compare(results)["task", "b"].found.p_value < 0.05
        found = results[0].estimate("task", "acc")
        covered += found.low <= 0 <= found.high
    assert 2 <= significant <= 20
    assert 178 <= covered <= 198


def test_metrics_of_lm_evals_own_tasks() -> None:
    """RULER's lengths, of which a sample has one; several filters; perplexity, which no single sample has."""
    one = np.array([[1.0], [0.0]])
    ruler = [{**record, "metrics": ["512", "4096"], "512": record["acc"], "4096": -1.0} for record in records(one)]
    filtered = [*records(one, filter="strict"), *records(1 - one[:1], filter="flexible")]
    tuples = [{**record, "metrics": ["word_perplexity"], "word_perplexity": (-9.5, 3)} for record in records(one)]
    result = ModelResults(
        Model("model", Path(), "", "model"),
        {"results": {"tuples": {"alias": "tuples", "word_perplexity,none": 7.5, "word_perplexity_stderr,none": "N/A"}}},
        {"ruler": ruler, "filtered": filtered, "tuples": tuples, "empty": []},
    )
    assert result.metrics("ruler") == ["512"]
    assert result.estimate("ruler", headline(result, "ruler")).mean == 0.5
    assert is_share("512")
    assert result.metrics("filtered") == ["acc,strict", "acc,flexible"]
    assert [result.estimate("filtered", name).mean for name in result.metrics("filtered")] == [0.5, 0.0]
    assert headline(result, "filtered") == "acc,strict"
    assert result.estimate("tuples", headline(result, "tuples")) == Estimate(7.5, 7.5, 7.5, 2)
    assert headline(result, "empty") is None


def test_differences_are_paired_and_adjusted() -> None:
    generator = random.Random(1)
    base = [generator.gauss(0, 10) for _ in range(60)]
    shifted = [value + generator.gauss(0.5, 0.5) for value in base]  # small beside the spread, clear in pairs
    found = difference(shifted, base)
    assert found.p_value < 0.001
    assert 0.2 < found.low < found.mean < found.high < 0.8
    assert difference(base, base).p_value == 1.0
    assert adjusted([0.01, 0.02, 0.9]) == pytest.approx([0.03, 0.03, 0.9])
