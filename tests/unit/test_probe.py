"""The retrieval probe's samples and its score."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_meap.errors import UsageError
from megatron_meap.trainer import probe
from megatron_meap.trainer.probe_task import ASKED, CHANCE, FEWEST_TOKENS, PAIRS, SAMPLES, SHORTEST, build, score


def alone(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """One rank holds the whole vocabulary."""
    return tensor


@pytest.mark.parametrize("seq_length", [SHORTEST, 64, 257])
def test_every_question_has_its_answer_once_in_the_haystack(seq_length: int) -> None:
    probe = build(seq_length, np.arange(3, 3 + FEWEST_TOKENS))
    assert probe.tokens.shape == (SAMPLES, seq_length)
    places = []
    for tokens, question, candidates, quarters in zip(
        probe.tokens, probe.question, probe.candidates, probe.quarter, strict=True
    ):
        haystack = tokens[: seq_length - 2 * ASKED]
        asked = np.flatnonzero(question >= 0)
        assert list(question[asked]) == list(range(ASKED))
        assert sorted(quarters) == [0, 1, 2, 3]
        for position, answers, quarter in zip(asked, candidates, quarters, strict=True):
            (key,) = np.flatnonzero(haystack == tokens[position])
            assert answers[0] == haystack[key + 1] == tokens[position + 1]
            assert quarter == key // (len(haystack) // PAIRS) // 4
            places.append(key // (len(haystack) // PAIRS))
            given = [int(tokens[earlier + 1]) for earlier in asked[asked < position]]
            assert not set(given) & set(answers.tolist())
            assert (answers == -1).sum() == len(given)
            assert all((haystack == value).sum() == 1 for value in answers[answers >= 0])
    assert np.array_equal(np.bincount(places), np.full(PAIRS, SAMPLES * ASKED // PAIRS))


def test_the_probe_is_always_the_same() -> None:
    assert np.array_equal(build(64, np.arange(200)).tokens, build(64, np.arange(200)).tokens)


def questions(probe_logits: torch.Tensor, seq_length: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [questions, v] and candidates [questions, PAIRS] of a whole probe, from logits [samples, s, v]."""
    probe = build(seq_length, np.arange(200))
    sample, position = torch.from_numpy(probe.question >= 0).nonzero(as_tuple=True)
    number = torch.from_numpy(probe.question)[sample, position]
    return probe_logits[sample, position], torch.from_numpy(probe.candidates)[sample, number]


def test_a_model_that_looks_up_scores_100() -> None:
    probe = build(64, np.arange(200))
    logits = torch.zeros(SAMPLES, 64, 200)
    for i, tokens in enumerate(probe.tokens):
        for position, token in enumerate(tokens[:-1]):
            earlier = np.flatnonzero(tokens[:position] == token)
            if len(earlier):
                logits[i, position, tokens[earlier[-1] + 1]] = 50.0
    likelihood, hit = score(*questions(logits), vocab_size=200, first=0, reduce=alone)
    assert hit.mean() == 1.0
    assert likelihood.mean() == pytest.approx(0.0, abs=1e-6)


def test_models_that_know_nothing_score_chance() -> None:
    _, undecided = score(*questions(torch.zeros(SAMPLES, 64, 200)), vocab_size=200, first=0, reduce=alone)
    assert undecided.mean() == pytest.approx(CHANCE)
    random = torch.Generator().manual_seed(1)
    rounds = [questions(torch.randn(SAMPLES, 64, 200, generator=random)) for _ in range(100)]
    hits = torch.cat([score(*each, vocab_size=200, first=0, reduce=alone)[1] for each in rounds])
    assert hits.mean() == pytest.approx(CHANCE, abs=4 * (CHANCE * (1 - CHANCE) / len(hits)) ** 0.5)


def test_padding_rows_are_no_tokens() -> None:
    logits, candidates = questions(torch.randn(SAMPLES, 64, 256, generator=torch.Generator().manual_seed(2)))
    likelihood, _ = score(logits, candidates, vocab_size=200, first=0, reduce=alone)
    expected = logits[:, :200].double().log_softmax(dim=1).gather(1, candidates[:, :1])[:, 0]
    assert likelihood.tolist() == pytest.approx(expected.tolist())


def test_the_progress_line_shows_the_probe(tmp_path: Path) -> None:
    from megatron_meap.inspection.training_log import progress_line, read_log

    log = tmp_path / "train.log"
    log.write_text(
        " [2026-01-01 00:00:00] iteration        6/       8 | lm loss: 5.650957E+00 |\n"
        " retrieval probe at iteration 6 | answer log-probability: -6.236445E+00 | accuracy: 57.81 % (chance 6.92 %) | "
        "by quarter of the context: 6.2 6.2 6.2 12.5 % | cost: 0.20 % of the training time since the last\n"
    )
    history = read_log(log)
    assert history.retrieval == {6: (57.81, 6.92)}
    assert "retrieval 58% (chance 7%)" in progress_line(history, history.steps[6])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meap_probe_interval": 0}, "--meap-probe-interval 0: must be at least 1"),
        ({"seq_length": 32}, "--meap-probe-interval 10: a probe has at least 40 tokens, more than --seq-length 32"),
        ({"hybrid_context_parallel": True}, "--meap-probe-interval 10: does not work with --hybrid-context-parallel"),
        (
            {"meap_tokenizer_vocab_size": 65},
            "--meap-probe-interval: needs 64 ordinary tokens, the tokenizer has only 61",
        ),
    ],
)
def test_bad_flags_are_one_line(changes: dict, message: str) -> None:
    args = {"meap_probe_interval": 10, "seq_length": 64, "hybrid_context_parallel": False}
    args |= {"meap_tokenizer_vocab_size": 68, "meap_mask_token_id": 3}

    def tokens(args: dict) -> int:
        probe.ProbeSettings.of(Namespace(**args)).check(Namespace(**args))
        return len(probe.ordinary_tokens(Namespace(**args), special=(0, 1, 2)))

    assert tokens(args) == 64
    with pytest.raises(UsageError, match=message):
        tokens(args | changes)
