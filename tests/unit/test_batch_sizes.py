"""Steps and batch sizes of a run: as Megatron counts them, and refused where a run would stop or count wrong."""

from argparse import Namespace
from pathlib import Path

import pytest
from megatron.core import num_microbatches_calculator as calculator
from megatron.training import training

from megatron_meap.checkpoint import latest
from megatron_meap.errors import UsageError
from megatron_meap.inspection.training_log import History, progress_line
from megatron_meap.meap.settings import masking_of
from megatron_meap.planning.memory import in_flight
from megatron_meap.trainer import batch_sizes, resume


def arguments(**changes) -> Namespace:
    """Validated, as Megatron leaves them."""
    fields = {
        "rank": 0, "world_size": 4, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1, "data_parallel_size": 4, "micro_batch_size": 2, "seq_length": 64,
        "global_batch_size": None, "step_batch_size_schedule": None,
        "decrease_batch_size_if_needed": False, "train_iters": None, "train_samples": None,
        "virtual_pipeline_model_parallel_size": None, "phase_transition_iterations": None,
        "override_ckpt_iteration": None, "iterations_to_skip": [],
    }  # fmt: skip
    return Namespace(**fields | changes)


@pytest.mark.parametrize(
    ("schedule", "samples"),
    [("0:8", 64), ("0:8 1K:16", 64), ("0:8 1K:16 4096:64", 1024), ("0:8,960:16,2K:24", 2456), ("0:16 1T:32", 160)],
)
def test_a_schedule_has_megatrons_steps(schedule: str, samples: int) -> None:
    args = arguments(step_batch_size_schedule=schedule, train_samples=samples)
    batch_sizes.settle(args)
    phases = batch_sizes.phases(args)
    ours = [(phase.batch_size, phase.micro_batches) for phase in phases for _ in range(phase.steps)]
    calculator.init_num_microbatches_calculator(1, None, None, 2, 4, False, schedule, 64)
    try:
        consumed, theirs = 0, []
        training.update_train_iters(args)
        for _ in range(args.train_iters):
            calculator.update_num_microbatches(consumed)
            theirs.append((calculator.get_current_global_batch_size(), calculator.get_num_microbatches()))
            consumed += theirs[-1][0]
    finally:
        calculator.destroy_num_microbatches_calculator()
    assert ours == theirs
    assert consumed == samples


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_batch_size_schedule": "0:8 1K:16", "train_iters": 4}, "needs --train-samples"),
        (
            {"step_batch_size_schedule": "0:8 1K:12", "train_samples": 40},
            "12 is not a multiple of --micro-batch-size 2 x 4",
        ),
        ({"step_batch_size_schedule": "0:16 1K:8", "train_samples": 40}, "from 16 to 8"),
        ({"step_batch_size_schedule": "8 1K:16", "train_samples": 40}, "Invalid schedule entry"),
        ({"step_batch_size_schedule": "1:8", "train_samples": 40}, None),  # 1 token is sample 0
        ({"step_batch_size_schedule": "64:8", "train_samples": 40}, "must have threshold 0"),
        ({"step_batch_size_schedule": "0:8 1K:16", "train_samples": 41}, "end at 32 and 48 samples"),
        (
            {"step_batch_size_schedule": "0:8", "train_samples": 40, "phase_transition_iterations": "1"},
            "contradicts --phase-transition-iterations",
        ),
        ({"phase_transition_iterations": "1", "train_iters": 4}, "needs --train-samples"),
        ({"step_batch_size_schedule": "0:8 1K:16", "train_samples": 48, "iterations_to_skip": [5]}, "has steps 1 to 4"),
        ({"train_samples": 48, "iterations_to_skip": [7]}, "--iterations-to-skip 7: the run has steps 1 to 6"),
        ({"train_iters": 6, "iterations_to_skip": [6, 0]}, "--iterations-to-skip 0: the run has steps 1 to 6"),
        ({"train_samples": 48, "iterations_to_skip": [6]}, None),
        ({"global_batch_size": 12}, "use 8 or 16"),
        ({"global_batch_size": 6}, "use 8,"),
        ({"global_batch_size": 6, "decrease_batch_size_if_needed": True}, "use 8,"),
    ],
)
def test_what_no_run_can_follow_is_refused(changes: dict, message: str | None) -> None:
    if message is None:
        return batch_sizes.settle(arguments(**changes))
    with pytest.raises(UsageError, match=message):
        batch_sizes.settle(arguments(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 4}, "^a step of 4 sequences: 1 micro batches .* multiple of 2 "),
        ({"step_batch_size_schedule": "0:8 1K:12", "train_samples": 40}, "^a step of 12 sequences: 3 "),
        ({"full_validation": True}, "^--full-validation: 1 "),
        ({"eval_iters": 1, "eval_global_batch_size": 8, "eval_micro_batch_size": 4}, "^an evaluation of 8 .*: 1 "),
        ({"microbatch_group_size_per_vp_stage": 5}, "^a step of 16 .* multiple of 5 "),
        ({"microbatch_group_size_per_vp_stage": 4}, None),
        ({"eval_iters": 1, "eval_global_batch_size": 8, "eval_micro_batch_size": 2}, None),
        ({"global_batch_size": 4, "virtual_pipeline_model_parallel_size": None}, None),
    ],
)
def test_interleaved_stages_are_filled(changes: dict, message: str | None) -> None:
    fields = {"virtual_pipeline_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "data_parallel_size": 2,
              "microbatch_group_size_per_vp_stage": None, "full_validation": False, "eval_iters": 0,
              "train_iters": 3, "global_batch_size": 16}  # fmt: skip
    args = arguments(**fields | changes)
    if message is None:
        return batch_sizes.check_interleaved(args)
    with pytest.raises(UsageError, match=message):
        batch_sizes.check_interleaved(args)


