"""What cannot work is refused before training starts, with one clear line that names the file or flag, and status 2."""

import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from megatron.training.global_vars import unset_global_variables
from megatron.training.training import destroy_global_state

from megatron_meap.backend import device
from megatron_meap.cluster import meeting
from megatron_meap.errors import JobError, UsageError
from megatron_meap.tokenization.fingerprint import tokenizer_fingerprint
from megatron_meap.trainer import preflight
from megatron_meap.trainer import run as trainer
from tests.conftest import Corpus
from tests.launch import ENTRY, MODEL, TRAINING, environment, free_port, launch_many, torchrun
from tests.sft import prepare
from tests.unit.preprocessing import sentencepiece_args, write_manifest

HOLD_LOCK = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("process 1 on host")
file.flush()
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch):
    """Runs everything up to the start of training in this process and returns the refusal."""

    def run(*flags: str, world_size: int = 1) -> str:
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt_meap.py", *flags])
        for name, value in {"RANK": "0", "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        try:
            with pytest.raises(UsageError) as refusal:
                trainer.prepare()
        finally:
            unset_global_variables()
            destroy_global_state()
        message = str(refusal.value)
        assert "\n" not in message
        return message

    return run


def test_without_validation_data_nothing_is_evaluated(flags: list[str]) -> None:
    place = flags.index("--data-path")
    prefix, rest = flags[place + 1], [*flags[:place], *flags[place + 4 :], "--eval-iters", "5"]
    for data, expected in (
        (["--data-path", prefix, "--split", "100,0,0"], 0),
        (["--data-path", prefix, "--split", "90,10,0"], 5),
        (["--train-data-path", prefix], 0),
        (["--train-data-path", prefix, "--valid-data-path", prefix], 5),
        (["--mock-data"], 5),
    ):
        assert prepare(*rest, *data).eval_iters == expected


@pytest.fixture
def flags(corpus: Corpus, tmp_path: Path) -> list[str]:
    return [*MODEL, *TRAINING, *corpus.data_flags, "--data-cache-path", str(tmp_path / "cache")]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--meap-mask-ratio 1.5", "--meap-mask-ratio 1.5: must be"),
        ("--lr-warmup-iters 20", "--lr-warmup-iters 20: must be less than the 20 iters of the schedule"),
        ("--lr-warmup-fraction 1.0", "--lr-warmup-fraction 1.0: must be at least 0 and below 1"),
        ("--lr-decay-style WSD", "--lr-wsd-decay-iters: missing"),
        ("--min-lr 1", "Megatron refuses these flags: assert --min-lr 1.0 <= --lr 0.001"),
        ("--train-iters 0", "--train-iters: missing"),
        ("--num-experts 2 --moe-router-topk 4", "--moe-router-topk 4: more than the 2 of --num-experts"),
        ("--multi-latent-attention", "(--multi-latent-attention, --group-query-attention)"),
        ("--decoder-last-pipeline-num-layers 1", "(--decoder-first-pipeline-num-layers, --decoder-last-pipeline"),
        ("--mtp-num-layers 1 --dataloader-inter-document-masking", "--mtp-num-layers: its local layers cannot keep"),
        ("--train-data-path somewhere", "--split 90,10,0: contradicts data that is named for each split"),
        ("--data-path s3://bucket/data", "s3://bucket/data: data in an object storage needs --data-cache-path"),
        ("--tensorboard-dir /dev/null/logs", "--tensorboard-dir /dev/null/logs: cannot be written (/dev/null"),
        ("--logits-save-dir /dev/null/log", "--logits-save-dir /dev/null/log: cannot be written"),
        ("--config-logger-dir log", "--config-logger-dir: megatron-core 0.19 fails"),
        ("--dump-param-to-param-group-map /dev/null/map", "--dump-param-to-param-group-map /dev/null/map: cannot be"),
        ("--result-rejected-tracker-filename absent/file", "absent/file: its directory is not there"),
        ("--profile --use-pytorch-profiler", "--use-pytorch-profiler: writes beside --tensorboard-dir"),
        ("--record-memory-history", "--record-memory-history: cannot work on a CPU"),
        ("--async-strategy nvrx", "--async-strategy nvrx: cannot work on a CPU"),
        ("--external-cuda-graph", "--external-cuda-graph: cannot work on a CPU"),
        ("--lazy-mpu-init", "--lazy-mpu-init: this trainer makes"),
        ("--rerun-mode report_stats", "--rerun-mode report_stats: megatron-core 0.19 fails"),
        ("--iterations-to-skip 3 21", "--iterations-to-skip 21: the run has steps 1 to 20"),
        ("--wandb-project p", "--wandb-project: needs a directory for its files"),
        (
            "--eval-iters 1 --eval-global-batch-size 3",
            "--eval-global-batch-size (3) must be divisible by --eval-micro-batch-size (2)",
        ),
        ("--full-validation", "--full-validation: megatron-core 0.19 fails without --multiple-validation-sets"),
        ("--eval-iters 1 --split 999,1,0", "--split 999,1,0: gives validation none of the"),
        ("--split a,b,c", "--split a,b,c: expected up to three shares"),
        ("--data-path 0 nowhere 1 elsewhere", "the weight 0 of nowhere in the blend"),
        ("--meap-mask-ratio -0.1", "--meap-mask-ratio -0.1: must be"),
        ("--meap-mask-strategy span --meap-span-length 0", "--meap-span-length 0"),
        ("--meap-clean-final-share 2", "--meap-clean-final-share 2.0"),
        ("--meap-mask-warmup-samples -1", "--meap-mask-warmup-samples -1"),
        ("--meap-mask-seed -1", "--meap-mask-seed -1"),
        ("--meap-keep-last 2", "--meap-keep-last: there is no --save"),
        ("--meap-keep-last 0", "--meap-keep-last 0"),
        ("--meap-keep-every 5", "--meap-keep-every: needs --meap-keep-last"),
        ("--dataloader-type cyclic", "--dataloader-type cyclic: repeats sample indices"),
        ("--meap-mask-strategy official --decrease-batch-size-if-needed", "needs a constant global batch size"),
        (
            "--dataloader-inter-document-masking --pipeline-model-parallel-size 2",
            "--micro-batch-size 2: Megatron passes packed documents",
        ),
        ("--mirco-batch-size 4", "--mirco-batch-size: no such flag; did you mean --micro-batch-size?"),
        ("--meap-mask-ration=0.2", "--meap-mask-ration: no such flag; did you mean --meap-mask-ratio?"),
        ("--lr ten", "--lr: invalid float value: 'ten'"),
        ("--lr", "--lr: expected one argument"),
        ("--bf16 true", "true: does not belong to any flag"),
        ("--num-query-groups 3", "--num-query-groups 3: does not divide the 4 of --num-attention-heads"),
        ("--save somewhere", "--save-interval: missing; --save needs it"),
        ("--fp32 --bf16", "--fp32: contradicts"),
        ("--context-parallel-size 2", "--context-parallel-size: cannot work on a CPU"),
        ("--fp8-format hybrid", "--fp8-format: cannot work on a CPU"),
        ("--transformer-impl transformer_engine", "--transformer-impl: cannot work on a CPU"),
        ("--tensor-model-parallel-size 2", "world size (1) is not divisible"),
        ("--num-attention-heads 5", "Megatron refuses these flags"),
        ("--load nowhere", "--load nowhere: holds no checkpoint"),
        ("--pretrained-checkpoint nowhere", "--pretrained-checkpoint nowhere: holds no checkpoint"),
        (f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {__file__}", "is named by its folder"),
        ("--data-path nowhere", "nowhere.idx: no such file; a dataset is named by its path"),
        (f"--data-path {__file__}", "test_bad_input.py is not a dataset; tools/preprocess_data.py makes one"),
        ("--tokenizer-model nowhere", "--tokenizer-model nowhere: no such file"),
        ("--data-cache-path /dev/null/cache", "--data-cache-path /dev/null/cache: cannot be written"),
        ("--save /dev/null/save --save-interval 5", "--save /dev/null/save: cannot be written"),
        (
            "--per-dataset-sequences-path nowhere.json",
            "--per-dataset-sequences-path nowhere.json: no such file",
        ),
        ("--sft", "--sft: Megatron's own fine-tuning data"),
        ("--position-embedding-type mrope", "--position-embedding-type mrope: its positions are for images"),
        ("--yaml-cfg conf.yaml", "--yaml-cfg: cannot contain this project's flags"),
    ],
)
def test_flags(refused, flags: list[str], extra: str, message: str) -> None:
    if "-data-path" in extra:
        place = flags.index("--data-path")
        del flags[place : place + 2]
    assert message in refused(*flags, *extra.split())


