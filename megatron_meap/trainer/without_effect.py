"""Flags that would change nothing: refused, because whoever gives one expects an effect."""

import argparse
from argparse import Namespace
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from megatron.core.tokenizers.utils.build_tokenizer import MEGATRON_TOKENIZERS, SP_TOKENIZERS

from megatron_meap.errors import UsageError

_NOWHERE = (
    ("apply_residual_connection_post_layernorm create_all_gather_group dist_ckpt_save_pre_mcore_014 "
     "enable_full_sharding_in_hsdp exit_signal_handler_for_dataloader onnx_safe openai_gelu", "drop it"),
    ("inprocess_*", "restarts within the processes are for Megatron's own scripts; use --enable-ft-package"),
    ("adlr_autoresume* app_tag_* one_logger_* run_workload_inspector_server",
     "it needs a program that only NVIDIA's clusters have; drop it"),
    ("checkpoint_activations", "use --recompute-activations"),
    ("dist_ckpt_format_deprecated use_dist_ckpt_deprecated", "use --ckpt-format"),
    ("exit_signal", "SIGTERM, SIGUSR1, SIGINT and SIGHUP all stop a run here; drop it"),
    ("freeze_all_layers", "all layers would be trained; drop it"),
    ("logits_load_*", "there is no distillation here; drop it"),
    ("mask_prob", "it is for BERT; use --meap-mask-ratio"),
    ("rampup_batch_size", "use --step-batch-size-schedule"),
    ("save_retain_interval", "use --meap-keep-last and --meap-keep-every"),
    ("use_flash_attn", "use --attention-backend flash"),
    ("vocab_extra_ids", "give the tokenizer its tokens instead"),
    ("bert_* biencoder_* block_data_path embedding_path evidence_data_path ict_* indexer_* output_bert_embeddings "
     "query_in_block_prob retriever_* short_seq_prob titles_data_path use_one_sent_docs",
     "it is for BERT and its retriever; drop it"),
    ("classes_fraction data_per_class_fraction dino_* head_lr_mult img_? iter_per_epoch mask_factor mask_type "
     "mrope_section num_channels num_classes patch_dim sample_rate swin_* vision_*", "it is for images; drop it"),
    ("grpo_* langrl_* perform_rl_step refit_method rl_*", "it is for Megatron's reinforcement learning; drop it"),
    ("cache_mla_latents decode_only_cuda_graphs enable_chunked_prefill flash_decode inference_* mamba_inference_* "
     "max_tokens_to_oom mlp_chunks_for_prefill moe_pad_experts_for_cuda_graph_inference nccl_all_reduce_for_prefill "
     "num_speculative_tokens offset_sampling_seed_by_dp_rank use_legacy_static_engine",
     "it is for Megatron's inference, which tools/generate.py replaces here; drop it"),
)  # fmt: skip
"""Patterns of Megatron's arguments that nothing reads in a training of this kind, and what to do."""


def _given(name: str, *chosen: Any) -> Callable[[Namespace], bool]:
    """Whether an argument is set, or has one of these values."""
    return lambda args: getattr(args, name) in chosen if chosen else bool(getattr(args, name))


def _layers(symbol: str, name: str, *chosen: Any) -> Callable[[Namespace], bool]:
    """The same, or that the pattern of a HybridModel has such layers."""
    return lambda args: symbol in (args.hybrid_layer_pattern or "") or _given(name, *chosen)(args)


def _is_rotary(args: Namespace) -> bool:
    rotary = args.position_embedding_type in ("rope", "yarn", "mrope")
    return rotary or args.use_rotary_position_embeddings or args.multi_latent_attention


def _has_yarn(args: Namespace) -> bool:
    """Whether multi-latent attention uses YaRN for its rotary positions, Megatron's default there."""
    return args.multi_latent_attention and args.rope_type != "rope"


