"""The reason for each patch: the installed Megatron, unpatched, still has the defect or lacks the hook.

A test that fails here says that the installed release no longer needs a patch (or needs another one): delete the patch.
"""

import inspect
import logging
import os
import re
from argparse import Namespace
from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path
from queue import Empty
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_meap.backend import cpu, device, megatron_patches

device.prepare()

from megatron.core import dist_checkpointing, parallel_state, tensor_parallel  # noqa: E402
from megatron.core.datasets import utils as dataset_utils  # noqa: E402
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # noqa: E402
from megatron.core.datasets.indexed_dataset import IndexedDataset  # noqa: E402
from megatron.core.datasets.utils import Split  # noqa: E402
from megatron.core.dist_checkpointing import serialization, validation  # noqa: E402
from megatron.core.dist_checkpointing.core import CheckpointingException  # noqa: E402
from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async  # noqa: E402
from megatron.core.models.common.embeddings import rope_utils  # noqa: E402
from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.tensor_parallel import layers  # noqa: E402
from megatron.core.transformer.moe import token_dispatcher  # noqa: E402
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig  # noqa: E402
from megatron.core.utils import local_multi_tensor_l2_norm  # noqa: E402
from megatron.training import initialize, pretrain, training  # noqa: E402
from megatron.training.argument_utils import ArgumentGroupFactory  # noqa: E402

from megatron_meap.backend import helpers, kernels, left_out  # noqa: E402
from megatron_meap.backend.loss_patches import over_steps_that_have_it  # noqa: E402
from megatron_meap.backend.patching import original_of, replace  # noqa: E402


class Reader:
    """Unpickles as the id of the process that reads it."""

    def __reduce__(self) -> tuple:
        return os.getpid, ()


