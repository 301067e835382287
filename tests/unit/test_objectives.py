"""Every kind of input noise follows its rule: counts, distributions, what is never changed or drawn."""

import hashlib
import itertools
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from megatron_meap.errors import UsageError
from megatron_meap.meap import positions as strategies
from megatron_meap.meap.dataset import COPY, NOISED, MaskedInputDataset, noise_of
from megatron_meap.meap.losses import next_token_loss
from megatron_meap.meap.masking import Masking, RatioSchedule, Replacement
from megatron_meap.meap.positions import ALL
from megatron_meap.meap.settings import MaskSettings
from megatron_meap.meap.streams import Stream
from megatron_meap.meap.weights import read_weights
from megatron_meap.trainer.record import Verdict, differences

VOCABULARY, MASK, SPECIAL = 50, 50, (0, 1, 2)
ORDINARY = np.setdiff1d(np.arange(VOCABULARY), SPECIAL)
UNLIKELY = 1e-4
"""Of a true hypothesis to be rejected: the draws are fixed, so a test that passes once passes always."""


class Source:
    """Samples of random tokens, special ones among them, and a loss mask with holes."""

    def __init__(self, samples: int, length: int) -> None:
        self.samples, self.length = samples, length

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int | None) -> dict[str, torch.Tensor]:
        generator = np.random.RandomState(0 if index is None else index)
        text = torch.from_numpy(generator.randint(0, VOCABULARY, self.length + 1))
        loss_mask = torch.from_numpy((generator.rand(self.length) < 0.9).astype(np.float32))
        return {"tokens": text[:-1], "labels": text[1:], "loss_mask": loss_mask}


def settings(**given) -> MaskSettings:
    made = MaskSettings(**({"mask_ratio": 0.15, "mask_seed": 7} | given))
    made.check()
    return made


def dataset(samples: int = 600, length: int = 200, **given) -> MaskedInputDataset:
    chosen = settings(**given)
    masking = chosen.masking("train", samples, 4, VOCABULARY, (*SPECIAL, MASK))
    return MaskedInputDataset(
        Source(samples, length), masking, split=None, mask_token_id=MASK, vocab_size=VOCABULARY,
        protected_ids=SPECIAL, copy_weight=chosen.copy_weight,
    )  # fmt: skip


