"""Small files that are written and read back: however they were damaged, one line names the file."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_meap.checkpoint import integrity, latest
from megatron_meap.errors import UsageError, refuse, refusing
from megatron_meap.evaluation.tasks.judge import Judge
from megatron_meap.flags import with_files
from megatron_meap.preprocessing import manifest as manifests
from megatron_meap.preprocessing.journal import Journal
from megatron_meap.preprocessing.merge import merge_datasets
from megatron_meap.preprocessing.outputs import state_shape
from megatron_meap.preprocessing.statistics import inspect
from megatron_meap.records import misfit, parsed, read_json
from megatron_meap.sft.store import _opened
from megatron_meap.study import runs
from megatron_meap.study.grid import POINT
from tests.unit.preprocessing import TEXTS, make_tokenizer, run_job, sentencepiece_args, write_jsonl

DAMAGED = (b"", b"{", b"[]", b"null", b"3", b'"text"', b"\xff\xfe{}", b"[" * 100_000, b"not JSON")


def wrong_values(value: Any, shape: Any) -> Iterator[Any]:
    """Copies of a value that has this shape, each without something that it must have, or with another kind of it."""
    for other in (None, True, "x", 1, -1.5, [1], {"a": 1}):
        if type(other) is not type(value) and not (isinstance(shape, type | type(int | None)) and fits(other, shape)):
            yield other
    if isinstance(value, dict) and isinstance(shape, dict):
        for key in value:
            if key in shape:
                yield {name: each for name, each in value.items() if name != key}
            part = shape.get(str, shape.get(key, shape.get(f"{key}?")))
            if part is not None:
                yield from (value | {key: wrong} for wrong in wrong_values(value[key], part))
    elif isinstance(value, list) and isinstance(shape, list | tuple):
        for i, part in enumerate(shape * len(value) if isinstance(shape, list) else shape):
            yield from ([*value[:i], wrong, *value[i + 1 :]] for wrong in wrong_values(value[i], part))
        if isinstance(shape, tuple):
            yield value[1:]


def fits(value: Any, kind: Any) -> bool:
    """As in type checkers, except that true is not a number."""
    return isinstance(value, kind) and (
        not isinstance(value, bool) or kind is bool or bool in getattr(kind, "__args__", ())
    )


def spoilt(content: bytes, shape: Any) -> Iterator[bytes]:
    """Ways in which a JSON file may be damaged."""
    yield from DAMAGED
    yield content[: len(content) // 2]
    yield from (json.dumps(wrong).encode() for wrong in wrong_values(json.loads(content), shape))


def refuses_all(path: Path, shape: Any, read: Callable[[], object], named: str = "") -> int:
    """Every damaged version of a file is refused in one line that names it, and the intact file is accepted."""
    good, number = path.read_bytes(), 0
    read()
    for bad in spoilt(good, shape):
        number += 1
        path.write_bytes(bad)
        with pytest.raises(UsageError) as refused:
            read()
        assert (named or str(path)) in str(refused.value), bad
        assert "\n" not in str(refused.value)
    path.write_bytes(good)
    read()
    return number


def test_a_shape_is_all_that_must_be_there() -> None:
    shape = {"a": int, "b?": [(str, int | None)], "c": {str: bool}, "d": int | float}
    good = {"a": 1, "b": [["x", None], ["y", 2]], "c": {"k": True}, "d": 2, "more": object()}
    assert misfit(good, shape) is None
    assert misfit({"a": 1, "c": {}, "d": 0.5}, shape) is None
    wrong = list(wrong_values({key: good[key] for key in "abcd"}, shape))
    assert len(wrong) > 50
    assert [each for each in wrong if misfit(copy.deepcopy(each), shape) is None] == []
    assert misfit({"a": True, "c": {}, "d": 1}, shape) == "a is bool, not int"
    assert misfit(good | {"b": [["x", 1], ["y", "2"]]}, shape) == "b[1][1] is str, not int | null"
    with pytest.raises(ValueError, match="nested too deeply"):
        parsed(b"[" * 100_000, list)


def test_manifests(tmp_path: Path) -> None:
    args = sentencepiece_args(make_tokenizer(tmp_path))
    run_job([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "a", args, workers=1)
    run_job([write_jsonl(tmp_path / "b.jsonl", TEXTS[:2])], tmp_path / "b", args, workers=1)
    one, other = (str(tmp_path / f"{name}_text_document") for name in "ab")
    path = Path(one + ".manifest.json")
    sha256 = json.loads(path.read_text())["tokenizer"]["sha256"]
    special = {"bos": 1, "eod": 2}
    readers: list[Callable[[], object]] = [
        lambda: inspect(one),
        lambda: merge_datasets([other, one], str(tmp_path / "all"), overwrite=True),
        lambda: manifests.check_manifest(one, tokenizer_sha256=sha256, vocab_size=600, special=special),
    ]
    for read in readers:
        assert refuses_all(path, manifests.SHAPE, read) > 100


def test_journals(tmp_path: Path) -> None:
    settings, shape = {"dtype": "uint16"}, state_shape(("text",))
    state = {
        "written": {"text": {"documents": 1, "tokens": 5, "bin_sha256": "0"}},
        "totals": {"text": {"empty": 0, "text_bytes": 3, "largest": 4}},
        "skipped": 0, "separated": False, "report_bytes": 0,
    }  # fmt: skip
    files = [["a.jsonl", 10, 20]]

    def opened(resume: bool = True) -> Journal:
        return Journal(str(tmp_path / "x"), settings, files, resume=resume, state_shape=shape)

    journal = opened(resume=False)
    journal.record(1, state)
    journal.close(remove=False)
    path = tmp_path / "x.journal.partial"
    first, record = path.read_bytes().splitlines()
    journal = opened()
    assert (journal.finished, journal.state) == (1, state)
    journal.close(remove=False)
    for line in spoilt(record, {"files": [(str, int, int)], "state": shape}):
        path.write_bytes(first + b"\n" + line + b"\n")
        with pytest.raises(UsageError, match="start without --resume"):
            opened()
    for line in DAMAGED:
        path.write_bytes(line + b"\n" + record + b"\n")
        with pytest.raises(UsageError, match="start without --resume"):
            opened()


def test_hashes_of_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"weights")
    hashes = integrity.hash_files([tmp_path / "weights"])
    good = json.dumps({"files": {"weights": hashes[str(tmp_path / "weights")]}}).encode()
    (tmp_path / integrity.FILE).write_bytes(good)
    assert integrity.damage(tmp_path) is None
    for bad in spoilt(good, {"files": {str: str}}):
        (tmp_path / integrity.FILE).write_bytes(bad)
        wrong = integrity.damage(tmp_path)
        assert wrong is None if bad == b'{"files": {}}' else wrong and ("is torn" in wrong or "weights" in wrong), bad


@pytest.mark.parametrize("torn", [b"", b"\xff\xfe", b"7 8", b"seven", "²".encode(), b"9" * 5000])
def test_pointers_to_checkpoints(torn: bytes, tmp_path: Path) -> None:
    (tmp_path / latest.POINTER).write_bytes(torn)
    assert latest.pointer(tmp_path) is None


def test_verdicts_that_cannot_be_read_are_none(tmp_path: Path) -> None:
    log = tmp_path / "verdicts.jsonl"
    good = json.dumps({"sha256": "a", "faithful": True, "summary": "s"}).encode()
    bad = list(spoilt(good, {"sha256": str, "faithful": bool | None}))
    log.write_bytes(b"\n".join([*bad, good]) + b"\n")
    assert Judge("http://localhost:1/v1", "any", log=str(log))._known() == {"a": True}


def test_tokenized_conversations(tmp_path: Path) -> None:
    np.arange(5, dtype=np.int32).tofile(tmp_path / "ids.bin")
    np.save(tmp_path / "turns.npy", np.array([[0, 2, 3, 0]]))
    facts = {"conversations": 1, "skipped": 0, "turns": 1, "tokens": 5}
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    read = lambda: _opened(tmp_path)  # noqa: E731
    refuses_all(tmp_path / "facts.json", dict.fromkeys(facts, int), read, str(tmp_path))
    for name in ("ids.bin", "turns.npy"):
        whole = (tmp_path / name).read_bytes()
        for damaged in (b"", whole[:-4], whole[:7], whole + b"1234", b"x" * len(whole)):
            if (name == "turns.npy" and damaged == whole + b"1234") or (name == "ids.bin" and damaged[:1] == b"x"):
                continue  # read as it was; another content of the same size, which only a hash would tell
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(UsageError, match=r"damaged.*and it is made again"):
                read()
        (tmp_path / name).write_bytes(whole)


def test_results_of_a_study(tmp_path: Path) -> None:
    point = {axis: {str: "x", int: 3}.get(kind, 0.5) for axis, kind in POINT.items()}
    facts = {"steps": 1, "validation": {"1": 2.5}, "cpu_seconds": 1, "machine": "m", "command": "c", "environment": {}}
    path = tmp_path / "a" / runs.RESULT
    path.parent.mkdir()
    path.write_text(json.dumps(point | facts))
    refuses_all(path, runs._SHAPE, lambda: runs.finished(tmp_path))
    for bad in spoilt(path.read_bytes(), runs._SHAPE):
        if bad:
            (tmp_path / "results.jsonl").write_bytes(bad)
            with pytest.raises(UsageError, match=r"results\.jsonl: holds a line that is not the result of a run"):
                runs.read_results(tmp_path / "results.jsonl")


@pytest.mark.parametrize("content", [b"--load 'it", b"\xff\xfe", b"--load a\\"])
def test_files_of_flags(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "flags.txt").write_bytes(content)
    with pytest.raises(UsageError, match=r"@.*flags\.txt: cannot be read as flags "):
        with_files([f"@{tmp_path / 'flags.txt'}"])


def test_comments_in_a_file_of_flags(tmp_path: Path) -> None:
    (tmp_path / "flags.txt").write_text("# the schedule\n--lr 1e-3\n  # the run\n--save 'two words'/a#b\n")
    assert with_files(["run", f"@{tmp_path}/flags.txt"]) == ["run", "--lr", "1e-3", "--save", "two words/a#b"]
    with pytest.raises(UsageError, match=r"@nowhere\.txt: cannot be read as flags"):
        with_files(["@nowhere.txt"])


def test_a_file_that_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{tmp_path}: cannot be read: Is a directory; make it"):
        read_json(tmp_path, dict, "make it")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nothing", dict, "make it")


def test_errors_become_refusals() -> None:
    said = pytest.raises(UsageError, match=r"^nowhere: cannot be read \(No such file or directory\); name another$")
    with said, refusing("nowhere: cannot be read", OSError, remedy="name another"):
        Path("nowhere").read_text()
    with pytest.raises(UsageError, match="said already"), refusing("not this"):
        raise UsageError("said already")
    with pytest.raises(KeyError), refusing("not this", OSError):
        raise KeyError("a bug of ours")
    with pytest.raises(UsageError, match="second"):
        refuse((False, "first"), (True, "second"), (True, "third"))
    refuse((0, "first"), (None, "second"))
