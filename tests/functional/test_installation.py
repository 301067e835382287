"""The wheel by itself: built, installed without a checkout, and used from text to a trained model."""

import os
import pydoc_data.topics
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.launch import MODEL, REPOSITORY, TRAINING


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of an environment that holds the wheel; its dependencies are those of the tests' environment."""
    folder = tmp_path_factory.mktemp("installation")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    checkout = folder / "checkout"  # setuptools writes beside the sources
    shutil.copytree(REPOSITORY, checkout, ignore=shutil.ignore_patterns(".*", "runs", "build", "*.egg-info"))
    subprocess.run([*build, "--wheel-dir", folder, checkout], check=True)
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    site = next((environment / "lib").glob("python*")) / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # its own .pth files are not read
    (wheel,) = folder.glob("*.whl")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    subprocess.run([*install, wheel], check=True)
    return environment / "bin"


def test_from_text_to_a_trained_model(installed: Path, tmp_path: Path):
    def call(*command: str | Path) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
            "MEAP_DEVICE": "cpu"
        }
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = call(installed / "python", "-c", "import megatron_meap; print(megatron_meap.__file__)")
    assert where.startswith(str(installed.parent))
    text = tmp_path / "text.txt"
    text.write_text("\n".join(pydoc_data.topics.topics.values()))
    call(installed / "megatron-meap", "train-tokenizer", "--input", text, "--output", "t.model", "--vocab-size", "512")
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "t.model"]
    call(
        installed / "megatron-meap",
        "preprocess-data",
        "--input",
        text,
        "--output-prefix",
        "data",
        "--append-eod",
        *tokenizer,
    )
    assert "meap_needle" in call(
        installed / "python", "-c", "from megatron_meap.evaluation.suites import TASKS; print(*TASKS.glob('*.yaml'))"
    )
    launch = [
        installed / "python",
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "1",
        "-m",
        "megatron_meap.pretrain",
    ]
    data = ["--data-path", "data_text_document", "--split", "100,0,0", *tokenizer]
    assert "lm loss masked inputs" in call(*launch, *MODEL, *TRAINING, *data, "--train-iters", "1")