def noised(made: MaskedInputDataset) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Clean tokens, noised tokens and where they differ, of the samples that are not clean ones beside a copy."""
    for index in range(made.copy_weight is not None, len(made), 1 if made.copy_weight is None else 2):
        clean, sample = made.clean(index)["tokens"].numpy(), made[index]
        tokens = sample["tokens"].numpy()
        assert ((noise_of(sample, MASK).numpy() & NOISED > 0) == (clean != tokens)).all()
        yield clean, tokens, clean != tokens


def fits(observed, expected) -> None:
    """Chi-square test: the counts are as expected."""
    observed = np.asarray(observed, float)
    expected = np.broadcast_to(np.asarray(expected, float), observed.shape)
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > UNLIKELY


@given(
    strategy=st.sampled_from(sorted(set(ALL) - {"weighted"})),
    ratio=st.floats(0.01, 0.95),
    lowest=st.one_of(st.none(), st.floats(0, 1)),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    noised_share=st.floats(0.01, 1),
    length=st.integers(2, 300),
    index=st.integers(0, 2**40),
)
def test_specials_are_neither_touched_nor_drawn(strategy, ratio, lowest, shares, noised_share, length, index) -> None:
    generator = np.random.RandomState(index % 1000)
    tokens = generator.randint(0, VOCABULARY, length)
    masking = Masking(
        RatioSchedule(ratio, lowest=None if lowest is None else lowest * ratio), strategy, noised_share=noised_share,
        replacement=Replacement(shares[0], shares[1] * (1 - shares[0]), ORDINARY),
    )  # fmt: skip
    protected = np.isin(tokens, SPECIAL)
    positions, ids = masking.noise(index, tokens, MASK, protected)
    assert len(set(positions.tolist())) == len(positions)
    assert not protected[positions].any()
    ids = np.broadcast_to(ids, positions.shape)
    assert np.isin(ids, [*ORDINARY, MASK]).all()
    again, same = masking.noise(index, tokens, MASK, protected)  # no state is kept
    assert positions.tolist() == again.tolist()
    assert ids.tolist() == np.broadcast_to(same, positions.shape).tolist()


def test_replacement_is_uniform_over_the_other_ordinary_tokens() -> None:
    """arXiv 2606.16246: a few percent of the inputs become another token."""
    drawn, replaced = np.zeros((VOCABULARY, VOCABULARY)), []
    for clean, tokens, changed in noised(dataset(mask_ratio=0.3, random_share=1.0)):
        np.add.at(drawn, (clean[changed], tokens[changed]), 1)
        replaced.append(int(changed.sum()))
    assert set(replaced) == {60}  # exactly, so none became what it was
    table = drawn[np.ix_(ORDINARY, ORDINARY)]
    assert table.sum() == drawn.sum()
    assert np.trace(table) == 0
    fits(table[~np.eye(len(ORDINARY), dtype=bool)], 1)


def test_a_special_token_that_is_not_protected_may_become_any_ordinary_one() -> None:
    replacement = Replacement(1.0, 0.0, ORDINARY)
    tokens = np.array([0] * 20000 + [VOCABULARY + 7] * 20000)
    ids = replacement(Stream(1, "train", 0), tokens, np.arange(40000), MASK)
    for part in (ids[:20000], ids[20000:]):
        fits(np.bincount(part, minlength=VOCABULARY)[ORDINARY], 1)


def test_the_mixture_has_its_shares() -> None:
    """As in BERT: 80% of the chosen become the mask token, 10% a random one, and 10% stay."""
    made = dataset(random_share=0.1, kept_share=0.1)
    counts = np.zeros(3)
    for index, (_, tokens, changed) in enumerate(noised(made)):
        masks = int((tokens == MASK).sum())
        counts += masks, int(changed.sum()) - masks, 30 - int(changed.sum())
        chosen = made.masking.positions(index, 200, np.isin(made.clean(index)["tokens"].numpy(), SPECIAL))
        assert set(np.flatnonzero(changed)) <= set(chosen)
    fits(counts, [0.8, 0.1, 0.1])


def test_independent_positions() -> None:
    """Bernoulli: binomial counts, even over positions, neighbours independent."""
    made = Masking(RatioSchedule(0.2), "bernoulli")
    masks = np.zeros((4000, 64), bool)
    for index in range(4000):
        masks[index, made.positions(index, 64)] = True
    fits(masks.sum(axis=0), 1)
    counts = np.bincount(masks.sum(axis=1), minlength=65)
    expected = 4000 * stats.binom(64, 0.2).pmf(np.arange(65))
    usual = expected > 8
    fits([*counts[usual], counts[~usual].sum()], [*expected[usual], expected[~usual].sum()])
    pairs = np.histogram2d(masks[:, :-1].ravel(), masks[:, 1:].ravel(), bins=2)[0]
    fits(pairs.ravel(), np.outer([0.8, 0.2], [0.8, 0.2]).ravel())


def test_mir() -> None:
    """arXiv 2606.06888: loss(clean) + 0.4 loss(copy); the copy's ratio uniform in [0, 0.5], positions independent."""
    made = dataset(length=2000, mask_ratio=0.5, mask_ratio_min=0.0, mask_strategy="bernoulli", copy_weight=0.4)
    assert len(made) == 1200
    shares = []
    for index, (clean, tokens, changed) in enumerate(noised(made)):
        first, copy, source = made[2 * index], made[2 * index + 1], Source(600, 2000)[index]
        for key in source:
            assert torch.equal(first[key], source[key])
        assert torch.equal(copy["labels"], source["labels"])
        assert torch.equal(copy["loss_mask"], source["loss_mask"] * 0.4)
        assert not first["noise"].any()
        assert (copy["noise"] & COPY).bool().all()
        assert (tokens[changed] == MASK).all()
        shares.append(changed.sum() / (~np.isin(clean, SPECIAL)).sum())
    assert stats.kstest(shares, stats.uniform(0, 0.5).cdf).pvalue > UNLIKELY
    assert np.corrcoef(shares[:-1], shares[1:])[0, 1] == pytest.approx(0, abs=0.15)


def test_a_share_of_the_samples() -> None:
    made = dataset(samples=2000, noised_share=0.3)
    counts = [int(changed.sum()) for _, _, changed in noised(made)]
    assert set(counts) == {0, 30}
    assert stats.binomtest(counts.count(30), 2000, 0.3).pvalue > UNLIKELY


