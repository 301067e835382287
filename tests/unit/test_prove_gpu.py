"""The proof on a GPU, as far as it can be tested without one: its steps' flags, its limits, its report."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_meap.trainer import arguments
from tests.launch import REPOSITORY


@pytest.fixture(scope="module")
def prove() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prove_gpu", REPOSITORY / "benchmarks" / "prove_gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["prove_gpu"] = module  # its dataclass asks for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_trainings_take_their_flags(prove: ModuleType, device: str, tmp_path: Path, monkeypatch) -> None:
    commands = [step.command for step in prove.steps(device, tmp_path)]
    trainings = [
        words[words.index("pretrain_gpt_meap.py") + 1 :] for words in commands if "pretrain_gpt_meap.py" in words
    ]
    assert len(trainings) >= 4
    for flags in trainings:
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt_meap.py", *flags])
        arguments.parse_flags()


def test_what_is_cut_short_still_tells(prove: ModuleType, tmp_path: Path) -> None:
    say = "import time; print('so far', flush=True); time.sleep(60)"
    results = [
        prove.Step("fails", [sys.executable, "-c", "print('why'); exit(3)"], 30),
        prove.Step("hangs", [sys.executable, "-c", say], 1),
        prove.Step("later", ["true"], 30),
    ]
    for step in results[:2]:
        prove.run(step, {})
    prove.write(tmp_path, results, "cuda")
    told = {step["name"]: step for step in json.loads((tmp_path / "report.json").read_text())["steps"]}
    assert (told["fails"]["status"], told["fails"]["output"]) == ("status 3", "why")
    assert (told["hangs"]["status"], told["hangs"]["output"]) == ("cut off after 1 s", "so far")
    assert told["later"]["status"] == "not run"
    assert "| hangs | cut off after 1 s |" in (tmp_path / "report.md").read_text()


def test_without_a_gpu_nothing_is_run(prove: ModuleType, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(prove.subprocess, "run", lambda *_, **__: prove.subprocess.CompletedProcess([], 1))
    monkeypatch.setattr(sys, "argv", ["prove_gpu.py", "--report", str(tmp_path / "report")])
    monkeypatch.delenv("MEAP_DEVICE", raising=False)
    with pytest.raises(SystemExit, match="sees no GPU here, so nothing was run"):
        prove.main()
    assert not (tmp_path / "report").exists()