def test_phases_begin_within_the_run() -> None:
    batch_sizes.check_phases(arguments(global_batch_size=8, train_samples=24, phase_transition_iterations=[1, 2]))
    with pytest.raises(UsageError, match=r"^--phase-transition-iterations 3: the run has 3 steps; give 1 to 2"):
        batch_sizes.check_phases(arguments(global_batch_size=8, train_samples=24, phase_transition_iterations=[1, 3]))


def test_a_decreased_batch_is_the_batch_of_all(capsys: pytest.CaptureFixture) -> None:
    """Two steps of 8 instead of 12: the clean half is the second one."""
    args = arguments(global_batch_size=12, decrease_batch_size_if_needed=True, train_iters=2)
    batch_sizes.settle(args)
    assert "note: --global-batch-size 12:" in capsys.readouterr().out
    args.meap_mask_ratio, args.meap_mask_seed, args.meap_clean_final_share = 0.15, 1, 0.5
    masking = masking_of(args, "train")
    masked = [len(masking.positions(index, 64)) > 0 for index in range(16)]
    assert masked == [True] * 8 + [False] * 8


def test_the_clean_share_is_of_the_samples_that_steps_take() -> None:
    """20 samples are two steps of 8: the last 4 are never trained on."""
    args = arguments(global_batch_size=8, train_samples=20)
    args.meap_mask_ratio, args.meap_mask_seed, args.meap_clean_final_share = 0.15, 1, 0.5
    masking = masking_of(args, "train")
    assert [len(masking.positions(index, 64)) > 0 for index in range(16)] == [True] * 8 + [False] * 8


def test_micro_batches_in_flight_are_the_schedules() -> None:
    args = arguments(
        pipeline_model_parallel_size=4, data_parallel_size=1, step_batch_size_schedule="0:2 1K:16", train_samples=160,
        global_batch_size=2,
    )  # fmt: skip
    batch_sizes.settle(args)
    assert [in_flight(args, stage) for stage in range(4)] == [[4], [3], [2], [1]]


def test_the_time_left_follows_the_samples() -> None:
    """At step 8 of 11, 32 of 128 samples are left in two steps of 16: a second each."""
    history = History()
    history.add("  train_samples ....................... 128")
    line = (
        " [2026] iteration        8/      11 | consumed samples:       96 | elapsed time per iteration (ms): 1000.0 "
        "| global batch size:    16 | lm loss: 5.0E+00 |"
    )
    step = history.add(line)
    assert step is not None
    assert progress_line(history, step).endswith("ETA 0:00:02")


@pytest.mark.parametrize(("iteration", "is_said"), [(9, False), (10, True), (12, True)])
def test_a_run_that_has_all_its_steps_says_so(iteration: int, is_said: bool) -> None:
    for size in ({"train_iters": 10}, {"train_samples": 160}):
        args = arguments(global_batch_size=16, finetune=False, skip_train=False, **size)
        said = resume.nothing_left(latest.Choice(iteration, Path("saved"), None), args)
        assert bool(said) == is_said
        args.override_ckpt_iteration = 3
        assert resume.nothing_left(latest.Choice(iteration, Path("saved"), None), args) == []
    assert (
        resume.nothing_left(latest.Choice(12, Path("saved"), None), Namespace(**vars(args) | {"finetune": True})) == []
    )


def test_a_place_in_the_data_is_counted_in_steps_of_one_size() -> None:
    args = arguments(global_batch_size=16, train_samples=160, override_ckpt_iteration=3)
    resume._refuse_another_place_in_the_data(Path("saved"), Namespace(global_batch_size=16), args)
    for there, here in ((None, "0:16 4K:32"), ("0:8 4K:16", None)):
        args.step_batch_size_schedule = here
        saved = Namespace(global_batch_size=16, step_batch_size_schedule=there)
        with pytest.raises(UsageError, match=r"--override-ckpt-iteration 3: .* --step-batch-size-schedule"):
            resume._refuse_another_place_in_the_data(Path("saved"), saved, args)
