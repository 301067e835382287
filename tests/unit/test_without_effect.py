"""Flags that would change nothing are refused, with a hint at what gives them an effect."""

import argparse
import importlib.util
import re
from fnmatch import fnmatchcase
from pathlib import Path

import megatron.core
import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_meap.errors import UsageError
from megatron_meap.trainer import without_effect
from megatron_meap.trainer.arguments import add_arguments
from tests import combinations


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)), [])


def test_a_cpu_saves_in_megatrons_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nvidia-resiliency-ext is installed, whose own fails without a GPU while the training waits for it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)), [])
    assert parser.get_default("async_strategy") == "mcore"


def parse(parser: argparse.ArgumentParser, flags: list[str]) -> argparse.Namespace:
    return argparse.ArgumentParser.parse_args(parser, flags)


def check(parser: argparse.ArgumentParser, flags: list[str]) -> None:
    args = parse(parser, flags)
    given = without_effect.changed(parser, args)
    without_effect.refuse_unread(given)
    without_effect.refuse_unaccompanied(given, args)


@pytest.mark.parametrize(
    ("flags", "needed"),
    [
        ("--moe-router-topk 4", "--num-experts"),
        ("--num-experts 8 --moe-router-num-groups 4", "--moe-router-group-topk"),
        ("--num-experts 8 --moe-router-group-topk 2", "--moe-router-num-groups"),
        ("--kv-lora-rank 64", "--multi-latent-attention"),
        ("--rope-scaling-factor 4", "--use-rope-scaling"),
        ("--rotary-base 640000", "--position-embedding-type rope"),
        ("--optimizer sgd --adam-beta2 0.95", "--optimizer adam"),
        ("--mtp-loss-scaling-factor 0.3", "--mtp-num-layers"),
        ("--window-attn-skip-freq 2", "--window-size"),
        ("--mask-prob 0.3", "--meap-mask-ratio"),
        ("--rampup-batch-size 8 8 64", "--step-batch-size-schedule"),
        ("--openai-gelu", "drop it"),
        ("--create-all-gather-group", "drop it"),
        ("--rl-default-temperature 0.5", "reinforcement learning"),
        ("--dino-teacher-temp 0.5", "images"),
        ("--ict-load checkpoints", "retriever"),
        ("--inference-max-requests 4", "tools/generate.py"),
        ("--exit-signal SIGINT", "all stop a run here"),
        ("--no-data-sharding", "--dataloader-type cyclic"),
        ("--ddp-num-buckets 3", "--overlap-grad-reduce"),
        ("--wgrad-deferral-limit 3", "--defer-embedding-wgrad-compute"),
        ("--start-weight-decay 0.1", "--weight-decay-incr-style linear"),
        ("--account-for-loss-in-pipeline-split", "--pipeline-model-parallel-size above 1"),
        ("--data-parallel-sharding-strategy optim", "--use-megatron-fsdp"),
        ("--use-megatron-fsdp --outer-dp-sharding-strategy optim", "--num-distributed-optimizer-instances above 1"),
        ("--num-distributed-optimizer-instances 2", "--use-distributed-optimizer"),
        ("--use-distributed-optimizer --no-use-layer-wise-param-layout", "--optimizer muon"),
        ("--save-wgrads-interval 1", "--save"),
        ("--eval-iters 0 --meap-mask-validation", "--eval-iters above 0"),
        ("--multi-latent-attention --add-qkv-bias", "with --multi-latent-attention"),
        ("--multi-latent-attention --position-embedding-type none", "with --multi-latent-attention"),
        ("--multi-latent-attention --rotary-percent 0.5", "--rope-type rope"),
        ("--multi-latent-attention --rope-type rope --rotary-scaling-factor 4", "--rope-type yarn"),
        ("--hybrid-layer-pattern *-*- --mtp-num-layers 2", "with --hybrid-layer-pattern"),
    ],
)
def test_a_flag_without_its_partner(parser: argparse.ArgumentParser, flags: str, needed: str) -> None:
    flag = re.findall(r"--\S+", flags)[-1]
    with pytest.raises(UsageError, match=f"^{flag}: .*{needed}"):
        check(parser, flags.split())