def test_results_of_a_save_are_read_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself a process of `multiprocessing` keeps them, and imports PyTorch, in which they are written, for that."""
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    queue = original_of(filesystem_async, "get_write_results_queue")()
    try:
        queue.put(Reader())
        assert queue.get_nowait() == queue._manager._process.pid
        helpers.say_results_in_bytes()
        ours = filesystem_async.get_write_results_queue()
        ours.put(Reader())
        assert ours.get_nowait() == os.getpid()
        with pytest.raises(Empty):  # as Megatron expects where nothing was written
            ours.get_nowait()
    finally:
        queue._manager.shutdown()


def test_the_dataset_helpers_are_compiled_in_a_package_without_a_makefile() -> None:
    with pytest.raises(SystemExit):
        original_of(dataset_utils, "compile_helpers")()


def test_a_parser_reads_sources_for_a_help_that_nobody_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "getsource", lambda kind: pytest.fail("read"))
    with pytest.raises(pytest.fail.Exception):
        original_of(ArgumentGroupFactory, "_get_field_docstrings")(None, MLATransformerConfig)


def test_a_checkpoint_without_hashes_is_refused_and_only_the_verified_one_is_not(tmp_path: Path) -> None:
    with pytest.raises(CheckpointingException):
        original_of(serialization, "verify_integrity_manifest")(str(tmp_path / "a"))
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    megatron_patches.verified(str(tmp_path / "link"))
    megatron_patches.verified(str(tmp_path / "c"))
    serialization.verify_integrity_manifest(str(tmp_path / "a"))
    with pytest.raises(CheckpointingException):
        serialization.verify_integrity_manifest(str(tmp_path / "b"))


def test_the_state_of_a_fresh_distributed_optimizer_cannot_be_asked_for() -> None:
    fresh = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(AssertionError):
        original_of(DistributedOptimizer, "state_dict")(SimpleNamespace(optimizer=fresh))


def test_weights_that_a_checkpoint_lacks_are_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        original_of(validation, "maybe_report_missing_and_unexpected_keys")(set(), {"a.weight"}, raise_error=False)
    assert "a.weight" in caplog.text


def test_no_flag_decays_all_parameters() -> None:
    _, overrides = original_of(training, "get_megatron_optimizer_config")(Namespace(lr=1e-3, optimizer="adam"))
    assert any(override.get("wd_mult") == 0.0 for override in overrides.values())
    decays = {each.name for each in fields(OptimizerConfig) if "decay" in each.name or "wd" in each.name}
    assert decays == {"weight_decay", "decoupled_weight_decay", "apply_wd_to_qk_layernorm"}


def test_a_layer_refuses_fused_weight_gradients_without_apex(one_rank: None) -> None:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        gradient_accumulation_fusion=True,
        use_cpu_initialization=True,
    )

    def build(initialise: Callable) -> None:
        layer = layers.ColumnParallelLinear.__new__(layers.ColumnParallelLinear)
        initialise(layer, 8, 8, config=config, init_method=torch.nn.init.zeros_, skip_bias_add=False)

    with pytest.raises(RuntimeError, match="gradient_accumulation_fusion"):
        build(original_of(layers.ColumnParallelLinear, "__init__"))
    megatron_patches.apply()
    build(layers.ColumnParallelLinear.__init__)


def test_evaluation_counts_stay_none_where_there_is_no_data() -> None:
    source = inspect.getsource(training.evaluate_and_print_results)
    assert "torch.tensor(args.eval_iters" in source  # of a list that may hold None
    assert "or 0" not in inspect.getsource(original_of(training, "build_train_valid_test_data_iterators"))


def test_data_caches_are_built_by_rank_0_alone(corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = SimpleNamespace(unique_identifiers={"a": "b"}, eod=0, vocab_size=512)
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=64, split="1,0,0", path_to_cache=str(tmp_path), reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, tokenizer=tokenizer,
    )  # fmt: skip

    def build() -> GPTDataset:
        data = IndexedDataset(corpus.prefix)
        return GPTDataset(data, corpus.prefix, np.arange(len(data)), 10, Split.train, config)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 1)
    with pytest.raises(FileNotFoundError):
        build()
    with megatron_patches.outside_the_job():
        assert len(build()) >= 10
    assert torch.distributed.is_initialized()


def test_rank_0_alone_hashes_what_all_ranks_saved() -> None:
    source = " ".join(inspect.getsource(original_of(dist_checkpointing, "save")).split())
    assert "if torch.distributed.get_rank() == 0: save_integrity_manifest(checkpoint_dir)" in source


def test_the_trainer_has_no_hook_after_a_step_or_a_save() -> None:
    """Whatever `pretrain` takes that is not in this list may be one."""
    assert set(inspect.signature(pretrain).parameters) == {
        "cfg_container",
        "train_valid_test_dataset_provider",
        "model_type",
        "forward_step_func",
        "model_provider",
        "process_non_loss_data_func",
        "get_embedding_ranks",
        "get_position_embedding_ranks",
        "non_loss_data_func",  # within evaluations alone
        "store",
        "inprocess_call_wrapper",
        "p2p_communicator",
        "pg_collection",
        "skip_model_parallel_init",
    }
    assert "non_loss_data_func" in inspect.getsource(training.evaluate)


@pytest.mark.parametrize("data", [None, [iter(range(9)), None]], ids=["a stage without data", "virtual stages"])
def test_a_step_that_is_left_out_reads_where_there_is_no_data(one_rank: None, data: Any, monkeypatch) -> None:
    """And Megatron's own passes by what follows a step; ours reads each part of the data once a micro batch."""
    machine = SimpleNamespace(should_run_forward_backward=lambda data: next(asked))
    for place in ("megatron.training.training", "megatron.core.rerun_state_machine"):
        monkeypatch.setattr(f"{place}.get_rerun_state_machine", lambda: machine)
    for place in ("megatron.training.training", "megatron.core.num_microbatches_calculator"):
        monkeypatch.setattr(f"{place}.get_num_microbatches", lambda: 2)
    monkeypatch.setattr(training, "get_args", lambda: SimpleNamespace(hybrid_context_parallel=False))
    asked = iter([True, False])
    with pytest.raises(TypeError):
        training.dummy_train_step(data)
    assert "dummy_train_step(train_data_iterator)" in (source := inspect.getsource(training.train))
    assert "checkpoint" not in source.partition("dummy_train_step(")[2].partition("continue")[0]
    monkeypatch.setattr(training, "train_step", lambda *args, **kwargs: "trained")
    left_out.leave_out({5})
    asked = iter([True, False])
    assert training.train_step(None, data, iteration=4)[:2] == ({}, 0)
    assert training.train_step(None, data, iteration=5) == "trained"
    assert data is None or next(data[0]) == 2