def test_weights_are_respected(tmp_path) -> None:
    """A token with twice the weight is noised twice as often, one with weight 0 never; the share is the ratio."""
    weights = np.random.RandomState(0).rand(VOCABULARY) * 3
    weights[[5, 6]] = 0
    np.save(tmp_path / "weights.npy", weights)
    made = dataset(mask_strategy="weighted", mask_weights=str(tmp_path / "weights.npy"))
    seen, chosen, expected = np.zeros(VOCABULARY), np.zeros(VOCABULARY), np.zeros(VOCABULARY)
    for clean, _, changed in noised(made):
        free = ~np.isin(clean, SPECIAL)
        np.add.at(chosen, clean[changed], 1)
        np.add.at(seen, clean[free], 1)
        np.add.at(expected, clean[free], 0.15 * weights[clean[free]] / weights[clean[free]].mean())
    assert chosen[[5, 6]].sum() == 0
    likely = expected > 0
    assert expected[likely].max() < seen[likely].max()
    spread = (chosen - expected)[likely] ** 2 / (expected * (1 - expected / np.maximum(seen, 1)))[likely]
    assert stats.chi2(likely.sum()).sf(spread.sum()) > UNLIKELY
    assert chosen.sum() == pytest.approx(0.15 * seen.sum(), rel=0.02)


