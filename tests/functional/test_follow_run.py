"""tools/follow_run.py: every complete checkpoint once, none that is being written or pruned; it resumes."""

import copy
import csv
import json
import shutil
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_meap.checkpoint import integrity, latest, reader
from megatron_meap.cluster import run_files
from megatron_meap.commands import follow_run
from megatron_meap.errors import UsageError
from megatron_meap.evaluation import bits, following
from megatron_meap.evaluation.reporting import scores
from tests import warm
from tests.conftest import Corpus
from tests.launch import ENTRY, MODEL, REPOSITORY, TRAINING, environment
from tests.models import MODELS, save_random_model


def save(run: Path, step: int, content: str = "weights", files: int = 3) -> None:
    """Write a complete checkpoint, with the files that following reads, as the newest."""
    folder = latest.directory(run, step)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "tokenizer").mkdir(parents=True)
    names = ["tokenizer/tokenizer.model", *(f"__0_{number}.distcp" for number in range(files))]
    for name in names:
        (folder / name).write_text(f"{content} {step}")
    hashes = {str(Path(name).relative_to(folder)): found for name, found in
              integrity.hash_files([folder / name for name in names]).items()}  # fmt: skip
    (folder / latest.HASHES).write_text(json.dumps({"files": hashes}))
    latest.set_pointer(run, step)


def test_the_record_of_hashes_is_megatrons() -> None:
    assert latest.HASHES == integrity.FILE


def test_only_complete_checkpoints_are_taken(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    latest.directory(tmp_path, 30).mkdir()  # being written
    assert list(following.complete(tmp_path)) == [10, 20]
    before = following.complete(tmp_path)
    save(tmp_path, 20, "others")
    assert following.complete(tmp_path)[10] == before[10]
    assert following.complete(tmp_path)[20] != before[20]
    assert following.complete(tmp_path / "release") == {}


def test_what_is_held_stays_whole_while_the_run_prunes(tmp_path: Path) -> None:
    """Pruned at random moments: either all of a checkpoint is held, and stays, or it has gone."""
    outcomes = set()
    for trial in range(20):
        run = tmp_path / f"{trial}"
        save(run, 10, files=20)
        save(run, 20)
        pruning = threading.Thread(target=latest.prune, args=(run, 1, None))
        pruning.start()
        time.sleep(trial / 20 * 0.004)
        try:
            with following.held(run, 10, tmp_path) as held:
                pruning.join()
                assert latest.damage(held) is None
                assert len(list(held.iterdir())) == 22
                outcomes.add("held")
        except following.GoneError:
            outcomes.add("gone")
        pruning.join()
        assert latest.iterations(run) == [20]
    assert "gone" in outcomes
    assert not list(tmp_path.glob(".held-*"))
    assert not list(tmp_path.glob("*/.pruned-*"))


def test_on_another_disk_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(18, "Invalid cross-device link")

    save(tmp_path / "run", 10)
    monkeypatch.setattr("os.link", refuse)
    with following.held(tmp_path / "run", 10, tmp_path) as held:
        assert latest.damage(held) is None


class Taker:
    """Records what it is given; some of it fails."""

    def __init__(self, run: Path) -> None:
        self.run, self.done, self.tries = run, {}, []
        self.failing: dict[int, Exception] = {}

    def __call__(self, step: int, digest: str) -> None:
        self.tries.append(step)
        if step in self.failing:
            raise self.failing[step]
        self.done[step] = digest

    def follow(self, **changes) -> str:
        options = {"every": 1, "once": True, "patience_s": 0.0} | changes
        return following.follow(self.run, self.done, self, **options)


def test_each_checkpoint_once_and_in_order(tmp_path: Path) -> None:
    taker = Taker(tmp_path)
    assert "no more" in taker.follow()
    for step in (10, 20, 30):
        save(tmp_path, step)
    assert "no more" in taker.follow(every=20)
    assert taker.tries == [20]
    taker.follow()
    save(tmp_path, 20, "rewritten")
    latest.set_pointer(tmp_path, 30)
    taker.follow()
    assert taker.tries == [20, 10, 30, 20]


def test_it_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "LOOK_S", 0.02)
    taker = Taker(tmp_path)
    assert "no sign of life" in taker.follow(once=False)
    heart = run_files.Heartbeat(str(tmp_path))
    heart.beat(5)

    def train() -> None:
        time.sleep(0.1)
        save(tmp_path, 10)
        with heart.alive():
            pass

    training = threading.Thread(target=train)
    training.start()
    assert taker.follow(once=False, patience_s=60.0) == "the run is finished"
    training.join()
    assert taker.tries == [10]
    with pytest.raises(KeyboardInterrupt), heart.alive():
        raise KeyboardInterrupt
    assert "no sign of life" in taker.follow(once=False)  # stopped, and not restarted