_NEEDS: tuple[tuple[str, str, Callable[[Namespace], Any]], ...] = (
    ("adam_*", "--optimizer adam", lambda args: args.optimizer not in ("sgd", "lion")),
    ("ddp_bucket_size ddp_num_buckets", "--overlap-grad-reduce", _given("overlap_grad_reduce")),
    ("wgrad_deferral_limit", "--defer-embedding-wgrad-compute", _given("defer_embedding_wgrad_compute")),
    ("end_weight_decay start_weight_decay", "--weight-decay-incr-style linear or cosine",
     lambda args: args.weight_decay_incr_style != "constant"),
    ("ddp_reduce_scatter_with_fp32_accumulation", "--use-distributed-optimizer",
     lambda args: args.use_distributed_optimizer or args.use_megatron_fsdp),
    ("flash_attention_version", "--transformer-impl transformer_engine",
     lambda args: args.transformer_impl != "local"),
    ("data_sharding", "--dataloader-type cyclic", _given("dataloader_type", "cyclic")),
    ("decoupled_min_lr", "--decoupled-lr", _given("decoupled_lr")),
    ("dsa_*", "--experimental-attention-variant dsa", _layers("D", "experimental_attention_variant", "dsa")),
    ("eval_*_batch_size meap_mask_validation start_eval_at_iter", "--eval-iters above 0",
     lambda args: args.eval_iters != 0 or args.full_validation),
    ("auto_detect_ckpt_format ckpt_fully_parallel_load ckpt_load_* ckpt_step dist_ckpt_strictness "
     "exit_on_missing_checkpoint finetune load_main_params_from_ckpt no_load_* override_ckpt_iteration "
     "meap_refuse_damaged_checkpoint override_opt_param_scheduler use_checkpoint_opt_param_scheduler", "--load",
     lambda args: args.load or args.pretrained_checkpoint),
    ("async_save ckpt_assume_* ckpt_fully_parallel_save_process_group dist_ckpt_workers no_save_*", "--save",
     _given("save")),
    ("fim_?*", "--fim-data", _given("fim_data")),
    ("fim_fragment_rate", "--fim-split-sample", _given("fim_split_sample")),
    ("first_last_layers_bf16 fp8_* num_layers_at_*", "--fp8-format", lambda args: args.fp8 or args.fp4),
    ("grad_reduce_in_bf16", "--bf16", _given("bf16")),
    ("hysteresis *loss_scale loss_scale_window", "--fp16", _given("fp16")),
    ("kv_lora_rank mla_* q_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim", "--multi-latent-attention",
     _given("multi_latent_attention")),
    ("linear_*_dim linear_attention_freq linear_num_*", "--experimental-attention-variant gated_delta_net",
     _layers("G", "experimental_attention_variant", "gated_delta_net")),
    ("lr_wsd_*", "--lr-decay-style WSD", _given("lr_decay_style", "WSD")),
    ("mamba_head_dim mamba_num_* mamba_state_dim mamba_training_*", "Mamba layers (M in --hybrid-layer-pattern)",
     lambda args: "M" in (args.hybrid_layer_pattern or "")),
    ("meap_span_length", "--meap-mask-strategy span or geometric",
     lambda args: args.meap_mask_strategy in ("span", "geometric") or args.meap_objective == "spans"),
    ("moe_*", "--num-experts", _layers("E", "num_experts")),
    ("moe_mlp_glu_interleave_size", "--moe-grouped-gemm", _given("moe_grouped_gemm")),
    ("moe_upcycling_granularity", "--moe-use-upcycling", _given("moe_use_upcycling")),
    ("moe_pad_expert_input_to_capacity moe_token_drop_policy", "--moe-expert-capacity-factor",
     _given("moe_expert_capacity_factor")),
    ("moe_router_bias_update_rate", "--moe-router-enable-expert-bias", _given("moe_router_enable_expert_bias")),
    ("moe_router_group_topk", "--moe-router-num-groups", _given("moe_router_num_groups")),
    ("moe_router_num_groups", "--moe-router-group-topk", _given("moe_router_group_topk")),
    ("moe_router_quantile_balancing_ema", "--moe-router-load-balancing-type quantile_balancing",
     lambda args: "quantile_balancing" in args.moe_router_load_balancing_type),
    ("moe_shared_expert_gate moe_shared_expert_glu_* moe_shared_expert_overlap",
     "--moe-shared-expert-intermediate-size", _given("moe_shared_expert_intermediate_size")),
    ("mtp_detach_heads mtp_loss_scaling_factor mtp_use_repeated_layer", "--mtp-num-layers",
     _layers("/", "mtp_num_layers")),
    ("mtp_hybrid_override_pattern", "--hybrid-layer-pattern", _given("hybrid_layer_pattern")),
    ("mscale mscale_all_dim", "--multi-latent-attention and --rotary-scaling-factor above 1",
     lambda args: args.multi_latent_attention and args.rotary_scaling_factor > 1),
    ("mscale", "--rope-type yarn", lambda args: args.rope_type != "rope"),
    ("rotary_scaling_factor", "--position-embedding-type yarn, or --multi-latent-attention with --rope-type yarn",
     lambda args: args.position_embedding_type == "yarn" or _has_yarn(args) or args.mscale_all_dim),
    ("position_embedding_type", "--rotary-scaling-factor",  # of which yarn is rope
     lambda args: args.position_embedding_type != "yarn" or args.rotary_scaling_factor != 1),
    ("non_persistent_*_dir non_persistent_local_ckpt_algo non_persistent_save_interval", "--non-persistent-ckpt-type",
     _given("non_persistent_ckpt_type")),
    ("reset_position_ids", "--position-embedding-type learned_absolute: rotary positions ignore it",
     lambda args: not _is_rotary(args)),
    ("apply_wd_to_qk_layernorm no_weight_decay_cond_type", "--qk-layernorm", _given("qk_layernorm")),
    ("mup_*", "--use-mup", _given("use_mup")),
    ("muon_*", "--optimizer muon", lambda args: "muon" in args.optimizer),
    ("lion_*", "--optimizer lion", lambda args: "lion" in (args.optimizer, args.muon_scalar_optimizer)),
    ("qk_clip_*", "--qk-clip", _given("qk_clip")),
    ("relative_attention_*", "--position-embedding-type relative", _given("position_embedding_type", "relative")),
    ("no_rope_freq rotary_base rotary_interleaved rotary_percent rotary_seq_len_* use_rope_scaling",
     "--position-embedding-type rope", _is_rotary),
    ("distribute_saved_activations recompute_method recompute_modules recompute_num_layers", "--recompute-granularity",
     lambda args: args.recompute_granularity or args.recompute_activations),
    ("rope_scaling_factor", "--use-rope-scaling", _given("use_rope_scaling")),
    ("save_?*_interval", "--save", _given("save")),
    ("sgd_momentum", "--optimizer sgd", _given("optimizer", "sgd")),
    ("validation_set_names", "--multiple-validation-sets", _given("multiple_validation_sets")),
    ("window_attn_skip_freq", "--window-size", _given("window_size")),
    ("yarn_*", "--position-embedding-type yarn", _given("position_embedding_type", "yarn")),
    ("account_for_*_in_pipeline_split", "--pipeline-model-parallel-size above 1",
     lambda args: args.pipeline_model_parallel_size > 1),
    ("activation_offload_fraction delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks "
     "fine_grained_offloading_max_inflight_offloads min_offloaded_tensor_size offload_modules",
     "--fine-grained-activation-offloading", _given("fine_grained_activation_offloading")),
    ("async_ckpt_* use_persistent_ckpt_worker", "--async-save", _given("async_save")),
    ("calc_ft_timeouts ft_*", "--enable-ft-package", _given("enable_ft_package")),
    ("chat_template", "--meap-sft", _given("meap_sft")),
    ("ckpt_convert_*", "--ckpt-convert-format", _given("ckpt_convert_format")),
    ("ckpt_fully_parallel_load_*", "--ckpt-fully-parallel-load", _given("ckpt_fully_parallel_load")),
    ("cp_comm_type hierarchical_context_parallel_sizes", "--context-parallel-size above 1",
     lambda args: args.context_parallel_size > 1),
    ("cpu_offloading_*_buffers", "--cpu-offloading-num-layers", _given("cpu_offloading_num_layers")),
    ("cuda_graph_modules cuda_graph_scope_deprecated cuda_graph_warmup_steps", "--cuda-graph-impl",
     lambda args: args.cuda_graph_impl != "none" or args.enable_cuda_graph or args.external_cuda_graph
     or args.optimizer_cuda_graph),
    ("disable_straggler_on_startup straggler_*", "--log-straggler", _given("log_straggler")),
    ("error_injection_type", "--error-injection-rate", _given("error_injection_rate")),
    ("expert_tensor_parallel_size", "--num-experts", _layers("E", "num_experts")),
    ("fault_injector_*", "--fault-injector-ranks or --fault-injector-num-ranks",
     lambda args: args.fault_injector_ranks is not None or args.fault_injector_num_ranks is not None),
    ("flight_recorder_*", "--flight-recorder-dump-path", _given("flight_recorder_dump_path")),
    ("data_parallel_sharding_strategy fsdp_* keep_fp8_transpose_cache megatron_fsdp_* outer_dp_sharding_strategy",
     "--use-megatron-fsdp", _given("use_megatron_fsdp")),
    ("outer_dp_sharding_strategy", "--num-distributed-optimizer-instances above 1",
     lambda args: args.num_distributed_optimizer_instances > 1),
    ("num_distributed_optimizer_instances", "--use-distributed-optimizer",
     lambda args: args.use_distributed_optimizer or args.use_megatron_fsdp),
    ("use_layer_wise_param_layout", "--optimizer muon and --use-distributed-optimizer",
     lambda args: args.optimizer not in ("adam", "sgd")
     and (args.use_distributed_optimizer or args.optimizer == "dist_muon")),
    ("distrib_optim_fully_reshardable_mem_efficient", "--dist-ckpt-optim-fully-reshardable",
     _given("dist_ckpt_optim_fully_reshardable")),
    ("high_priority_a2a_comm_stream ep_overlap_early_*", "--overlap-moe-expert-parallel-comm",
     _given("overlap_moe_expert_parallel_comm")),
    ("init_model_with_meta_device", "--use-torch-fsdp2 or --use-megatron-fsdp, which give the weights their values",
     lambda args: args.use_torch_fsdp2 or args.use_megatron_fsdp),
    ("kitchen_attention_backend", "--use-kitchen-attention", _given("use_kitchen_attention")),
    ("log_loss_scale_to_tensorboard log_memory_to_tensorboard log_timers_to_tensorboard "
     "log_world_size_to_tensorboard tensorboard_log_interval", "--tensorboard-dir or --wandb-project",
     lambda args: args.tensorboard_dir or args.wandb_project),
    ("log_validation_ppl_to_tensorboard tensorboard_queue_size", "--tensorboard-dir", _given("tensorboard_dir")),
    ("logits_save_*", "--logits-save-dir", _given("logits_save_dir")),
    ("manual_gc_*", "--manual-gc", _given("manual_gc")),
    ("memory_snapshot_path", "--record-memory-history", _given("record_memory_history")),
    ("moe_paged_stash_*", "--moe-paged-stash", _given("moe_paged_stash")),
    ("moe_routing_trace_*", "--moe-routing-trace-path", _given("moe_routing_trace_path")),
    ("null_tokenizer_*", "--tokenizer-type NullTokenizer", _given("tokenizer_type", "NullTokenizer")),
    ("nvtx_ranges profile_* record_shapes use_pytorch_profiler", "--profile", _given("profile")),
    ("optimizer_offload_fraction overlap_cpu_optimizer_d2h_h2d use_torch_optimizer_for_cpu_offload",
     "--optimizer-cpu-offload", _given("optimizer_cpu_offload")),
    ("pytorch_profiler_*", "--use-pytorch-profiler", _given("use_pytorch_profiler")),
    ("replication_*", "--replication", _given("replication")),
    ("sharp_enabled_group", "--use-sharp", _given("use_sharp")),
    ("strict_fsdp_dtensor_load", "--ckpt-format fsdp_dtensor", _given("ckpt_format", "fsdp_dtensor")),
    ("tiktoken_*", "--tokenizer-type TikTokenizer", _given("tokenizer_type", "TikTokenizer")),
    ("torch_fsdp2_*", "--use-torch-fsdp2", _given("use_torch_fsdp2")),
    ("tokenizer_hf_* merge_file vocab_file", "--tokenizer-type HuggingFaceTokenizer or GPT2BPETokenizer",
     lambda args: args.tokenizer_type in (None, "HuggingFaceTokenizer", *MEGATRON_TOKENIZERS)),
    ("tokenizer_sentencepiece_*", "--tokenizer-type SentencePieceTokenizer",
     lambda args: args.tokenizer_type in SP_TOKENIZERS),
    ("tp_comm_*", "--tp-comm-overlap", _given("tp_comm_overlap")),
    ("wandb_*", "--wandb-project", _given("wandb_project")),
)  # fmt: skip
"""Patterns of arguments, the flag that they need, and whether it is given."""

