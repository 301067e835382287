"""Real launches on GPUs: Transformer Engine in bf16 and fp8, SDPA, agreement with the CPU, context parallelism.

python -m pytest tests/gpu
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Corpus
from tests.launch import ENTRY, MODEL, REPOSITORY, TRAINING, Run, environment, errors, parse, torchrun

# conftest has put the CPU in the GPU's place for this process, and hidden Transformer Engine: ask another one.
_ASK = """
import importlib.util, torch
count = torch.cuda.device_count()
fp8 = count > 0 and torch.cuda.get_device_capability() >= (8, 9)
print(count, importlib.util.find_spec("transformer_engine") is not None, fp8)
"""
_FOUND = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True).stdout.split() or ["0", "", ""]
GPUS, HAS_TE, FP8 = int(_FOUND[0]), _FOUND[1] == "True", _FOUND[2] == "True"

needs_te = pytest.mark.skipif(not HAS_TE, reason="Transformer Engine is not installed")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="no CUDA device")]

# Head dimension 64 and multiples of 16: what the fused kernels and fp8 ask for.
SHAPE = ["--hidden-size", "256", "--ffn-hidden-size", "512", "--seq-length", "256", "--max-position-embeddings", "256"]
LOCAL = ["--transformer-impl", "local", "--no-gradient-accumulation-fusion", "--no-persist-layer-norm"]
LOCAL += ["--no-masked-softmax-fusion", "--no-rope-fusion", "--no-bias-dropout-fusion", "--no-bias-swiglu-fusion"]
BF16 = ["--bf16"]
# At TRAINING's learning rate the loss jumps after ten steps, and rounding alone moves it by 0.3 (bf16 on a CPU, too).
CALM = ["--lr", "1e-4", "--min-lr", "1e-5"]


def without_fp32(flags: list[str]) -> list[str]:
    return [flag for flag in flags if flag != "--fp32"]


def on_gpus(processes: int, flags: list[str]) -> Run:
    command = torchrun(processes, str(ENTRY), *flags)
    environ = environment() | {"MEAP_DEVICE": "cuda", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    done = subprocess.run(
        command, env=environ, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600
    )
    assert done.returncode == 0, errors(done.stdout)
    return parse(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def common(corpus: Corpus, folder: Path) -> list[str]:
    return [*MODEL, *TRAINING, *SHAPE, *CALM, *corpus.data_flags, "--data-cache-path", str(folder / "cache")]


@pytest.fixture(scope="module")
def cpu(common: list[str], folder: Path) -> Run:
    """20 steps in fp32 on the CPU, and the weights that all runs start from."""
    initial = str(folder / "initial")
    for flags in (["--train-iters", "1", "--save", initial, "--save-interval", "1"], ["--load", initial, "--finetune"]):
        done = subprocess.run(
            torchrun(1, str(ENTRY), *common, *flags), env=environment(), cwd=REPOSITORY, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, errors(done.stdout)
    return parse(done.stdout)


@pytest.fixture(scope="module")
def start(cpu: Run, folder: Path) -> list[str]:
    return ["--load", str(folder / "initial"), "--finetune"]


def test_fp32_follows_the_cpu(common: list[str], start: list[str], cpu: Run) -> None:
    """The same checkpoint, data and masks: TF32 is off unless asked for, so that only the order of sums differs."""
    gpu = on_gpus(1, [*common, *start, *LOCAL])
    assert gpu.losses() == pytest.approx(cpu.losses(), abs=1e-3)
    assert gpu.losses("lm loss masked inputs") == pytest.approx(cpu.losses("lm loss masked inputs"), abs=1e-2)


def test_sdpa_in_bf16_follows_fp32(common: list[str], start: list[str], cpu: Run) -> None:
    gpu = on_gpus(1, [*without_fp32(common), *BF16, *start, *LOCAL])
    assert gpu.losses() == pytest.approx(cpu.losses(), abs=0.01)


@needs_te
def test_transformer_engine_in_bf16_follows_fp32(common: list[str], start: list[str], cpu: Run) -> None:
    """It loads a checkpoint that the local layers saved on the CPU, too."""
    gpu = on_gpus(1, [*without_fp32(common), *BF16, *start, "--transformer-impl", "transformer_engine"])
    assert gpu.losses() == pytest.approx(cpu.losses(), abs=0.01)


@needs_te
@pytest.mark.skipif(not FP8, reason="the GPU has no fp8 (compute capability 8.9)")
def test_fp8_follows_fp32(common: list[str], start: list[str], cpu: Run) -> None:
    fp8 = ["--fp8-format", "hybrid", "--transformer-impl", "transformer_engine"]
    gpu = on_gpus(1, [*without_fp32(common), *BF16, *start, *fp8])
    assert all(math.isfinite(loss) for loss in gpu.losses())
    assert gpu.losses() == pytest.approx(cpu.losses(), abs=0.05)


@needs_te
@pytest.mark.skipif(GPUS < 2, reason="context parallelism needs two GPUs")
def test_context_parallel_follows_one_gpu(common: list[str], start: list[str], cpu: Run) -> None:
    layout = ["--transformer-impl", "transformer_engine", "--context-parallel-size", "2"]
    gpus = on_gpus(2, [*without_fp32(common), *BF16, *start, *layout])
    assert gpus.losses() == pytest.approx(cpu.losses(), abs=0.01)
    assert gpus.losses("lm loss masked inputs") == pytest.approx(cpu.losses("lm loss masked inputs"), abs=0.1)


@pytest.mark.parametrize("implementation", ["local", pytest.param("transformer_engine", marks=needs_te)])
def test_planned_memory_is_as_measured(implementation: str, folder: Path) -> None:
    """PyTorch's peak of allocated memory over a few steps of a 0.1B-parameter model, within 15% of the plan.

    The plan has no workspaces of kernels in it, and rounds nothing up.
    """
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    from gpu import SIZES

    layers, hidden, heads, ffn, _, length = SIZES["0.1b"]
    flags = (
        f"--num-layers {layers} --hidden-size {hidden} --num-attention-heads {heads} --ffn-hidden-size {ffn} "
        f"--group-query-attention --num-query-groups 2 --seq-length {length} --max-position-embeddings {length} "
        "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear --bf16 "
        "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --tokenizer-type NullTokenizer "
        "--vocab-size 32000 --micro-batch-size 4 --global-batch-size 4 --train-iters 5 --lr 1e-4 --eval-iters 0 "
        f"--mock-data --num-workers 0 --log-interval 1 --meap-mask-ratio 0.15 --transformer-impl {implementation}"
    ).split()
    peak = folder / f"peak-{implementation}"
    code = (
        "import sys, atexit, torch; sys.argv[0] = 'pretrain_gpt_meap.py'; out = sys.argv.pop(1)\n"
        "atexit.register(lambda: open(out, 'w').write(str(torch.cuda.max_memory_allocated())))\n"
        "from megatron_meap.backend import device; device.prepare()\n"
        "from megatron_meap.trainer import run; run.run()"
    )
    environ = environment() | {"MEAP_DEVICE": "cuda", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    ran = subprocess.run([sys.executable, "-c", code, str(peak), *flags], env=environ, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    listing = folder / f"plan-{implementation}.json"
    listing.write_text(json.dumps({"run": [1, flags]}))
    planned = subprocess.run(
        [sys.executable, str(REPOSITORY / "tests" / "plan_many.py"), str(listing)],
        env=environ | {"MEAP_DEVICE": "auto"}, capture_output=True, text=True,
    )  # fmt: skip
    assert planned.returncode == 0, planned.stderr[-3000:]
    total = json.loads(planned.stdout.split("plans: ")[-1])["run"]["totals"][0]
    assert total == pytest.approx(int(peak.read_text()), rel=0.15)