def test_spans_of_geometric_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths before they are placed: of the given mean, geometric; the last one is cut to the exact number."""
    lengths: list[int] = []
    place = strategies._place

    def watched(ask, drawn):
        assert drawn.sum() == ask.number == 75
        lengths.extend(drawn[:-1].tolist())
        return place(ask, drawn)

    monkeypatch.setattr(strategies, "_place", watched)
    for index in range(1500):
        assert len(set(Masking(RatioSchedule(0.15), "geometric", span_length=3).positions(index, 500).tolist())) == 75
    counts = np.bincount(lengths, minlength=13)[1:13]
    # What ends the sample is left out, which costs long spans a little: compare the ratios of short ones.
    fits(counts[:5], (2 / 3) ** np.arange(5) * (1 - np.arange(5) / 60))
    assert np.mean(lengths) == pytest.approx(3, rel=0.05)
    one = Masking(RatioSchedule(0.15), "geometric", span_length=1).positions(0, 500)
    assert len(one) == 75


def test_the_sigmoid_rises_from_nothing_to_the_ratio() -> None:
    schedule = RatioSchedule(0.2, 1000, shape="sigmoid")
    values = [schedule.at(index) for index in range(1200)]
    assert all(a <= b for a, b in itertools.pairwise(values))
    assert values[499] == pytest.approx(0.1, abs=1e-3)
    assert values[0] < 1e-3 < values[150] < 0.02 < 0.18 < values[850]
    assert values[999:] == [pytest.approx(0.2)] * 201


def test_noise_never_changes() -> None:
    """A run resumed with a later version gets the same noise as without an interruption."""
    digest = hashlib.sha256()
    for strategy in ("geometric", "bernoulli"):
        for options in ({}, {"random_share": 1.0}, {"random_share": 0.1, "kept_share": 0.1}, {"copy_weight": 0.4}):
            for more in ({}, {"mask_ratio_min": 0.0, "noised_share": 0.5}):
                for _, tokens, _ in noised(dataset(samples=20, mask_strategy=strategy, **options, **more)):
                    digest.update(tokens.astype(np.int64).tobytes())
    assert digest.hexdigest() == "b7bb4e06c6ada9c285cb7eff0ea03007b13d92e4718689b6df44bb7dd3c82b73"


def test_the_gradient_with_copies_by_hand() -> None:
    """Micro batches of one sample, sums divided by the global batch's count, as Megatron divides them."""
    made, weight = dataset(samples=4, length=32, mask_strategy="bernoulli", mask_ratio=0.4, copy_weight=0.4), 0.4
    table = torch.nn.Parameter(torch.randn(VOCABULARY + 1, VOCABULARY, generator=torch.Generator().manual_seed(0)))

    def losses(sample) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(table[sample["tokens"]], sample["labels"], reduction="none")

    total, tokens, reports = 0.0, 0.0, []
    for index in range(8):
        sample = made[index]
        loss, count, report = next_token_loss(
            losses(sample)[None], sample["loss_mask"][None], (sample["noise"] & NOISED).bool()[None],
            copies=(sample["noise"] & COPY).bool()[None],
        )  # fmt: skip
        total, tokens = total + loss, tokens + count
        reports.append(report)
    (ours,) = torch.autograd.grad(total / tokens, table)
    clean = [(losses(made[index]), made[index]["loss_mask"]) for index in range(0, 8, 2)]
    copies = [(losses(made[index]), made[index - 1]["loss_mask"]) for index in range(1, 8, 2)]
    means = [sum((loss * mask).sum() for loss, mask in part) / sum(mask.sum() for _, mask in part)
             for part in (clean, copies)]  # fmt: skip
    (by_hand,) = torch.autograd.grad(means[0] + weight * means[1], table)
    assert torch.allclose(ours, by_hand, rtol=0, atol=1e-7)
    for name, expected in (("lm loss clean samples", means[0]), ("lm loss noised copies", means[1])):
        summed = sum(report[name] for report in reports)
        assert float((summed[0] / summed[1]).detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask_ratio_min": 0.2}, "--meap-mask-ratio-min 0.2: must lie between 0 and --meap-mask-ratio 0.15"),
        ({"random_share": 1.2}, "--meap-random-share 1.2: must lie"),
        ({"random_share": 0.6, "kept_share": 0.6}, "--meap-kept-share 0.6: must"),
        ({"noised_share": 0.0}, "--meap-noised-share 0.0: must"),
        ({"copy_weight": -1.0}, "--meap-copy-weight -1.0: must"),
        ({"copy_weight": 0.4, "mask_ratio": 0.0}, "--meap-copy-weight: with --meap-mask-ratio 0"),
        ({"mask_strategy": "weighted"}, "needs --meap-mask-weights"),
        ({"mask_weights": "x"}, "no other strategy takes them"),
        ({"mask_strategy": "official", "noised_share": 0.5}, "--meap-mask-strategy official"),
        ({"mask_warmup_shape": "sigmoid"}, "needs --meap-mask-warmup-samples"),
        ({"random_share": float("nan")}, "--meap-random-share nan"),
    ],
)
def test_what_no_run_can_have_is_refused(given, message) -> None:
    with pytest.raises(UsageError, match=message):
        settings(**given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n2\n", r"holds \(2,\) weights; the tokenizer has 3"),
        ("1\n-2\n3\n", "not negative"),
        ("0\n0\n0\n", "above 0"),
        ("1\nnan\n3\n", "finite"),
        ("one\n", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_bad_weights_are_refused(tmp_path, text, message) -> None:
    path = tmp_path / "weights.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_weights(path, 3)


def test_an_objective_sets_the_flags_that_are_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(*flags: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt_meap.py", *flags])
        parser = ArgumentParser(allow_abbrev=False)
        MaskSettings.add_arguments(parser.add_argument_group("MEAP"))
        return parser.parse_args()

    mir = parsed("--meap-objective", "mir")
    assert (mir.meap_mask_strategy, mir.meap_mask_ratio_min, mir.meap_mask_ratio, mir.meap_copy_weight) == (
        "bernoulli", 0.0, 0.5, 0.4,
    )  # fmt: skip
    own = parsed("--meap-mask-strategy", "random", "--meap-objective=mir", "--meap-copy-weight", "1")
    assert (own.meap_mask_strategy, own.meap_mask_ratio, own.meap_copy_weight) == ("random", 0.5, 1.0)
    plain = parsed()
    assert MaskSettings.of(plain) == MaskSettings.of(parsed("--meap-objective", "meap"))
    assert (plain.meap_mask_strategy, plain.meap_mask_ratio, plain.meap_copy_weight) == ("random", None, None)


@pytest.mark.parametrize("setting", ["mask_ratio_min", "random_share", "copy_weight", "noised_share"])
def test_a_checkpoint_from_before_a_flag_is_one_without_it(setting: str) -> None:
    """A run without copies is not silently resumed with them, however old its checkpoint is."""
    given = {f"meap_{name}": getattr(MaskSettings, name) for name in MaskSettings.__dataclass_fields__}
    old = SimpleNamespace(meap_record={"--meap-mask-ratio": 0.15})
    for value, refused in ((getattr(MaskSettings, setting), []), (0.125, [Verdict.REFUSED])):
        args = SimpleNamespace(**(given | {"meap_mask_ratio": 0.15, f"meap_{setting}": value}))
        args.meap_record = MaskSettings.deciding(args)
        found = [(verdict, said) for verdict, said in differences(old, args)]
        assert [verdict for verdict, _ in found] == refused
        assert all(MaskSettings.flag_of(setting) in said and "0.125 here" in said for _, said in found)
