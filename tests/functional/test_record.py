"""Checkpoints record what determines a run; a run that resumes one with other settings is refused or warns."""

import fnmatch
import re
import shutil
from argparse import Namespace
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from megatron_meap.checkpoint import model_arguments
from megatron_meap.cluster import meeting
from megatron_meap.errors import UsageError
from megatron_meap.meap.settings import MaskSettings
from megatron_meap.sft.flags import SFTSettings
from megatron_meap.trainer import record
from megatron_meap.trainer.official import OfficialSettings
from tests.conftest import REPOSITORY, Corpus
from tests.launch import MODEL, TRAINING
from tests.sft import prepare, save


def flags_of(corpus: Corpus, folder: Path, *extra: str) -> list[str]:
    flags = [*MODEL, *TRAINING, *corpus.data_flags, "--data-cache-path", str(folder / "cache"), "--save-interval", "5"]
    place = flags.index("--data-path")
    flags[place + 1 : place + 2] = ["0.9", corpus.prefix, "0.1", corpus.second_prefix]
    return [*flags, "--save", str(folder / "run"), *extra]


@pytest.fixture(scope="module")
def folder(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("record")
    save(prepare(*flags_of(corpus, folder)), folder / "run")
    return folder


@pytest.fixture
def resume(corpus: Corpus, folder: Path, capsys: pytest.CaptureFixture):
    """Everything up to the start of a resumed run; its warnings."""

    def run(*extra: str, **keywords: int) -> list[str]:
        capsys.readouterr()
        prepare(*flags_of(corpus, folder), "--load", str(folder / "run"), *extra, **keywords)
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]

    return run


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("--seed 5 --meap-mask-seed 1234", "--seed 1234 there, 5 here"),
        ("--eod-mask-loss", "--eod-mask-loss False there, True here"),
        ("--reset-attention-mask", "--reset-attention-mask False there, True here"),
        ("--split 80,20,0", "--split 90,10,0 there, 80,20,0 here"),
        ("--seq-length 32", "--seq-length 64 there, 32 here"),
        ("--dataloader-inter-document-masking", "--dataloader-inter-document-masking False there"),
        ("--meap-clean-final-share 0.1", "--meap-clean-final-share 0.0 there, 0.1 here"),
        ("--meap-mask-warmup-samples 8", "--meap-mask-warmup-samples 0 there, 8 here"),
        ("--optimizer sgd", "--optimizer adam there, sgd here"),
        ("--train-iters 5000", "epochs of the training data, by the length of training 1, 1 there"),
    ],
)
def test_what_decides_the_run_is_refused(resume, extra: str, said: str) -> None:
    with pytest.raises(UsageError, match=rf"was trained with other settings: .*{re.escape(said)}"):
        resume(*extra.split())
    warnings = resume(*extra.split(), "--meap-allow-changed-settings")
    assert len(warnings) == 1
    assert said in warnings[0]


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("--override-ckpt-iteration 1000", "--override-ckpt-iteration 1000: this run has 20 steps"),
        ("--override-ckpt-iteration 21", "--override-ckpt-iteration 21: this run has 20 steps"),
        ("--override-ckpt-iteration -1", "--override-ckpt-iteration -1: this run has 20 steps"),
        ("--override-ckpt-iteration 1 --global-batch-size 4", "needs the global batch size of"),
    ],
)
def test_a_place_in_the_data_that_the_run_lacks_is_refused(resume, extra: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        resume(*extra.split())
    assert resume("--override-ckpt-iteration", "1") == []


def test_another_blend_is_refused(resume, corpus: Corpus, tmp_path: Path) -> None:
    """Other weights, another order, other files under the same names; the same files elsewhere are the same."""
    one, two = corpus.prefix, corpus.second_prefix
    for blend, said in (
        (["0.1", one, "0.9", two], "the blend's weights 0.9, 0.1 there, 0.1, 0.9 here"),
        (["0.1", two, "0.9", one], "the training data (digests)"),
        (["0.9", one, "0.1", one], "the training data (digests)"),
        ([one], "the blend's weights"),
    ):
        with pytest.raises(UsageError, match=re.escape(said)):
            resume("--data-path", *blend)
    assert resume("--data-path", "9", one, "1", two) == []
    for suffix in (".bin", ".idx"):
        shutil.copy(one + suffix, tmp_path / f"moved{suffix}")
    moved = tmp_path / "moved"
    assert resume("--data-path", "0.9", str(moved), "0.1", two) == []
    ids = np.fromfile(f"{moved}.bin", np.uint16)  # as many tokens and documents, in another order
    ids[::-1].tofile(f"{moved}.bin")
    with pytest.raises(UsageError, match=r"the training data \(digests\)"):
        resume("--data-path", "0.9", str(moved), "0.1", two)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("--clip-grad 2.0", "--clip-grad 1.0 there, 2.0 here"),
        ("--hidden-dropout 0.1", "--hidden-dropout 0.0 there, 0.1 here"),
        ("--lr-warmup-init 1e-5", "--lr-warmup-init 0.0 there, 1e-05 here"),
        ("--make-vocab-size-divisible-by 768", "rows of the padded vocabulary 512 there, 768 here"),
        ("--global-batch-size 16", "--global-batch-size 8 there, 16 here"),
        ("--eval-iters 1 --meap-mask-validation", "--meap-mask-validation False there, True here"),
    ],
)
def test_what_is_often_changed_on_purpose_is_said(resume, extra: str, said: str) -> None:
    warnings = resume(*extra.split())
    assert len(warnings) == 1
    assert said in warnings[0]


