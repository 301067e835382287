"""Numbers outside their range are refused before Megatron divides by them or builds a model with them."""

import pytest

from megatron_meap.errors import UsageError
from megatron_meap.trainer import arguments
from tests.launch import MODEL, TRAINING
from tests.unit.test_planning_sizes import checked


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--log-memory-interval", "0 -1"),
        ("--save-interval", "0"),
        ("--micro-batch-size", "0 -2"),
        ("--tensor-model-parallel-size", "0"),
        ("--hidden-size", "0 -64"),
        ("--num-query-groups", "-1"),
        ("--moe-router-topk", "0"),
        ("--moe-input-jitter-eps", "0 1"),
        ("--clip-grad", "-1 nan"),
        ("--lr", "inf"),
        ("--adam-beta2", "1 -0.1"),
        ("--attention-dropout", "-1 1 7"),
        ("--init-method-std", "-0.1"),
    ],
)
def test_a_number_that_no_run_can_use(flag: str, values: str) -> None:
    partner = ["--num-experts", "4"] if flag.startswith("--moe") else []
    for value in values.split():
        with pytest.raises(UsageError, match=f"^{flag} {value}.*: must be"):
            arguments.parse_flags([*MODEL, *TRAINING, *partner, f"{flag}={value}"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--num-query-groups 3", "^--num-query-groups 3: does not divide the 4"),
        ("--kv-channels 7", "^--kv-channels .*7 rotary dimensions"),
        ("--rotary-percent 0.2", "^--rotary-percent 0.2: makes 3 rotary"),
        ("--rotary-percent 0", "^--rotary-percent 0.0: makes 0 rotary"),
    ],
)
def test_heads_that_cannot_be_made(flags: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        checked([*MODEL, *flags.split()])
