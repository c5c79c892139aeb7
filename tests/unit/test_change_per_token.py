"""change_per_token: the ratio of sums, its pairing, and how often its intervals cover the truth."""

import numpy as np
import pytest

from crane_serve.common.numbers.bootstrap import change_per_token


def test_change_is_the_ratio_of_sums_and_pairs_documents() -> None:
    tokens = np.array([10.0, 30.0, 20.0, 40.0])
    baseline = np.array([30.0, 500.0, 10.0, 90.0])  # documents differ far more than masks do
    change = np.array([11.0, 29.0, 21.0, 39.0])
    estimate = change_per_token(baseline + change, baseline, tokens, seed=3)
    assert estimate.mean == pytest.approx(1.0)
    assert estimate.low is not None
    assert estimate.high is not None
    assert 0.9 < estimate.low < 1.0 < estimate.high < 1.15
    assert estimate == change_per_token(baseline + change, baseline, tokens, seed=3)


def test_an_interval_needs_two_documents_and_may_be_a_point() -> None:
    single = change_per_token(np.array([7.0]), np.array([5.0]), np.array([4.0]))
    assert (single.mean, single.low, single.high) == (0.5, None, None)
    alike = change_per_token(np.full(5, 7.0), np.full(5, 5.0), np.full(5, 4.0))
    assert (alike.mean, alike.low, alike.high) == (0.5, 0.5, 0.5)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    planted = 0.3
    covered = found = false_alarms = 0
    trials = 150
    for trial in range(trials):
        tokens = generator.integers(20, 120, size=40).astype(float)
        baseline = tokens * generator.normal(4.0, 1.0, size=40)
        noise = tokens * generator.normal(0.0, 0.4, size=40)
        effect = change_per_token(baseline + noise + planted * tokens, baseline, tokens, seed=trial)
        null = change_per_token(baseline + noise, baseline, tokens, seed=trial)
        assert effect.low is not None
        assert effect.high is not None
        assert null.low is not None
        assert null.high is not None
        covered += effect.low <= planted <= effect.high
        found += effect.low > 0
        false_alarms += not null.low <= 0 <= null.high
    assert covered / trials > 0.88
    assert found / trials > 0.9
    assert false_alarms / trials < 0.12


@pytest.mark.parametrize(
    ("nll", "tokens", "message"),
    [([1.0], [1.0, 2.0], "expected the same"), ([], [], "at least one document"), ([1.0], [0.0], "at least one token")],
)
def test_impossible_statistics(nll: list[float], tokens: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change_per_token(np.array(nll), np.array(nll), np.array(tokens))