def test_the_table_of_the_docs_is_true_and_complete(resume) -> None:
    """Every flag in a row that says one thing has that verdict; every setting of ours that decides stands in one."""
    table = (REPOSITORY / "docs/training.md").read_text().partition("## What may change")[2].partition("\n\nFiles")[0]
    rows = [re.split(r" *\| *", line)[1:3] for line in table.splitlines() if line.startswith("|")]
    verdicts = {"refused": record.Verdict.REFUSED, "a warning": record.Verdict.WARNED, "free": record.Verdict.FREE}
    args = Namespace(meap_mask_strategy="random", meap_clean_final_share=0.0)
    megatrons = [flag for flag, _ in record._megatrons_flags().values()]
    said: dict[str, record.Verdict] = {}
    for what, outcome in rows:
        for pattern in re.findall(r"`(--[\w*-]+)`", what) if outcome in verdicts else ():
            for flag in fnmatch.filter(megatrons, pattern) or [pattern]:
                said[flag] = verdicts[outcome]
    assert len(said) > 50
    for flag, outcome in said.items():
        assert record.verdict(flag, args) is outcome, flag
    ours = (MaskSettings, SFTSettings, OfficialSettings)
    deciding = [kind.flag_of(f.name) for kind in ours for f in fields(kind) if f.metadata.get("decides")]
    assert {flag for flag in deciding if flag.startswith("--") and " " not in flag} <= said.keys()