@pytest.mark.parametrize("prepare_for", [device.prepare, device.prepare_to_look])
def test_a_device_that_there_is_not(prepare_for, monkeypatch) -> None:
    monkeypatch.setenv("MEAP_DEVICE", "gpu")
    with pytest.raises(UsageError, match="MEAP_DEVICE=gpu: expected auto, cpu or cuda"):
        prepare_for()


def test_a_rank_that_never_comes(monkeypatch) -> None:
    args = Namespace(rank=0, world_size=2, distributed_timeout_minutes=0.02)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(UsageError, match="MASTER_PORT: not set, but WORLD_SIZE=2 is"):
        meeting.on_rank_zero(args, lambda _: {})
    monkeypatch.setenv("MASTER_PORT", str(port := free_port()))
    with pytest.raises(JobError, match=f"rank 0 of 2: not all ranks reached localhost:{port} within"):
        meeting.on_rank_zero(args, lambda _: {})


@pytest.mark.parametrize(
    ("name", "value"),
    [("WORLD_SIZE", "0"), ("WORLD_SIZE", "x"), ("RANK", "-1"), ("RANK", "7"), ("LOCAL_RANK", ""), ("MASTER_PORT", "a")],
)
def test_a_job_that_no_launcher_starts(name: str, value: str, monkeypatch) -> None:
    meeting.check_environment()
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"^{name}={value}: must be"):
        meeting.check_environment()


