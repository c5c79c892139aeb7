"""Whether intervals, tests and ranks do on simulated answers what they promise."""

import numpy as np
import pytest
from numpy.typing import NDArray

from clients.analysis import analyse
from clients.evaluation import Cell, PlannedMask
from clients.task import Metric
from crane_serve.common.numbers.bootstrap import Estimate
from tests.fed import ACCURACY, NATS, Fed, fed_answers

ITEMS = 60
Values = NDArray[np.float64]


@pytest.fixture
def only_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer resamples and next to no permutations: quicker, and a little less exact."""
    monkeypatch.setattr("crane_serve.common.numbers.bootstrap.RESAMPLES", 1000)
    monkeypatch.setattr("clients.analysis.permutations.PERMUTATIONS", 1)


@pytest.fixture
def only_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crane_serve.common.numbers.bootstrap.RESAMPLES", 10)
    monkeypatch.setattr("clients.analysis.permutations.PERMUTATIONS", 999)


def cells(unmasked: Values, masked: list[Values], metric: Metric = NATS, seed: int = 0) -> list[Cell]:
    """One cell for each of `masked` [items, 2], all against the same `unmasked` [items, 2]."""
    names = [f"m{place:03}" for place in range(len(masked))]
    values: Fed = {("en", "none"): unmasked, **{("en", name): rows for name, rows in zip(names, masked, strict=True)}}
    masks = {name: PlannedMask(name=name) for name in ("none", *names)}
    return list(analyse(fed_answers(values, metric), masks, seed=seed).cells[1:])


def covers(estimate: Estimate | None, truth: float) -> bool:
    assert estimate is not None
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= truth <= estimate.high


def ratio_rows(generator: np.random.Generator, loss: float, document: Values) -> Values:
    """Documents of varying length whose nats per token are `loss` and their own part, plus noise."""
    tokens = generator.integers(20, 120, ITEMS).astype(float)
    return np.stack([tokens * (loss + document + generator.normal(0, 0.4, ITEMS)), tokens], axis=1)


@pytest.mark.usefixtures("only_intervals")
def test_intervals_of_ratios_cover_the_truth() -> None:
    generator = np.random.default_rng(10)
    level = change = 0
    trials = 400
    for trial in range(trials):
        document = generator.normal(0, 1, ITEMS)
        unmasked = ratio_rows(generator, 3.0, document)
        masked = ratio_rows(generator, 3.2, document)  # of other lengths than unmasked, as generated texts are
        (cell,) = cells(unmasked, [masked], seed=trial)
        level += covers(cell.level, 3.2)
        change += covers(cell.change, 0.2)
    assert 0.91 < level / trials < 0.98
    assert 0.91 < change / trials < 0.98


@pytest.mark.usefixtures("only_intervals")
def test_intervals_of_accuracy_cover_the_truth() -> None:
    generator = np.random.default_rng(11)
    level = change = relative = 0
    trials = 400
    for trial in range(trials):
        right = generator.random(ITEMS) < 0.7
        kept = right & (generator.random(ITEMS) < 0.75)
        unmasked, masked = (np.stack([of.astype(float), np.ones(ITEMS)], axis=1) for of in (right, kept))
        (cell,) = cells(unmasked, [masked], ACCURACY, seed=trial)
        level += covers(cell.level, 0.7 * 0.75)
        change += covers(cell.change, -0.7 * 0.25)
        relative += covers(cell.relative, -0.25)
    for covered in (level, change, relative):
        assert 0.91 < covered / trials < 0.98


@pytest.mark.usefixtures("only_tests")
@pytest.mark.parametrize("weights_differ", [False, True])
def test_p_values_under_the_null_and_of_a_planted_effect(weights_differ: bool) -> None:
    """Twenty documents of varying length, which the second mask makes worse by as much as the noise."""
    generator = np.random.default_rng(12)
    null: list[float] = []
    planted: list[float] = []
    for trial in range(800):
        document = generator.normal(0, 1, 20)
        tokens = generator.integers(20, 120, (3, 20) if weights_differ else (1, 20)).astype(float)
        tokens = np.broadcast_to(tokens, (3, 20))
        rates = document + generator.normal(0, 0.4, (3, 20)) + np.array([3.0, 3.0, 3.4])[:, None]
        unmasked, same, worse = np.stack([rates * tokens, tokens], axis=2)
        first, second = cells(unmasked, [same, worse], seed=trial)
        assert first.p_value is not None
        assert second.p_value is not None
        null.append(first.p_value)
        planted.append(second.p_value)
    assert 0.03 < np.mean(np.array(null) < 0.05) < 0.075
    assert np.mean(np.array(null) < 0.5) == pytest.approx(0.5, abs=0.06)
    assert np.mean(np.array(planted) < 0.05) > (0.4 if weights_differ else 0.7)


@pytest.mark.usefixtures("only_tests")
def test_few_discoveries_are_false_and_planted_effects_are_found() -> None:
    generator = np.random.default_rng(13)
    shares, found = [], []
    planted = 20
    for trial in range(25):
        unmasked = np.stack([np.zeros(ITEMS), np.ones(ITEMS)], axis=1)
        shifts = np.where(np.arange(100) < planted, 0.5, 0.0)
        totals = generator.normal(shifts, 1.0, (ITEMS, 100))
        tested = cells(unmasked, [np.stack([of, np.ones(ITEMS)], axis=1) for of in totals.T], seed=trial)
        discovered = np.array([cell.q_value is not None and cell.q_value < 0.05 for cell in tested])
        shares.append(discovered[planted:].sum() / max(1, discovered.sum()))
        found.append(discovered[:planted].mean())
    assert 0.01 < np.mean(shares) < 0.06  # 5 % of the 80 % that are null: 4 %
    assert np.mean(found) > 0.75


@pytest.mark.usefixtures("only_intervals")
def test_intervals_of_effects_cover_the_truth() -> None:
    """Parallel texts: what an item costs extra, it costs in both languages."""
    generator = np.random.default_rng(14)
    masks = {"none": PlannedMask(name="none"), "en": PlannedMask(name="en", language="en")}
    selectivity = collateral = narrower = 0
    trials = 250
    for trial in range(trials):
        shared = generator.normal(0, 1, ITEMS)
        values: Fed = {(language, "none"): np.zeros(ITEMS) for language in ("en", "zh")}
        values = {
            **values,
            ("en", "en"): 2.0 + shared + generator.normal(0, 0.3, ITEMS),
            ("zh", "en"): 0.5 + shared + generator.normal(0, 0.3, ITEMS),
        }
        (effect,) = analyse(fed_answers(values), masks, seed=trial).effects
        selectivity += covers(effect.selectivity, 1.5)
        collateral += covers(effect.collateral, 0.25)
        assert effect.selectivity.high is not None
        assert effect.selectivity.low is not None
        assert effect.own.high is not None
        assert effect.own.low is not None
        narrower += effect.selectivity.high - effect.selectivity.low < effect.own.high - effect.own.low
    assert 0.91 < selectivity / trials < 0.98
    assert 0.91 < collateral / trials < 0.98
    assert narrower == trials  # unpaired resamples would make it wider
