import numpy as np
import pytest
from scipy.stats import bootstrap

from crane_serve.common.numbers.bootstrap import RESAMPLES, Estimate, change_per_token, estimate, resampled_sums


def test_sums_are_those_of_the_items_and_then_of_draws_of_as_many() -> None:
    values = np.array([[1.0, 1.0], [10.0, 1.0], [100.0, 1.0]])
    sums = resampled_sums(values)
    assert sums.shape == (1 + RESAMPLES, 2)
    assert sums[0].tolist() == [111.0, 3.0]
    assert (sums[:, 1] == 3).all()
    possible = {a + 10 * b + 100 * (3 - a - b) for a in range(4) for b in range(4 - a)}
    assert set(sums[1:, 0]) == possible  # all 10 multisets of three items appear, and nothing else
    assert np.mean(sums[1:, 0] == 111) == pytest.approx(6 / 27, abs=0.03)


def test_columns_and_calls_share_draws() -> None:
    values = np.random.default_rng(0).normal(size=(50, 3))
    sums = resampled_sums(values, seed=7)
    np.testing.assert_allclose(resampled_sums(values[:, 1:2], seed=7)[:, 0], sums[:, 1])
    assert not np.allclose(resampled_sums(values, seed=8)[1:], sums[1:])
    np.testing.assert_array_equal(resampled_sums(values, seed=7), sums)


def test_batches_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(20.0)[:, None]
    whole = resampled_sums(values)
    monkeypatch.setattr("crane_serve.common.numbers.bootstrap._BATCH_VALUES", 20 * 7)
    np.testing.assert_array_equal(resampled_sums(values), whole)


def test_numbers_of_items_that_differ_by_one_are_drawn_independently() -> None:
    first, second = (resampled_sums(np.eye(items))[1, :100] for items in (100, 101))  # how often each is drawn
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.3


def test_no_items() -> None:
    with pytest.raises(ValueError, match="at least one"):
        resampled_sums(np.empty((0, 2)))


def test_intervals_are_those_of_scipy() -> None:
    generator = np.random.default_rng(1)
    tokens = generator.integers(5, 200, 80).astype(float)
    change = tokens * generator.normal(0.2, 0.5, 80)
    ours = change_per_token(change, np.zeros(80), tokens)
    theirs = bootstrap(
        (change, tokens),
        lambda x, y, axis=-1: x.sum(axis=axis) / y.sum(axis=axis),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert ours.low is not None
    assert ours.high is not None
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.06 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.06 * width)


def test_estimate_leaves_out_resamples_without_the_figure() -> None:
    resampled = np.arange(41.0)  # 2.5 % of 40 steps is the second value
    for missing in ([], [np.nan] * 41):
        found = estimate(np.r_[5.0, resampled, missing])
        assert found is not None
        assert (found.mean, found.low, found.high) == pytest.approx((5.0, 1.0, 39.0))
    assert estimate(np.r_[5.0, resampled, [np.inf] * 42]) == Estimate(mean=5.0, low=None, high=None)
    assert estimate(np.r_[5.0, resampled, np.nan], least=1.0) == Estimate(mean=5.0, low=None, high=None)
    assert estimate(np.r_[np.nan, resampled]) is None
    assert estimate(np.r_[np.inf, resampled]) is None


def test_likelihoods_must_be_finite() -> None:
    with pytest.raises(ValueError, match="not finite"):
        change_per_token(np.array([np.nan, 1.0]), np.zeros(2), np.ones(2))