_NOT_WITH: tuple[tuple[str, str, Callable[[Namespace], Any]], ...] = (
    ("add_qkv_bias no_rope_freq rotary_seq_len_* use_rope_scaling", "--multi-latent-attention",
     _given("multi_latent_attention")),
    ("mtp_*", "--hybrid-layer-pattern that has no layers for it, after a /",
     lambda args: args.hybrid_layer_pattern and "/" not in args.hybrid_layer_pattern),
    ("no_rope_freq use_rope_scaling window_attn_skip_freq", "--hybrid-layer-pattern", _given("hybrid_layer_pattern")),
    ("num_experts", "--hybrid-layer-pattern without an E",
     lambda args: args.hybrid_layer_pattern and "E" not in args.hybrid_layer_pattern),
    ("position_embedding_type", "--multi-latent-attention, whose heads have rotary positions",
     lambda args: args.multi_latent_attention and args.position_embedding_type == "none"),
    ("rotary_percent", "--multi-latent-attention but with --rope-type rope", _has_yarn),
    ("record_shapes", "--use-pytorch-profiler", _given("use_pytorch_profiler")),
    ("rotary_percent rotary_seq_len_* use_rope_scaling", "--position-embedding-type yarn",
     _given("position_embedding_type", "yarn")),
    ("use_mup", "--multi-latent-attention but with --mup-base-hidden-size",
     lambda args: args.multi_latent_attention and not args.mup_base_hidden_size),
)  # fmt: skip
"""Patterns of arguments, what disables them, and whether it is given."""