def test_what_has_gone_is_left_out_and_what_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    taker = Taker(tmp_path)
    taker.failing[10] = following.GoneError("went away")
    taker.follow()
    assert (taker.tries, list(taker.done)) == ([10, 20], [20])
    assert "note: iteration 10 is left out: went away" in capsys.readouterr().out
    save(tmp_path, 30)
    taker.failing = {30: UsageError("its architecture cannot be exported")}
    with pytest.raises(UsageError, match="architecture"):
        taker.follow()


def test_bits_per_byte_of_an_exported_model(huggingface_folder: Path, tmp_path: Path) -> None:
    """Against the text's bytes and the model's own loss; a batch more or less makes no difference."""
    save_random_model(MODELS["llama-gqa"], huggingface_folder, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    texts = ["one sentence \u00fcber another, a long one", "and a third, of quite other tokens than the first"]
    ids = np.array([tokenizer(text)["input_ids"][:16] for text in texts])
    with torch.no_grad():
        loss = model(torch.tensor(ids), labels=torch.tensor(ids)).loss.item()
    size = sum(len(tokenizer.decode(row[1:]).encode()) for row in ids)
    expected = loss * 2 * 15 / np.log(2) / size
    for batch in (1, 8):
        assert bits.measure(model, tokenizer, ids, batch) == pytest.approx(expected, rel=1e-5)
    assert bits.measure(model, tokenizer, ids[:0]) is None


@pytest.mark.parametrize(("split", "documents"), [("90,10,0", (0.9, 1.0)), (None, (0.0, 1.0)), ("100,0,0", None)])
def test_the_samples_are_of_the_validation_documents(
    corpus: Corpus, split: str | None, documents: tuple | None
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    named = {"data_path": [corpus.prefix]} if split else {"valid_data_path": [corpus.prefix]}
    empty = dict.fromkeys(
        [
            "data_path",
            "train_data_path",
            "valid_data_path",
            "test_data_path",
            "data_args_path",
            "per_split_data_args_path",
        ]
    )
    args = Namespace(**empty | named, split=split, seq_length=64, mock_data=False, meap_sft=False)
    found = bits.validation_samples(args, 7)
    if documents is None:
        assert found is None
        return
    dataset = IndexedDataset(corpus.prefix)
    first, last = (round(share * len(dataset)) for share in documents)
    stream = np.concatenate([dataset[number] for number in range(first, last)])
    assert found.shape == (7, 65)
    assert all(row.astype(stream.dtype).tobytes() in stream.tobytes() for row in found)
    assert len({tuple(row) for row in found}) == 7
    args.valid_data_path, args.data_path, args.split = ["nowhere"], None, None
    with pytest.raises(UsageError, match="nowhere"):
        bits.validation_samples(args, 7)


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What a W&B in the place of the real one was given."""
    given: list[tuple] = []
    run = SimpleNamespace(log=lambda values, step: given.append((step, values)))

    def init(**settings: object) -> SimpleNamespace:
        given.append((settings["project"], settings["id"], settings["resume"]))
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=ValueError))
    return given


def test_table_picture_and_curves_grow(
    huggingface_folder: Path, tmp_path: Path, logged: list[tuple], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The tool, but for the export itself, on a random model; called twice."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, model = tmp_path / "run", tmp_path / "model"
    config = copy.deepcopy(MODELS["llama-gqa"])
    config.max_position_embeddings = 256
    save_random_model(config, huggingface_folder, model)
    samples = np.arange(34).reshape(2, 17) + 300

    class Exporter:
        def __call__(self, checkpoint: Path, directory: Path, tokenizer: str | None, count: int) -> np.ndarray:
            assert latest.damage(checkpoint) is None
            shutil.copytree(model, directory)
            return samples

        def close(self) -> None: ...

    def args_of(checkpoint: Path) -> SimpleNamespace:
        step = int(checkpoint.name.removeprefix("iter_"))
        return SimpleNamespace(args=Namespace(
            consumed_train_samples=8 * step, seq_length=64, tensorboard_dir=str(tmp_path / "board"),
            wandb_project="p", wandb_exp_name="e",
        ))  # fmt: skip

    monkeypatch.setattr(following, "Exporter", Exporter)
    monkeypatch.setattr(reader, "open_checkpoint", args_of)
    command = [
        "follow_run.py", str(run), "--tasks", "meap_kv_logprob", "--kv-digits", "2", "--kv-pairs", "4",
        "--no-kv-instruction", "--samples", "2", "--kv-positions", "2", "--once", "--name", "demo",
    ]  # fmt: skip

    def call(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", [*command, *more])
        follow_run.main()
        return capsys.readouterr().out

    with pytest.raises(UsageError, match="no such directory"):
        call()
    save(run, 10)
    (run / "wandb_run_id").write_text("abc")
    assert "iteration 10: meap_kv_logprob acc" in call()
    save(run, 20)
    assert "iteration 10" not in call()
    assert "no more checkpoints there (--once); 2 checkpoints" in call()
    output = run / "evaluation"
    with open(output / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["step"], row["tokens"], row["task"], row["metric"]): float(row["value"]) for row in rows}
    expected = bits.measure(AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model), samples)
    for step, tokens in (("10", "5120"), ("20", "10240")):
        assert found[step, tokens, "validation", "bits per byte"] == pytest.approx(expected, rel=1e-4)
        assert 0 <= found[step, tokens, "meap_kv_logprob", "acc"] <= 1
    assert (output / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in output.iterdir()) == [".lock", "options.json", "scores.csv", "scores.png"]
    events = event_accumulator.EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [event.step for event in events.Scalars("evaluation/validation/bits per byte")] == [10, 20]
    begun = [each for each in logged if each[0] == "p"]
    assert begun == [("p", "abc-evaluation", "allow")] * 2
    assert [each[0] for each in logged if each[0] != "p"] == [10, 20]
    with pytest.raises(UsageError, match="holds scores of other options: seed None there, 1 here"):
        call("--seed", "1")
    (output / "scores.csv").write_text("step,value\n10,1\n")
    with pytest.raises(UsageError, match="not a table of scores"):
        call()


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    value = scores.Estimate(0.5, 0.25, 0.75, 4)
    some = [scores.Score(step, 64 * step, "a, b", "acc", value, step == 1, "") for step in (1, 2)]
    scores.write(some[::-1], tmp_path / "scores.csv")
    assert scores.read(tmp_path / "scores.csv") == some


@pytest.mark.slow
def test_a_run_is_followed_while_it_trains_and_prunes(corpus: Corpus, tmp_path: Path) -> None:
    """The tool started before the training, which keeps only its last checkpoint."""
    run = tmp_path / "run"
    flags = [
        *MODEL, *TRAINING, *corpus.data_flags, "--data-cache-path", str(tmp_path / "cache"), "--seq-length", "256",
        "--max-position-embeddings", "256", "--train-iters", "400", "--save", str(run), "--save-interval", "50",
        "--meap-keep-last", "1",
    ]  # fmt: skip
    command = [
        str(REPOSITORY / "tools" / "follow_run.py"), str(run), "--tasks", "meap_kv_logprob", "--kv-digits", "2",
        "--kv-pairs", "4", "--no-kv-instruction", "--samples", "2", "--output", str(tmp_path / "scores"),
    ]  # fmt: skip
    with open(tmp_path / "log", "w") as log:
        training = warm.start([str(ENTRY), *flags], environment(), REPOSITORY, [log, log])
        done = warm.run(command, environment(), timeout=500)
        training.join()
    assert done.returncode == 0, done.stderr
    assert "the run is finished" in done.stdout
    assert "Exception ignored" not in done.stderr
    found = scores.read(tmp_path / "scores" / "scores.csv")
    losses = {one.step: one.value.mean for one in found if one.metric == "bits per byte"}
    assert max(losses) == 400
    assert set(losses) <= set(range(50, 401, 50))
    assert len(losses) < 2 or losses[400] < min(losses.values()) + 0.05
