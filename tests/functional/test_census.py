"""No line of this package waits for the GPU within a micro batch, on any rank of any layout."""

import json

import pytest

from tests import warm
from tests.launch import REPOSITORY, environment

COMMON = (
    "--num-layers 8 --hidden-size 256 --num-attention-heads 8 --ffn-hidden-size 512 --group-query-attention "
    "--num-query-groups 8 --seq-length 256 --max-position-embeddings 256 --position-embedding-type rope "
    "--normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights "
    "--attention-dropout 0 --hidden-dropout 0 --tokenizer-type NullTokenizer --vocab-size 32000 --train-iters 5 "
    "--lr 1e-4 --eval-iters 0 --num-workers 0 --bf16 --use-distributed-optimizer --micro-batch-size 2 "
    "--global-batch-size 64"
)
TP = "--tensor-model-parallel-size 2 --sequence-parallel"
PP = "--pipeline-model-parallel-size 2"
VPP = f"{PP} --num-layers-per-virtual-pipeline-stage 2"
CP = "--context-parallel-size 2"
SFT = "--meap-sft --train-data-path unread.jsonl"
RUNS: dict[str, tuple[int, int, str]] = {
    # name: ranks, pipeline stage, flags
    "one": (1, 0, ""),
    "replaced": (1, 0, "--meap-objective replace"),
    "copies": (1, 0, "--meap-objective mir"),
    "documents": (1, 0, "--dataloader-inter-document-masking"),
    "fine-tuning": (1, 0, SFT),
    "fine-tuning, rows alone": (
        2,
        1,
        f"{SFT} --meap-sft-no-packing --meap-sft-combined-loss {PP} --micro-batch-size 1",
    ),
    "fine-tuning, tp": (2, 0, f"{SFT} {TP}"),
    "tp": (2, 0, TP),
    "pp first": (2, 0, PP),
    "pp last": (2, 1, PP),
    "interleaved first": (2, 0, VPP),
    "interleaved last": (2, 1, VPP),
    "cp": (2, 0, CP),
    "all first": (16, 0, f"{TP} {VPP} {CP}"),
    "all last": (16, 1, f"{TP} {VPP} {CP}"),
}


def flags_of(extra: str) -> list[str]:
    """Flags of a run, of conversations where it fine-tunes."""
    return f"{COMMON} {extra} {'' if SFT in extra else '--mock-data'}".split()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    runs = {name: (*where, False, flags_of(flags)) for name, (*where, flags) in RUNS.items()}
    runs["waits"] = (1, 0, True, flags_of(""))
    listing = tmp_path_factory.mktemp("census") / "runs.json"
    listing.write_text(json.dumps(runs))
    variables = environment() | {"MEAP_DEVICE": "auto", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    done = warm.run([REPOSITORY / "tests" / "census_many.py", listing], variables)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.split("found: ")[-1])


def ours(sites: dict[str, int]) -> list[str]:
    """Lines of this package."""
    return [site for site in sites if "megatron_meap/" in site.partition(":")[0]]


@pytest.mark.parametrize("name", RUNS)
def test_nothing_of_ours_waits(found: dict[str, dict], name: str) -> None:
    assert found[name]["operations"] > 100
    assert ours(found[name]["sites"]) == []


def test_what_waits_is_found(found: dict[str, dict]) -> None:
    """Where a number of the loss is asked for within the step, that line is named."""
    assert any("bad_steps.refuse(loss)" in site for site in ours(found["waits"]["sites"]))
