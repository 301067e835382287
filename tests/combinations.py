"""Command lines drawn from the parser itself: all flags of Megatron's and ours, with values that fit and do not."""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from megatron.training.arguments import add_megatron_arguments

from megatron_meap.trainer.arguments import add_arguments
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
"""Flags by the context they need; all others are drawn in any context."""

RANKS = {"sharded": 2, "tensor": 2, "pipeline": 2}
DROPPED = {
    "bf16": ("--fp32",),
    "latent": ("--group-query-attention", "--num-query-groups"),
    "pattern": ("--num-layers",),
}
CONTEXT_OF: dict[str, tuple[str, ...]] = {
    "experts": ("moe_", "expert_"),
    "latent": ("q_lora", "kv_lora", "qk_head", "qk_pos", "v_head", "mscale", "rotary_scaling"),
    "prediction": ("mtp_",),
    "validated": ("eval_", "start_eval", "meap_mask_validation"),
    "bf16": ("attention_softmax", "grad_reduce_in", "accumulate_allreduce", "fp32_residual", "fp16_lm"),
    "plain": ("normalization", "untie", "add_bias", "swiglu"),
}
"""Where a flag has an effect, by the beginning of its argument's name; elsewhere it must be refused."""

NEITHER: dict[str, str] = {
    "how the same is computed, where and how fast":
        "*_backend *attention_version attention_backend *fusion fused_* use_fused_* *_fuser use_kitchen* kitchen_* "
        "*overlap* *_stream* use_ring* use_cpu_init* lazy_mpu* *cuda_graph* *offload* *nccl* use_sharp sharp_* "
        "*process_group* distributed_* local_rank no_persist* persist_layer_norm cross_entropy_* recompute_* "
        "checkpoint_activations distribute_saved* *gemm* num_workers *manual_gc* empty_unused* deterministic_mode "
        "batch_invariant* use_flash_attn use_mcore_models transformer_impl *_comm_* *wgrad* tp_comm_* num_dataset* "
        "mmap_bin* dataloader_fast* dataloader_defer* *_cache_path disable_bf16* enable_experimental use_te_* te_* "
        "*rng_tracker jit_* disable_jit* flash_decode symmetric* *jit* clone_scatter* mlp_chunks* barrier* pin_cpu* "
        "moe_paged* moe_hybridep* moe_deepep* moe_enable_deepep moe_permute* disable_symmetric* use_mem_eff* "
        "*mem_eff* align_* *fp8* fp4* *_bf16_reduced* *mxfp8* use_transformer_engine*",
    "how the model and the data lie on the ranks":
        "*parallel* *pipeline* ddp_* *fsdp* *distributed_optimizer* use_tp_pp* num_virtual* create_all_gather* "
        "account_for* microbatch_group* *sharding* *hsdp* hierarchical* max_seqlen* *layer_wise* decoder_first* "
        "decoder_last* init_model_with* gradient_reduce_div* suggested*",
    "what is said, measured and kept":
        "log_* *_log_* timing_* tensorboard_* *logging* *_trace_* profile* *profiler* record_* memory_snap* nvtx* "
        "*straggler* one_logger* *one_logger* app_tag* flight_* save* *save *_save load *ckpt* *checkpoint* "
        "*persistent* verify_* exit_* *interval dump_* config_logger* logits_* *rerun* result_rejected* check_* "
        "*sniff* inprocess* ft_* replication* *integrity no_load* no_save* override_* finetune enable_msc disable_msc "
        "use_dist_ckpt dist_ckpt* async_* *retain* stream_ckpt* use_persistent* *_memory_* meap_keep* meap_overwrite* "
        "meap_loss_spike meap_allow* meap_refuse* meap_lost* meap_probe* moe_per_layer_logging",
    "of Megatron's other programs: refused, as tests/unit/test_without_effect.py shows of all of them":
        "rl_* grpo_* langrl* perform_rl* *inference* dino_* vision_* swin_* ict_* bert_* biencoder* retriever* "
        "indexer_* titles_* evidence* block_data* embedding_path query_in* use_one_sent* img_* num_classes "
        "num_channels patch_dim classes_* data_per_class* data_sharding head_lr* iter_per* refit* mask_type "
        "mask_factor sample_rate max_tokens_to* output_bert* decode_only* enable_chunked* num_speculative* onnx_safe "
        "use_legacy* encoder_* decoder_* test_mode hybrid_override* mamba_inf* *sampling_seed* cache_mla* sft* "
        "moe_use_upcycling",
    "older or other names, which Megatron refuses or translates":
        "batch_size deprecated* warmup model_parallel_size rope_type num_layers_per* use_rotary* add_position* "
        "is_hybrid* cp_comm* spec fake_process* external* enable_cuda*",
    "the device, the tokenizer and the data themselves, without which there is no base to compare with":
        "fp32 tokenizer_* *data_path data_args* per_split* per_dataset* vocab_* merge_file mock_data null_* tiktoken* "
        "chat_* trust_remote* object_storage* seq_length *seq_length padded_vocab* pad_vocab* meap_sft* skip_bad* "
        "meap_official* num_layers hidden_size max_position* skip_train full_val* multiple_val* validation_set* "
        "fim_data meap_mask_weights disable_msc*",
    "a guard that this data does not trip":
        "mid_level* allow_ambiguous* meap_protect* create_attention* decrease_batch* moe_layer_recompute "
        "moe_enable_routing* *_dispatcher* moe_pad* moe_router_padding* *_experts_for* mtp_standalone use_checkpoint*",
    "equal by itself: the sums are the same":
        "micro_batch_size eval_micro_batch_size yarn_correction* calculate_per_token* moe_router_dtype "
        "mtp_use_repeated* num_query_groups lr_decay_samples "
        "hybrid_layer_pattern attention_softmax_in_fp32",
}  # fmt: skip
"""Flags that change neither data nor mathematics, by reason; of all others a run without effect is a fault."""