# What a CPU alone needs.


def test_routing_wants_arrays_that_a_cpu_tensor_does_not_become() -> None:
    assert torch.is_tensor(original_of(token_dispatcher, "maybe_move_tensor_to_cpu")(torch.ones(2), as_numpy=True))


def test_warming_up_draws_from_the_generator_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"ffn_hidden_size": 8, "hidden_size": 8, "seq_length": 4, "micro_batch_size": 1}
    alone = {"tensor_model_parallel_size": 1, "context_parallel_size": 1, "sequence_parallel": False}
    args = Namespace(bf16=False, fp16=False, swiglu=True, **sizes, **alone)
    monkeypatch.setattr(initialize, "get_args", lambda: args)
    before = torch.get_rng_state()
    original_of(initialize, "_warmup_jit_function")()
    assert not torch.equal(before, torch.get_rng_state())


def test_the_process_that_saves_in_the_background_asks_for_a_gpu() -> None:
    """It starts anew, and the CPU has taken the GPU's place in this process alone."""
    assert cpu._checkpoint_worker.__module__ == "megatron_meap.backend.cpu"
    assert "torch.cuda.set_device(rank % torch.cuda.device_count())" in inspect.getsource(async_utils)


def test_the_process_that_saves_in_the_background_is_handed_the_tensors_themselves() -> None:
    """`checkpoint.copies` hands it copies."""
    tensor = torch.ones(3)
    buckets = [("path", "name", ([], [("item", tensor)]))]
    [(_, _, (_, [(_, handed)]))] = filesystem_async.FileSystemWriterAsync.preload_tensors(buckets)
    assert handed.data_ptr() == tensor.data_ptr()