@pytest.mark.parametrize(
    "flags",
    [
        "--num-experts 8 --moe-router-topk 4 --moe-router-num-groups 4 --moe-router-group-topk 2",
        "--hybrid-layer-pattern *E*E --moe-ffn-hidden-size 64",
        "--multi-latent-attention --kv-lora-rank 64 --rotary-base 1000",
        "--position-embedding-type rope --rotary-base 640000 --use-rope-scaling --rope-scaling-factor 4",
        "--use-rotary-position-embeddings --rotary-percent 0.5",
        "--multi-latent-attention --rope-type rope --rotary-percent 0.5",
        "--multi-latent-attention --rotary-scaling-factor 4 --mscale 0.7",
        "--hybrid-layer-pattern *-*-/*- --mtp-num-layers 2",
        "--moe-router-topk 2 --rotary-base 10000 --adam-beta1 0.9",  # the defaults
    ],
)
def test_a_flag_with_its_partner(parser: argparse.ArgumentParser, flags: str) -> None:
    check(parser, flags.split())


SATISFIED = {
    "adam_*": "--optimizer sgd",
    "eval_*_batch_size meap_mask_validation start_eval_at_iter": "--eval-iters 0",
    "mscale": "--rope-type rope",
    "position_embedding_type": "--position-embedding-type yarn",
    "tokenizer_hf_* merge_file vocab_file": "--tokenizer-type SentencePieceTokenizer",
    "reset_position_ids": "--position-embedding-type rope",
}
"""Companions that the defaults give: with what they are missing."""
VALUES = {"cuda_graph_modules": ["mlp"], "cuda_graph_scope_deprecated": ["mlp"]}


def test_every_flag_of_the_table_is_refused_without_its_companion(parser: argparse.ArgumentParser) -> None:
    refused = 0
    for patterns, companion, is_there in without_effect._NEEDS:
        absent = SATISFIED.get(patterns, "").split()
        assert not is_there(parse(parser, absent)), companion
        for action in parser._actions:
            if any(fnmatchcase(action.dest, each) for each in patterns.split()):
                flag = combinations.spelled(action, VALUES.get(action.dest) or combinations.values(action, True)[0])
                args = parse(parser, [*absent, *flag])
                if is_there(args) or action.dest not in without_effect.changed(parser, args):
                    continue  # the companion itself, or a flag that says what is so already
                with pytest.raises(UsageError, match=f"^{flag[0].partition('=')[0]}: (changes nothing|megatron-core)"):
                    check(parser, [*absent, *flag])
                refused += 1
    assert refused > len(without_effect._NEEDS)


def test_every_pattern_names_arguments_of_this_megatron(parser: argparse.ArgumentParser) -> None:
    patterns = [
        each
        for row in (*without_effect._NOWHERE, *without_effect._NEEDS, *without_effect._NOT_WITH)
        for each in row[0].split()
    ]
    names = [action.dest for action in parser._actions]
    assert [each for each in patterns if not any(fnmatchcase(name, each) for name in names)] == []


PROGRAMS = ("autoresume", "biencoder", "inference", "rl", "vision")
"""Groups of flags, as Megatron's parser titles them, of programs that are not this one."""
OTHERS = (
    *(f"core/{name}" for name in ("export", "inference", "post_training", "resharding")),
    *(f"core/datasets/{name}" for name in ("bert", "masked", "t5")),
    *(f"core/models/{name}" for name in ("T5", "audio", "bert", "huggingface", "mimo", "multimodal", "vision")),
    "training/yaml_arguments",
)
"""What Megatron has for those."""
HARMLESS = {
    "deprecated_use_mcore_models": "it is so",
}
"""Arguments that nothing reads, or of a group above, which may be given all the same, and why."""


def _words_read() -> set[str]:
    """Attributes that any code of this program reads, of an object of whatever kind."""
    read = re.compile(r"(?<=\.)[a-z]\w*(?!\w|\s*=[^=])|(?:getattr|hasattr)\(\s*[\w.]+,\s*[\"'](\w+)")
    megatrons, own = Path(megatron.core.__file__).parents[1], Path(without_effect.__file__).parents[1]
    sources = [
        *(path for path in megatrons.rglob("*.py") if not str(path.relative_to(megatrons)).startswith(OTHERS)),
        *own.rglob("*.py"),
    ]
    return {match[1] or match[0] for path in sources for match in read.finditer(path.read_text())}


def test_what_nothing_reads_is_refused(parser: argparse.ArgumentParser) -> None:
    """A flag of a new Megatron that nothing here reads, or that belongs to another program, must be classified."""
    of_others = {
        action.dest for group in parser._action_groups if group.title in PROGRAMS for action in group._group_actions
    }
    own = {action.dest for action in parser._actions if action.dest.startswith("meap_")}
    unread = {action.dest for action in parser._actions} - _words_read() - own
    refused = " ".join(patterns for patterns, *_ in (*without_effect._NOWHERE, *without_effect._NEEDS)).split()
    passing = {name for name in of_others | unread if not any(fnmatchcase(name, pattern) for pattern in refused)}
    assert passing == set(HARMLESS)