def test_more_ranks_than_the_layout_needs(refused, flags: list[str]) -> None:
    assert "world size (3) is not divisible" in refused(*flags, "--tensor-model-parallel-size", "2", world_size=3)


def test_a_file_that_is_no_tokenizer(refused, flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "poem.model").write_text("not a model")
    message = refused(*flags, "--tokenizer-model", str(tmp_path / "poem.model"))
    assert "poem.model: not a SentencePieceTokenizer" in message


@pytest.fixture
def dataset(corpus: Corpus, tmp_path: Path) -> str:
    """A copy of the dataset to damage."""
    for suffix in (".bin", ".idx"):
        shutil.copy(corpus.prefix + suffix, tmp_path / f"copy{suffix}")
    return str(tmp_path / "copy")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_half_a_dataset(refused, flags: list[str], dataset: str, suffix: str) -> None:
    Path(dataset + suffix).unlink()
    message = refused(*flags, "--data-path", dataset)
    assert f"copy{suffix}: no such file" in message


def test_bin_and_idx_that_do_not_belong_together(refused, flags: list[str], dataset: str) -> None:
    with open(dataset + ".bin", "ab") as file:
        file.write(np.zeros(10, np.uint16).tobytes())
    assert "do not belong together" in refused(*flags, "--data-path", dataset)


def test_an_index_that_is_none(refused, flags: list[str], dataset: str) -> None:
    Path(dataset + ".idx").write_text("something else altogether, and long enough to be read")
    assert "not the index of a Megatron dataset" in refused(*flags, "--data-path", dataset)


def test_a_dataset_shorter_than_one_sequence(refused, flags: list[str]) -> None:
    length = ["--seq-length", "10000000", "--max-position-embeddings", "10000000"]
    assert "less than one sample of 10000000 + 1" in refused(*flags, *length)


def test_a_tokenizer_that_is_not_named(refused, flags: list[str]) -> None:
    place = flags.index("--tokenizer-model")
    del flags[place : place + 2]
    assert refused(*flags).startswith("--tokenizer-model: missing, which --tokenizer-type SentencePieceTokenizer needs")