class Operations(TorchDispatchMode):
    """Notes the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.append(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


def operations(function: Callable[[], Any]) -> list[str]:
    with Operations() as noted:
        function()
    return noted.names


def test_rotation_computes_cosines_and_sines_in_every_layer() -> None:
    queries, angles = torch.randn(64, 2, 4, 16), torch.randn(64, 1, 1, 16)
    megatrons = original_of(rope_utils, "_apply_rotary_pos_emb_bshd")
    again = operations(lambda: [megatrons(queries, angles) for _ in range(2)])
    assert again.count("cos") == again.count("sin") == 2


def test_cross_entropy_passes_over_the_logits_more_often(one_rank: None) -> None:
    logits, target = torch.randn(8, 2, 500), torch.randint(500, (8, 2))
    group = parallel_state.get_tensor_model_parallel_group()
    megatrons = original_of(tensor_parallel, "vocab_parallel_cross_entropy")
    ours = operations(lambda: kernels.cross_entropy(logits.clone(), target, group))
    assert len(operations(lambda: megatrons(logits.clone(), target, tp_group=group))) > len(ours)


def test_linear_layers_do_not_add_their_gradients_to_megatrons_buffer(one_rank: None) -> None:
    weight = torch.randn(5, 4, requires_grad=True)
    weight.main_grad = torch.zeros(5, 4)
    megatrons = original_of(layers, "linear_with_grad_accumulation_and_async_allreduce")
    group = parallel_state.get_tensor_model_parallel_group()
    megatrons(torch.randn(3, 4), weight, None, False, False, False, tp_group=group).sum().backward()
    assert weight.main_grad.abs().max() == 0


def test_adamw_is_not_fused_on_a_cpu_and_norms_are_taken_one_by_one() -> None:
    pytorchs = next(each for each in torch.optim.AdamW.__mro__ if each.__module__.startswith("torch."))
    assert not pytorchs([torch.nn.Parameter(torch.ones(2))]).param_groups[0]["fused"]
    gradients = [torch.randn(3) for _ in range(20)]
    assert len(operations(lambda: local_multi_tensor_l2_norm(0, None, [gradients], False))) >= 20


def test_a_loss_over_no_token_in_one_step_is_not_logged_for_its_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    class Flags:
        micro_batch_size = data_parallel_size = gtp_weight_remat_size = world_size = 1
        consumed_train_samples = skipped_train_samples = 0
        log_interval = train_iters = 4
        num_experts = mtp_num_layers = dsa_indexer_loss_coeff = log_memory_interval = None

        def __getattr__(self, name: str) -> bool:
            return False

    said: list[str] = []
    unused = {"get_tensorboard_writer", "get_wandb_writer", "get_one_logger", "get_energy_monitor"}
    timers = mock.MagicMock()
    timers.return_value.elapsed.return_value = 1.0
    answers = {
        "get_args": Flags, "get_num_microbatches": lambda: 1, "get_timers": lambda: timers,
        "num_floating_point_operations": lambda *_, **__: 1, "print_rank_last": said.append,
        "reduce_max_stat_across_model_parallel_group": lambda value, group: value,
    }  # fmt: skip
    for name, answer in (answers | dict.fromkeys(unused, lambda: None)).items():
        monkeypatch.setattr(training, name, answer)
    monkeypatch.setattr(training, "one_logger_utils", mock.MagicMock())
    monkeypatch.setattr(training, "report_memory", lambda _: None)

    def logged(
        log: Callable, values: list[list[float]], skipped: Collection[int] = (), begins: int | None = None
    ) -> list[dict[str, str]]:
        totals: dict[str, Any] = {}
        for step, (whole, part) in enumerate(values, 1):
            losses = {"lm loss": torch.tensor(whole), "part": torch.tensor(part)}
            first = {"is_first_iteration": step == begins}
            log(losses, totals, 1e-3, step, 1.0, False, int(step in skipped), 1.0, None, None, None, **first)
        lines, said[:] = list(said), []
        return [dict(re.findall(r" (lm loss|part): (\S+) \|", line)) for line in lines]

    none = float("nan")
    values = [[1.0, 1.0], [2.0, none], [3.0, 3.0], [4.0, 5.0]]
    assert logged(original_of(training, "training_log"), values) == [{"lm loss": "2.500000E+00"}]
    begun = logged(original_of(training, "training_log"), [*values, *([9.0, 9.0] for _ in values)], begins=4)
    assert begun[1]["lm loss"] == "5.750000E+00"  # of all eight
    zeros = {"lm loss": "0.000000E+00", "part": "0.000000E+00"}
    assert logged(original_of(training, "training_log"), values * 2, skipped=range(5, 9))[1] == zeros
    whole = {"lm loss": "2.500000E+00"}
    replace(training, "training_log", over_steps_that_have_it)  # as `around_log` does
    assert logged(training.training_log, values) == [whole | {"part": "3.000000E+00"}]
    assert logged(training.training_log, values[1:2] * 4 + values) == [
        {"lm loss": "2.000000E+00"}, whole | {"part": "3.000000E+00"},
    ]  # fmt: skip
    assert logged(training.training_log, values * 2, skipped=range(5, 9))[1] == {}
    both = {begins: logged(training.training_log, values * 2, begins=begins) for begins in (3, 4)}
    assert [line["lm loss"] for line in both[3]] == ["2.000000E+00", "2.500000E+00", "2.500000E+00"]
    assert [line["lm loss"] for line in both[4]] == ["2.500000E+00", "2.500000E+00"]
    bad = [[none, none], *values[1:]]
    assert logged(training.training_log, bad) == [{"part": "4.000000E+00"}]
