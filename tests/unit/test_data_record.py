"""The record of a run's data: how often it is read."""

from argparse import Namespace

import pytest

from megatron_meap.trainer import data_record


@pytest.mark.parametrize("weights", [None, [0.7, 0.3]])
@pytest.mark.parametrize("samples", [40, 41, 95, 400])
def test_a_sample_and_its_copy_are_read_once(weights, samples, monkeypatch):
    """With copies a run reads what a run of half the samples reads without, and the record says so."""
    prefixes = ["a"] if weights is None else ["a", "b"]
    monkeypatch.setattr(data_record, "_tokens", lambda prefix, share: 500)

    def epochs(train_samples: int, copy_weight: float | None) -> list[str] | None:
        args = Namespace(
            train_samples=train_samples, seq_length=10, meap_copy_weight=copy_weight, mid_level_dataset_surplus=0.005,
            phase_transition_iterations=None, split=None, meap_data_stages=None,
        )  # fmt: skip
        return data_record._all_epochs(args, prefixes, weights)

    assert epochs(2 * samples, 0.4) == epochs(samples, None)
    assert epochs(2 * samples - 1, 0.4) == epochs(samples, None)
    assert epochs(800, None) != epochs(800, 0.4)