@pytest.mark.parametrize(
    "layout",
    [
        "",
        "--tensor-model-parallel-size 2 --sequence-parallel",
        "--pipeline-model-parallel-size 2",
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --no-load-optim",
        "--micro-batch-size 1 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "--log-interval 5 --eval-interval 7 --save-interval 3 --num-workers 1 --exit-interval 4 --async-save",
    ],
)
def test_layout_and_logging_change_without_a_word(resume, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    monkeypatch.setattr(meeting, "on_rank_zero", lambda _, look: (look(None), None))  # the other rank is not there
    assert resume(*layout.split(), world_size=2) == []


def test_a_checkpoint_without_a_record_loads_with_one_warning(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    args = prepare(*flags_of(corpus, tmp_path))
    described = args.meap_record
    del args.meap_record
    save(args, tmp_path / "run")
    capsys.readouterr()
    again = prepare(*flags_of(corpus, tmp_path), "--load", str(tmp_path / "run"))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    assert len(said) == 1
    assert "older than the record" in said[0]
    assert again.meap_record == described
    with pytest.raises(UsageError, match="--eod-mask-loss False there, True here"):
        prepare(*flags_of(corpus, tmp_path), "--load", str(tmp_path / "run"), "--eod-mask-loss")


def test_the_length_of_training_decides_where_the_masks_follow_it(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """With a clean final share; otherwise only the number of epochs does."""
    flags = flags_of(corpus, tmp_path, "--meap-clean-final-share", "0.2", "--lr-decay-iters", "20")
    save(prepare(*flags), tmp_path / "run")
    with pytest.raises(UsageError, match="the samples of training 160 there, 240 here"):
        prepare(*flags, "--load", str(tmp_path / "run"), "--train-iters", "30")


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        ({}, "--use-distributed-optimizer", "a plain optimizer, this run has a distributed one; drop"),
        ({"use_distributed_optimizer": True}, "", "a distributed optimizer, this run has a plain one; add"),
        (
            {"use_distributed_optimizer": True, "transformer_impl": "transformer_engine"},
            "--use-distributed-optimizer",
            "flat, in the order of its run's parameters, and does not fit: --transformer-impl transformer_engine there",
        ),
        (
            {"use_distributed_optimizer": True, "tensor_model_parallel_size": 2},
            "--use-distributed-optimizer",
            "flat, in the order of its run's parameters, and does not fit: --tensor-model-parallel-size 2 there",
        ),
        ({"no_save_optim": True}, "", "has no optimizer state (--no-save-optim); add --no-load-optim"),
    ],
)
def test_an_optimizer_state_that_would_not_find_its_parameters_is_refused(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: dict, here: str, said: str
) -> None:
    """Before anything is loaded; a state that knows the parameters' names goes into other layers and layouts."""
    args = prepare(*flags_of(corpus, tmp_path))
    vars(args).update(there)
    save(args, tmp_path / "run")
    state = {"distrib_optim_sharding_type": "dp_reshardable"}
    monkeypatch.setattr("megatron.core.dist_checkpointing.load_content_metadata", lambda _: state)
    resume = [*flags_of(corpus, tmp_path), "--load", str(tmp_path / "run"), *here.split()]
    with pytest.raises(UsageError, match=re.escape(said)):
        prepare(*resume)
    prepare(*resume, "--no-load-optim")
    if "flat" in said:
        state["distrib_optim_sharding_type"] = "fully_reshardable"
        prepare(*resume)


def test_blocks_of_muon_are_recorded(corpus: Corpus, folder: Path) -> None:
    """With `blockwise` the tensor parallelism decides what is learned."""
    pytest.importorskip("emerging_optimizers")
    flags = flags_of(corpus, folder / "muon", "--optimizer", "muon", "--muon-tp-mode")
    whole, blocks = (prepare(*flags, mode) for mode in ("duplicated", "blockwise"))
    assert record.BLOCKS not in whole.meap_record
    saved = Namespace(meap_record=blocks.meap_record | {record.BLOCKS: 2})
    assert list(record.differences(saved, blocks)) == [(record.Verdict.WARNED, f"{record.BLOCKS} 2 there, 1 here")]


def test_every_flag_of_the_model_is_known_by_its_effect() -> None:
    """What these tables do not know passes unnoticed where a run begins with the weights of another."""
    known = {*model_arguments.SHAPE, *model_arguments.FUNCTION}
    others = {
        name
        for name, (_, group) in record._megatrons_flags().items()
        if group in record.MODEL_GROUPS and name not in known and record._verdict_of(name) is not record.Verdict.FREE
    }
    learning = {
        "moe_router_load_balancing_type",
        "moe_aux_loss_coeff",
        "moe_use_upcycling",
        "moe_upcycling_granularity",
    }
    without_effect = {"relative_attention_num_buckets", "relative_attention_max_distance", "onnx_safe"}
    without_effect |= {"bert_binary_head", "cache_mla_latents"}
    by_others = {"use_rotary_position_embeddings", "add_position_embedding", "linear_attention_freq"}
    by_others |= {"heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json"}
    assert others == learning | without_effect | by_others


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        (
            {"num_query_groups": 2, "group_query_attention": True},
            {"num_query_groups": 2},
            "num_query_groups 2 there, 4",
        ),
        ({"num_query_groups": 1}, {"num_query_groups": 4, "group_query_attention": True}, ""),
        ({"num_experts": 4, "moe_ffn_hidden_size": 8}, {"num_experts": 4}, "moe_ffn_hidden_size 8 there, None here"),
        ({"moe_ffn_hidden_size": 8}, {}, ""),
        (
            {"multi_latent_attention": True, "q_lora_rank": 8},
            {"multi_latent_attention": True},
            "q_lora_rank 8 there, None",
        ),
        ({"q_lora_rank": 8}, {}, ""),
    ],
)
def test_shapes_are_compared_as_they_take_effect(there: dict, here: dict, said: str) -> None:
    """With the switch that they need, in words that name them; `--use-checkpoint-args` takes each over."""
    plain = dict.fromkeys(model_arguments.SHAPE) | {"num_attention_heads": 4, "group_query_attention": False}
    saved, args = (Namespace(**plain | each) for each in (there, here))
    found = model_arguments.differences(saved, args, model_arguments.SHAPE)
    assert [each[: len(said)] for each in found] == [said] * bool(said)
    model_arguments.take_over(saved, args)
    args.group_query_attention = saved.group_query_attention  # Megatron does
    assert not model_arguments.differences(saved, args, model_arguments.SHAPE)