def changed(parser: argparse.ArgumentParser, args: Namespace) -> dict[str, str]:
    """The arguments whose value is not their default, and the flags that set them."""
    actions: dict[str, list[argparse.Action]] = {}
    for action in parser._actions:
        if action.option_strings:
            actions.setdefault(action.dest, []).append(action)
    found = {}
    for name, those in actions.items():
        value = getattr(args, name, None)
        if all(value != action.default for action in those):  # two flags of one argument may differ in it
            setting = next((action for action in those if action.const == value), those[0])
            is_off = isinstance(setting, argparse.BooleanOptionalAction) and not value
            long = [each for each in setting.option_strings if each.startswith("--")]
            found[name] = long[-1 if is_off else 0]
    return found


def refuse_unread(given: dict[str, str]) -> None:
    """Refuse flags that nothing reads; `given` is the result of `changed` for only the command line."""
    for name, flag in given.items():
        for patterns, way_out in _NOWHERE:
            if _matches(name, patterns.split()):
                raise UsageError(f"{flag}: megatron-core 0.19 does not read it in such a run; {way_out}")


def refuse_unaccompanied(given: dict[str, str], args: Namespace) -> None:
    """Refuse flags that change nothing because another flag is missing, or because another one is given.

    Args:
        given: as for `refuse_unread`.
        args: parsed, not yet validated by Megatron.
    """
    for name, flag in given.items():
        for patterns, needed, is_there in _NEEDS:
            if _matches(name, patterns.split()) and not is_there(args):
                raise UsageError(f"{flag}: changes nothing without {needed}; add that, or drop it")
        for patterns, other, is_there in _NOT_WITH:
            if _matches(name, patterns.split()) and is_there(args):
                raise UsageError(f"{flag}: changes nothing with {other}; drop it")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
