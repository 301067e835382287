"""Command lines drawn from the parser itself: all flags of Megatron's and ours, with values that fit and do not."""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.launch import MODEL, TRAINING

CONTEXTS: dict[str, str] = {
    "dense": "",
    "experts": "--num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 0.1",
    "latent": "--multi-latent-attention --kv-lora-rank 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 16",
    "prediction": "--mtp-num-layers 1",
    "pattern": "--hybrid-layer-pattern *-*-",
    "dropout": "--hidden-dropout 0.1 --attention-dropout 0.1",
    "bf16": "--bf16 --accumulate-allreduce-grads-in-fp32",
    "sharded": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    "tensor": "--tensor-model-parallel-size 2 --sequence-parallel",
    "pipeline": "--pipeline-model-parallel-size 2 --num-layers 4",
    "plain": "--normalization LayerNorm --position-embedding-type learned_absolute",
    "validated": "--eval-iters 2 --eval-interval 1",
    "saved": "--save checkpoints --load checkpoints --save-interval 1",
}
"""Flags by what they need around them; all others are drawn into any of these."""

RANKS = {"sharded": 2, "tensor": 2, "pipeline": 2}
DROPPED = {
    "bf16": ("--fp32",),
    "latent": ("--group-query-attention", "--num-query-groups"),
    "pattern": ("--num-layers",),
}
NOT_DRAWN = (
    "help", "dry_run", "fault_injector_", "error_injection_", "inprocess_", "enable_ft_package", "calc_ft_timeouts",
    "ft_num", "adlr_", "run_workload_inspector", "wandb_", "yaml_cfg",
)  # fmt: skip
"""They end or break a run on purpose, or reach beyond this host."""

GRAMMAR: dict[str, tuple[str, ...]] = {
    "window_size": ("8,0", "-1,0", "0", "8"),
    "window_attn_skip_freq": ("2", "[1,0]", "[1]"),
    "moe_layer_freq": ("[0,1]", "2", "[1]", "x"),
    "linear_attention_freq": ("2", "[1,0]"),
    "no_rope_freq": ("2", "[0,1]", "[1]"),
    "split": ("80,20,0", "100", "0,0,0", "a,b", "-1,2"),
    "hybrid_layer_pattern": ("*-*-", "*E*E", "M-*-", "Q", "*-|*-"),
    "hybrid_override_pattern": ("*-*-",),
    "pipeline_model_parallel_layout": ("Et|tL", "Ettt|L", "Ettx"),
    "step_batch_size_schedule": ("0:8 1K:16", "0:8", "x"),
    "phase_transition_iterations": ("1", "x"),
    "dist_ckpt_format": ("torch_dist",),
    "muon_coefficient_type": ("simple", "quintic"),
    "iterations_to_skip": ("1", "2", "9"),
    "validation_set_names": ("a", "a b"),
    "recompute_modules": ("core_attn", "mlp", "moe", "word"),
    "offload_modules": ("core_attn", "word"),
    "cuda_graph_scope": ("attn", "word"),
    "cuda_graph_modules": ("attn", "word"),
    "cp_comm_type": ("a2a", "word"),
    "spec": ("local", "a b"),
    "mrope_section": ("4 2 2", "1"),
    "hierarchical_context_parallel_sizes": ("1 2", "2"),
    "rampup_batch_size": ("2 2 8",),
    "meap_sft_date": ("2026-01-01", "word"),
    "meap_mask_token": ("<s>", "word"),
    "tokenizer_special_tokens": ("<a>",),
}
INTEGERS = {True: ("2", "1", "4", "3"), False: ("0", "-1", "7", "1000")}
NUMBERS = {True: ("0.5", "0.1", "1.0", "2"), False: ("0", "-1", "nan", "1e9", "-inf")}


@dataclass
class Case:
    """A command line and the number of ranks that it is for."""

    context: str
    more: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    """Of `more`, the names."""

    @property
    def world(self) -> int:
        """Ranks."""
        return RANKS.get(self.context, 1)

    def command_line(self, data: list[str]) -> list[str]:
        """All flags."""
        base = [*MODEL, *TRAINING, "--train-iters", "2"]
        for name in DROPPED.get(self.context, ()):
            place = base.index(name)
            del base[place : place + 1 + (not base[place + 1].startswith("--"))]
        return [*base, *data, *CONTEXTS[self.context].split(), *self.more]


def drawable(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The parser's flags, but for those of `NOT_DRAWN`."""
    return [each for each in parser._actions if not each.dest.startswith(NOT_DRAWN) and each.option_strings]


def values(action: argparse.Action, fitting: bool) -> list[list[str]]:
    """The words that may follow a flag, the likeliest to matter first."""
    if action.nargs == 0:
        return [[]]
    if action.choices:
        names = [str(getattr(each, "name", each)) for each in action.choices]
        default = str(getattr(action.default, "name", action.default))
        found = [name for name in names if name != default] if fitting else ["word"]
    elif action.dest in GRAMMAR:
        found = list(GRAMMAR[action.dest])
        return [each.split() if isinstance(action.nargs, str | int) else [each] for each in found]
    elif action.type is int:
        found = [each for each in INTEGERS[fitting] if each != str(action.default)]
    elif action.type is float:
        found = [each for each in NUMBERS[fitting] if float(each) != action.default]
    else:
        found = ["word"] if fitting else [""]
    return [[each] * (action.nargs if isinstance(action.nargs, int) else 1) for each in found]


def spelled(action: argparse.Action, words: list[str]) -> list[str]:
    """A flag and its words; those that begin with a dash are tied to it."""
    name = next((each for each in action.option_strings if each.startswith("--")), action.option_strings[0])
    if isinstance(action, argparse.BooleanOptionalAction):
        name = action.option_strings[-1 if action.default else 0]
    return [f"{name}={words[0]}"] if len(words) == 1 else [name, *words]


def drawn(parser: argparse.ArgumentParser, seed: int) -> Case:
    """One to three flags in any context, four of five of them with values that fit."""
    draw = random.Random(seed)
    case = Case(draw.choice(list(CONTEXTS)))
    for action in draw.sample(drawable(parser), draw.choice((1, 2, 2, 3))):
        case.more += spelled(action, draw.choice(values(action, draw.random() < 0.8)))
        case.flags.append(action.option_strings[0])
    return case


def single(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.Action, list[str]]]:
    """Every flag with the value that is likeliest to matter."""
    for action in drawable(parser):
        yield action, spelled(action, values(action, True)[0])