def test_a_dataset_of_another_tokenizer(refused, flags: list[str], dataset: str, corpus: Corpus) -> None:
    write_manifest(dataset, {"name": "other.model"})
    assert "another tokenizer" in refused(*flags, "--data-path", dataset)
    sha256 = tokenizer_fingerprint(sentencepiece_args(corpus.tokenizer))
    write_manifest(dataset, {"sha256": sha256, "ids": "0" * 64})
    assert "made with a tokenizer that gives different ids" in refused(*flags, "--data-path", dataset)


class TestCheckpoints:
    """Refusals that need a checkpoint."""

    @pytest.fixture(scope="class")
    def saved(self, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("saved")
        flags = [*MODEL, *TRAINING, *corpus.data_flags, "--data-cache-path", str(folder / "cache")]
        flags += ["--train-iters", "3", "--save", str(folder / "run"), "--save-interval", "1"]
        launch_many(1, {"run": flags}, folder)
        return folder / "run"

    @pytest.fixture
    def copy(self, saved: Path, tmp_path: Path) -> Path:
        shutil.copytree(saved, tmp_path / "run")
        return tmp_path / "run"

    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            ("--hidden-size 32", "holds another model: hidden_size 64 there, 32 here"),
            ("--num-layers 1", "holds another model: num_layers 2 there, 1 here"),
            ("--norm-epsilon 1e-6", "computes something else with its weights: layernorm_epsilon 1e-05 there, 1e-06"),
            ("--use-rope-scaling", "use_rope_scaling False there, True here"),
            ("--rotary-percent 0.5", "rotary_percent 1.0 there, 0.5 here"),
            ("--rotary-seq-len-interpolation-factor 2", "rotary_seq_len_interpolation_factor None there, 2 here"),
            ("--meap-mask-ratio 0.2", "--meap-mask-ratio 0.15 there, 0.2 here"),
            ("--meap-mask-strategy span", "--meap-mask-strategy random there, span here"),
            ("--meap-mask-seed 5", "--meap-mask-seed 1234 there, 5 here"),
            ("--meap-mask-token [BLANK]", "--meap-mask-token (its id) 3 there, 512 here"),
        ],
    )
    def test_another_model_or_other_masks(self, refused, flags, saved: Path, extra: str, message: str) -> None:
        assert message in refused(*flags, "--load", str(saved), *extra.split())

    @pytest.mark.parametrize("source", ["--load", "--pretrained-checkpoint"])
    def test_what_the_model_computes(self, refused, flags, saved: Path, source: str, capsys) -> None:
        """Changed where it is meant, with a warning; taken over where the checkpoint's arguments are asked for."""
        changed = [*flags, source, str(saved), "--use-rope-scaling", "--rope-scaling-factor", "4"]
        changed += ["--override-opt_param-scheduler"]  # this run is longer than the saved one
        changed += ["--hidden-dropout", "0.2"]
        assert "use_rope_scaling False there, True here" in refused(*changed)
        assert prepare(*changed, "--meap-allow-changed-settings").use_rope_scaling
        said = capsys.readouterr().out
        assert f"warning: {source}: the model is changed: use_rope_scaling False there" in said
        assert "--hidden-dropout 0.0 there, 0.2 here" in said
        assert not prepare(*changed, "--use-checkpoint-args").use_rope_scaling
        unread = refused(*changed, "--use-checkpoint-args", "--rampup-batch-size", "8", "8", "64")
        assert "--rampup-batch-size: megatron-core 0.19 does not read it" in unread

    def test_another_tokenizer(self, refused, flags, saved: Path, corpus: Corpus, tmp_path: Path) -> None:
        other = tmp_path / "other.model"
        other.write_bytes(Path(corpus.tokenizer).read_bytes() + b"\x1a\x00")  # the same pieces in another file
        message = refused(*flags, "--load", str(saved), "--tokenizer-model", str(other))
        assert "trained with another tokenizer" in message

    def test_the_same_vocabulary_with_other_ids(self, refused, flags, saved: Path, monkeypatch) -> None:
        """As another tokenizer_config.json beside the same tokenizer.json gives them."""
        monkeypatch.setattr(preflight, "ids_fingerprint", lambda tokenizer: "0" * 64)
        assert "trained with a tokenizer that gives different ids" in refused(*flags, "--load", str(saved))

    @pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
    def test_a_damaged_checkpoint(self, refused, flags, copy: Path, damage: str) -> None:
        shard = copy / "iter_0000003" / "__0_0.distcp"
        if damage == "remove":
            shard.unlink()
        else:
            data = bytearray(shard.read_bytes())
            data[len(data) // 2] ^= 255
            shard.write_bytes(data[: len(data) // 3] if damage == "truncate" else data)
        message = refused(*flags, "--load", str(copy), "--meap-refuse-damaged-checkpoint")
        assert "iter_0000003 is damaged: __0_0.distcp" in message
        assert "__0_0.distcp" in refused(*flags, "--load", str(copy), "--ckpt-step", "3")
        pretrained = refused(*flags, "--pretrained-checkpoint", str(copy), "--finetune")
        assert pretrained.startswith(f"--pretrained-checkpoint {copy}: checkpoint ")
        assert "iter_0000003 is damaged: __0_0.distcp" in pretrained

    @pytest.mark.parametrize("how", [(), ("--load", "saved"), ("--load", "copy", "--finetune"), ("--dry-run",)])
    def test_checkpoints_that_would_be_replaced(self, refused, flags, copy: Path, saved: Path, how) -> None:
        before = {path.name for path in copy.iterdir()} - {".lock"}
        more = [{"saved": str(saved), "copy": str(copy)}.get(word, word) for word in how]
        message = refused(*flags, "--save", str(copy), "--save-interval", "1", *more)
        assert f"--save {copy}: holds checkpoints up to iteration 3" in message
        assert "--meap-overwrite-checkpoints" in message
        assert {path.name for path in copy.iterdir()} - {".lock"} == before

    def test_a_refused_start_makes_no_directory(self, refused, flags, saved: Path, tmp_path: Path) -> None:
        wrong = saved / "iter_0000002"
        message = refused(*flags, "--load", str(wrong), "--save", str(tmp_path / "new"), "--save-interval", "1")
        assert message.endswith(f"give the directory around it: --load {saved} --ckpt-step 2")
        assert list(tmp_path.iterdir()) == [tmp_path / "cache"]

    def test_later_checkpoints_are_not_replaced_silently(self, flags, copy: Path, capsys) -> None:
        flags += ["--load", str(copy), "--save-interval", "1", "--override-opt_param-scheduler"]
        for save in (copy, copy.parent / "other"):
            capsys.readouterr()
            prepare(*flags, "--save", str(save), "--ckpt-step", "1")
            said = capsys.readouterr().out
            assert ("the later checkpoints there (2, 3) are replaced" in said) == (save == copy)
            assert "another schedule: decay of the learning rate (samples) 24 there, 160 here; growth of the we" in said

    def test_replacing_checkpoints_on_purpose(self, flags, copy: Path) -> None:
        assert prepare(*flags, "--save", str(copy), "--save-interval", "1", "--meap-overwrite-checkpoints")

    def test_nothing_good_left(self, refused, flags, copy: Path) -> None:
        for folder in copy.glob("iter_*"):
            (folder / "metadata.json").write_text("{}")
        assert "no usable checkpoint" in refused(*flags, "--load", str(copy))

    def test_two_jobs_that_save_to_the_same_directory(self, flags, tmp_path: Path) -> None:
        save = tmp_path / "shared"
        save.mkdir()
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD_LOCK, str(save / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert holder.stdout is not None
        holder.stdout.readline()
        command = [sys.executable, str(ENTRY), *flags, "--save", str(save), "--save-interval", "5"]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
        holder.communicate()
        assert done.returncode == 2
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: --save")
        assert "another job saves there (process 1 on host)" in last
        assert not list(save.glob("iter_*"))


@pytest.mark.parametrize("launcher", [[sys.executable], torchrun(2)], ids=["alone", "torchrun"])
def test_the_command_prints_one_line(flags: list[str], launcher: list[str]) -> None:
    """No traceback, and no output of a refused run but the line; at most the launcher's own words around it."""
    command = [*launcher, str(ENTRY), *flags, "--meap-mask-ratio", "1.5"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    line = "error: --meap-mask-ratio 1.5: must be at least 0 and below 1"
    said = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    assert said.count(line) == 1
    assert len(said) <= (1 if launcher == [sys.executable] else 15), said