NOT_DRAWN = (
    "help", "dry_run", "fault_injector_", "error_injection_", "inprocess_", "enable_ft_package", "calc_ft_timeouts",
    "ft_num", "adlr_", "run_workload_inspector", "wandb_", "yaml_cfg",
)  # fmt: skip
"""They end or break a run on purpose, or affect other hosts."""

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
    "lr_decay_iters": ("9", "0"),
    "make_vocab_size_divisible_by": ("1000", "0"),
    "train_iters": ("3", "0"),
    "dataloader_type": ("cyclic", "external"),
    "position_embedding_type": ("none", "yarn", "learned_absolute", "mrope", "relative"),
    "start_eval_at_iter": ("2", "9"),
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
    ranks: int | None = None
    """Where they are not those of the context."""

    @property
    def world(self) -> int:
        """Ranks."""
        return self.ranks or RANKS.get(self.context, 1)

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
    if action.choices and action.dest not in GRAMMAR:
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
    """A flag and its values; a single value is joined to it with `=`, because it may begin with a dash."""
    name = next((each for each in action.option_strings if each.startswith("--")), action.option_strings[0])
    if isinstance(action, argparse.BooleanOptionalAction):
        name = action.option_strings[0 if action.default is False else -1]
    return [f"{name}={words[0]}"] if len(words) == 1 else [name, *words]


def drawn(parser: argparse.ArgumentParser, seed: int) -> Case:
    """One to three flags in any context, four of five of them with values that fit."""
    draw = random.Random(seed)
    case = Case(draw.choice(list(CONTEXTS)))
    for action in draw.sample(drawable(parser), draw.choice((1, 2, 2, 3))):
        case.more += spelled(action, draw.choice(values(action, draw.random() < 0.8)))
        case.flags.append(action.option_strings[0])
    return case


def parser() -> argparse.ArgumentParser:
    """Megatron's flags and ours."""
    return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)), [])


def single(parser: argparse.ArgumentParser) -> Iterator[Case]:
    """Every flag that should change the data or the mathematics, alone, with the value that is likeliest to matter."""
    for action in drawable(parser):
        if any(fnmatchcase(action.dest, pattern) for patterns in NEITHER.values() for pattern in patterns.split()):
            continue
        context = next((name for name, starts in CONTEXT_OF.items() if action.dest.startswith(starts)), "dense")
        base = Case(context).command_line([])
        for words in values(action, True):
            flag = spelled(action, words)
            name, _, value = flag[0].partition("=")
            last = len(base) - base[::-1].index(name) if name in base else 0
            if not last or (value and value != base[last]):
                yield Case(context, flag, [name])
                break
