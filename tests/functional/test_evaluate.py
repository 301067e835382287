"""tools/evaluate.py as its users run it: a model that copies, a judge behind HTTP, and lm-eval's own needle task."""

import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from megatron_meap.errors import UsageError
from megatron_meap.evaluation import models as evaluation_models
from megatron_meap.evaluation.models import Model, open_models
from megatron_meap.evaluation.reporting.results import ModelResults
from megatron_meap.evaluation.run import Machine, add_tasks, check_lengths, load_tasks, measuring_tokenizer
from megatron_meap.evaluation.run import evaluate as run_tasks
from megatron_meap.evaluation.suites import Plan
from megatron_meap.evaluation.tasks import judge
from megatron_meap.evaluation.tasks.scoring import contains
from tests import warm
from tests.conftest import REPOSITORY
from tests.fake_models import RuleModel, look_up


def evaluate(*flags: str, **environment: str) -> subprocess.CompletedProcess:
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return warm.run(
        [REPOSITORY / "tools" / "evaluate.py", *flags], {**os.environ, **offline, **environment}, timeout=500
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model trained on pure copying, and the same before its training."""
    folder = tmp_path_factory.mktemp("models")
    asked = [folder / "trained", "600", folder / "untrained", "2"]
    subprocess.run([sys.executable, "-m", "tests.copy_model", *asked], cwd=REPOSITORY, check=True)
    return {name: folder / name for name in ("trained", "untrained")}


def test_a_model_that_copies_finds_values_by_their_keys(models: dict[str, Path], tmp_path: Path) -> None:
    done = evaluate(
        f"before={models['untrained']}", f"after={models['trained']}", "--tasks", "meap_kv,meap_kv_logprob",
        "--kv-digits", "2", "--kv-pairs", "16", "--no-kv-instruction", "--samples", "12", "--output", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "results.csv") as file:
        rows = list(csv.DictReader(file))
    found = {(row["model"], row["task"]): row for row in rows if row["metric"] == "acc" and not row["cell"]}
    assert float(found["after", "meap_kv"]["value"]) > 0.9
    assert float(found["after", "meap_kv_logprob"]["value"]) > 0.9
    assert float(found["before", "meap_kv_logprob"]["value"]) < 0.3  # chance is 0.1
    assert {row["cell"] for row in rows} >= {"pairs=16 position=0", "pairs=16 position=15"}
    with open(tmp_path / "differences.csv") as file:
        assert all(float(row["adjusted_p"]) < 0.01 for row in csv.DictReader(file))
    (saved,) = (tmp_path / "lm_eval" / "after").glob("results_*.json")
    assert json.loads(saved.read_text())["results"]["meap_kv"]["acc,none"] == pytest.approx(
        float(found["after", "meap_kv"]["value"]), abs=1e-5
    )
    assert len(list((tmp_path / "lm_eval" / "after").glob("samples_meap_kv_2*.jsonl"))) == 1
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is loaded from elsewhere

    again = evaluate(str(models["trained"]), "--tasks", "meap_kv", "--output", str(tmp_path))
    assert again.returncode == 2
    assert "holds earlier results" in again.stderr


def test_bad_input_is_one_line(models: dict[str, Path], tmp_path: Path) -> None:
    model, output = str(models["trained"]), str(tmp_path / "out")
    done = evaluate(model, "--suite", "quick", "--context-lengths", "512", "--output", output)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("--context-lengths 512: a model's context is only 256 tokens; use shorter ones")
    assert "Traceback" not in done.stderr

    for specs, message in {
        (f"{model}@5",): "has no iterations",
        (model, model): "two models are called 'trained'",
        (str(tmp_path),): "not a Megatron checkpoint",
        (f"{tmp_path}@all",): "holds no checkpoint",
        ("",): r"expected \[NAME=\]PATH",
    }.items():
        with pytest.raises(UsageError, match=message):
            open_models(list(specs), tmp_path)
    with pytest.raises(UsageError, match="--tasks no_such_task: neither one of ours"):
        load_tasks(Plan(["no_such_task"], {}), model)
    plan = Plan(["meap_kv"], {"max_seq_lengths": [256], "kv_pairs": 120, "kv_digits": 2, "kv_instruction": False})
    tasks, chosen = load_tasks(plan, model), open_models([model], tmp_path)
    with pytest.raises(UsageError, match=r"meap_kv: a prompt takes 3\d\d tokens with its answer"):
        check_lengths(tasks, plan, chosen)
    suite = Plan(plan.tasks, plan.metadata, suite="quick")
    assert check_lengths(tasks, suite, chosen) == {}
    assert "the context of" in suite.left_out["meap_kv"]


def test_models_whose_path_has_signs_of_the_notation(models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "lr=3e-4@home"
    shutil.copytree(models["trained"], folder)
    assert [(model.name, model.directory) for model in open_models([str(folder)], tmp_path)] == [
        ("lr=3e-4@home", folder)
    ]
    (named,) = open_models([f"a={folder}"], tmp_path)
    assert (named.name, named.directory) == ("a", folder)


def test_prompts_are_measured_by_the_tokenizer_that_needs_most_tokens(
    models: dict[str, Path], character_tokenizer: Path
) -> None:
    few, many = (Model("", directory, "", "") for directory in (models["trained"], character_tokenizer))
    assert measuring_tokenizer([few, many]) == measuring_tokenizer([many, few]) == str(character_tokenizer)


class Answers(BaseHTTPRequestHandler):
    """A judge that finds summaries faithful whose words all stand in the document; it fails every other time."""

    asked = 0
    down = False

    def do_POST(self) -> None:
        type(self).asked += 1
        if not self.path.startswith("/v1/"):
            self.send_error(404)
            return
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["messages"][0]["content"]
        document, summary = re.search(r"Document:\n(.*)\n\nSummary:\n(.*)\n\nAnswer", prompt, re.DOTALL).groups()
        faithful = set(summary.split()) <= set(document.split())
        said = "FAITHFUL" if faithful else "**Hallucinated**."
        said = "I cannot say." if "unsure" in summary else said
        fails = self.down or self.asked % 2 == 1
        fails = fails and "page" not in self.path
        body = b"<html>" if "page" in self.path else json.dumps({"choices": [{"message": {"content": said}}]}).encode()
        self.send_response(503 if fails else 200)
        self.end_headers()
        self.wfile.write(b"busy" if fails else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    Answers.asked, Answers.down = 0, False
    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_the_judge_is_asked_again_and_keeps_its_verdicts(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    log = tmp_path / "judge.jsonl"
    asks = judge.Judge(endpoint, "any", log=str(log))
    assert asks.faithful("the grass is green", "grass is green")
    assert not asks.faithful("the grass is green", "the sky is blue")
    assert Answers.asked == 4  # each was refused once
    for _ in range(2):
        assert asks.faithful("the grass is green", "unsure") is None
    assert Answers.asked == 6  # what is no verdict is kept, and not asked for again
    Answers.down = True
    assert asks.faithful("the grass is green", "grass is green")  # known
    with pytest.raises(judge.JudgeUnavailable, match=rf"no answer after 5 tries .*kept in {re.escape(str(log))}"):
        asks.faithful("the grass is green", "something new")
    assert len(log.read_text().splitlines()) == 3
    log.write_text(log.read_text() + '{"sha256": "a\n{"foreign": 1}\n[]\n')  # of a run that was killed, and of others
    assert asks.faithful("the grass is green", "grass is green")
    for url, reason in {
        "http://127.0.0.1:9/v1": "after 5 tries",
        "http://[::1/v1": "not asked .the URL or the key cannot be used",
        endpoint.replace("/v1", "/missing"): "refused .HTTP status 404",
        endpoint.replace("/v1", "/v1/page"): "no judge .what comes back is not a chat completion",
    }.items():
        with pytest.raises(judge.JudgeUnavailable, match=reason):
            judge.Judge(url, "any").faithful("a", "b")


@pytest.mark.parametrize(
    ("said", "faithful"),
    [
        ("FAITHFUL", True), ("**Hallucinated**.", False), ("<think>FAITHFUL or not?</think>\nHALLUCINATED", False),
        ("Faithful: all of it stands in the document.", True), ("NOT FAITHFUL", None), ("UNFAITHFUL", None),
        ("Verdict: FAITHFUL", True), ('```json\n{"verdict": "HALLUCINATED"}\n```', False), ("\\boxed{FAITHFUL}", True),
        ("The final answer is $\\boxed{\\text{Faithful}}$.", True), ("Answer: not faithful", None),
        ('{"faithful": false, "reason": "x"}', False), ('{"hallucinated": false}', True), ("**Faithful?** No.", False),
        ("Faithful: no unsupported claim.", True), ("HALLUCINATED. No source says so.", False),
        ("The summary is not faithful.", None), ("FAITHFUL or HALLUCINATED? Hard to say.", None),
    ],
)  # fmt: skip
def test_only_a_verdict_is_taken_for_one(said: str, faithful: bool | None) -> None:
    assert judge.verdict(said) is faithful


def test_results_survive_a_judge_that_does_not_answer(endpoint: str, models: dict[str, Path], tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"document": f"{i:02x} aa bb cc dd ee {i:02x}"}) for i in range(3)))
    flags = [
        str(models["trained"]), "--tasks", "meap_kv_logprob,meap_faithfulness", "--summaries-file", str(texts),
        "--kv-digits", "2", "--samples", "2", "--judge-model", "any", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    failed = evaluate(*flags, "--judge-url", "http://127.0.0.1:9/v1")
    assert failed.returncode == 2
    assert "--judge-url http://127.0.0.1:9/v1: no answer after 5 tries" in failed.stderr
    assert "meap_kv_logprob" in (tmp_path / "out" / "results.csv").read_text()
    assert (tmp_path / "out" / "answers").is_dir()
    done = evaluate(*flags, "--judge-url", endpoint)  # the same command goes on
    assert done.returncode == 0, done.stderr
    assert "meap_faithfulness,,faithful" in (tmp_path / "out" / "results.csv").read_text()
    assert not (tmp_path / "out" / "answers").exists()
    finished = evaluate(*flags, "--judge-url", endpoint)
    assert finished.returncode == 2
    assert "holds earlier results" in finished.stderr


def test_without_the_judge_all_models_do_the_other_tasks(
    character_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(evaluation_models, "load", lambda *_: RuleModel(look_up))
    for name, value in zip(judge.ENVIRONMENT, ("http://127.0.0.1:9/v1", "any"), strict=True):
        monkeypatch.setenv(name, value)
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"document": "some text"}))
    metadata = {"kv_digits": 4, "max_seq_lengths": [512], "samples": 2, "summaries_file": str(texts)}
    tasks = load_tasks(Plan(["meap_faithfulness", "meap_kv"], metadata), str(character_tokenizer))
    written = []
    with pytest.raises(judge.JudgeUnavailable):
        run_tasks(
            [Model(name, tmp_path, "", name) for name in "ab"], tasks, Machine(),
            lambda found: written.append({result.model.name: list(result.samples) for result in found}),
        )  # fmt: skip
    assert written[-1] == {"a": ["meap_kv"], "b": ["meap_kv"]}


def test_answers_that_were_kept_are_not_asked_for_again(character_tokenizer: Path, tmp_path: Path) -> None:
    plan = Plan(["meap_kv", "meap_kv_logprob"], {"kv_digits": 4, "max_seq_lengths": [512], "samples": 2})
    tasks = list(load_tasks(plan, str(character_tokenizer)).values())
    first, again = (ModelResults(Model("model", Path(), "", "model")) for _ in range(2))
    add_tasks(first, tasks, RuleModel(look_up), answers=str(tmp_path / "answers"))

    def asked(prompt: str) -> None:
        raise AssertionError(prompt)

    add_tasks(again, tasks, RuleModel(asked), answers=str(tmp_path / "answers"))
    for task in plan.tasks:
        assert again.estimate(task, "acc") == first.estimate(task, "acc")


def test_needles_score_as_in_lm_evals_own_task(character_tokenizer: Path, tmp_path: Path) -> None:
    """`niah_single_1` and our needle task with its words: the same model gets the same score within noise."""
    from lm_eval.tasks import TaskManager

    length, tokenizer = 1024, str(character_tokenizer)

    def forgets_the_second_half(prompt: str) -> str | None:
        asked = re.search(r"number for (.+?) mentioned in the provided text", prompt)
        assert asked
        found = re.search(rf"for {re.escape(asked[1])} is: (\d+)\.", prompt)
        return f"it is {found[1]}" if found and found.start() < 0.5 * len(prompt) else None

    manager = TaskManager(metadata={"max_seq_lengths": [length], "tokenizer": tokenizer})
    theirs = ModelResults(Model("model", Path(), "", "model"))
    random.seed(1234)  # lm-eval draws its samples from the global generator
    add_tasks(theirs, [manager.load("niah_single_1")["tasks"]["niah_single_1"]], RuleModel(forgets_the_second_half))
    samples = theirs.samples["niah_single_1"]
    expected = theirs.results["results"]["niah_single_1"][f"{length},none"]
    rescored = [
        contains({"answer": sample["doc"]["outputs"][0]}, sample["filtered_resps"])["acc"] for sample in samples
    ]
    assert np.mean(rescored) == expected  # the same samples, scored by us

    grass = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    haystack = tmp_path / "grass.txt"
    haystack.write_text(grass * 100)
    metadata = {
        "max_seq_lengths": [length], "samples": 25, "depths": list(range(0, 101, 10)), "haystack": str(haystack),
        "needle": "One of the special magic numbers for {key} is: {value}.",
        "question": "What is the special magic number for {key} mentioned in the provided text? "
        "The special magic number for {key} mentioned in the provided text is",
    }  # fmt: skip
    ours = ModelResults(Model("model", Path(), "", "model"))
    task = load_tasks(Plan(["meap_needle"], metadata), tokenizer)["meap_needle"]
    add_tasks(ours, [task], RuleModel(forgets_the_second_half))
    found = ours.estimate("meap_needle", "acc")
    noise = np.sqrt(expected * (1 - expected) * (1 / len(samples) + 1 / found.samples))
    assert 0.2 < expected < 0.8
    assert abs(found.mean - expected) < 3 * noise
