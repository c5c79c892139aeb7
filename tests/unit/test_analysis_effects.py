import math

import numpy as np
import pytest

from clients.analysis import Findings, analyse
from clients.analysis.matched import crossing
from clients.evaluation import Effect, MethodRank, PlannedMask
from clients.task import Metric
from crane_serve.common.numbers.langspec import Form, langspec_f1, langspec_f1_of_arrays
from tests.fed import ACCURACY, NATS, Fed, fed_answers
from tests.unit.test_analysis_cells import finite, masks


def made_for(language: str, name: str = "m", method: str | None = "lape", budget: float | None = 0.01) -> PlannedMask:
    return PlannedMask(name=name, method=method, language=language, budget=budget)


def level(value: float, items: int = 4) -> np.ndarray:
    """Items with this mean that are not all alike."""
    return value + np.resize([-0.01, 0.01], items)


def effect_of(losses: dict[str, tuple[float, float]], metric: Metric = NATS, beta: float = 1.0) -> Effect | None:
    """losses: language -> level without and with a mask made for en."""
    values: Fed = {(lang, name): level(v[i]) for lang, v in losses.items() for i, name in enumerate(("none", "m"))}
    findings = analyse(fed_answers(values, metric), masks(made_for("en")), beta=beta)
    assert finite(findings)
    return findings.effects[0] if findings.effects else None


def test_an_effect_by_hand() -> None:
    found = effect_of({"en": (3.0, 5.0), "zh": (3.0, 3.5), "vi": (4.0, 4.1)})
    assert found is not None
    assert found.collateral is not None
    assert found.own.mean == pytest.approx(2.0)
    assert found.others.mean == pytest.approx(0.3)
    assert found.selectivity.mean == pytest.approx(1.7)
    assert found.index.mean == pytest.approx(1.7 / 2.3)
    assert found.collateral.mean == pytest.approx(0.15)
    # Items lose alike, so that every resample has the same.
    assert found.selectivity.low == pytest.approx(1.7)
    assert found.collateral.high == pytest.approx(0.15)


def test_damage_is_above_0_whatever_the_metric() -> None:
    found = effect_of({"en": (0.8, 0.5), "zh": (0.7, 0.75)}, ACCURACY)
    assert found is not None
    assert found.own.mean == pytest.approx(0.3)
    assert found.others.mean == pytest.approx(-0.05)
    assert found.index.mean == pytest.approx(1.0)
    assert found.collateral is not None
    assert found.collateral.mean == pytest.approx(-1 / 6)


@pytest.mark.parametrize("own", [3.0, 2.9])
def test_no_collateral_without_damage(own: float) -> None:
    found = effect_of({"en": (3.0, own), "zh": (3.0, 3.0)})
    assert found is not None
    assert found.collateral is None
    assert found.index.mean == pytest.approx(0.0 if own == 3.0 else -1.0)


def test_collateral_has_an_interval_only_where_the_own_damage_is_certain() -> None:
    # Own differences 9 and -1: a quarter of the resamples has none but the second.
    values: Fed = {("en", "none"): [0.0, 0], ("en", "m"): [9.0, -1], ("zh", "none"): [0.0, 0], ("zh", "m"): [1.0, 1]}
    (found,) = analyse(fed_answers(values), masks(made_for("en"))).effects
    assert found.collateral is not None
    assert (found.collateral.mean, found.collateral.low, found.collateral.high) == (0.25, None, None)
    assert (found.own.low, found.own.high) == (-1.0, 9.0)


def test_effects_need_their_own_language_and_another() -> None:
    assert effect_of({"en": (3.0, 5.0)}) is None
    assert effect_of({"zh": (3.0, 5.0), "vi": (3.0, 5.0)}) is None
    values: Fed = {("en", "none"): level(3), ("zh", "none"): level(3), ("vi", "none"): level(3)}
    values = {**values, ("en", "m"): level(4), ("zh", "m"): level(3.5), ("en", "zh,vi@0.5"): level(4)}
    expression = PlannedMask(name="zh,vi@0.5", neurons=5)
    (found,) = analyse(fed_answers(values), masks(made_for("en"), expression)).effects
    assert found.mask == "m"
    assert found.others.mean == pytest.approx(0.5)  # vi was not asked under it


def test_one_item_in_a_language_leaves_effects_without_intervals() -> None:
    values: Fed = {("en", "none"): [1.0], ("en", "m"): [2.0], ("zh", "none"): level(3), ("zh", "m"): level(3.5)}
    values = {**values, ("en", "n"): [1.5], ("zh", "n"): level(3.5)}
    findings = analyse(fed_answers(values), masks(made_for("en"), made_for("en", "n", "plnd")))
    found = findings.effects[0]
    for estimate in (found.own, found.selectivity, found.index, found.collateral, found.f1[Form.ABSOLUTE]):
        assert estimate is not None
        assert (estimate.low, estimate.high) == (None, None)
    assert found.others.low is not None
    assert {(rank.rank.low, rank.rank.high) for rank in findings.ranks} == {(None, None)}
    assert finite(findings)


def test_langspec_on_paper() -> None:
    # Scores en .8 -> .4, zh .5 -> .4, vi .4 -> .5. vi gains, which counts as 0.
    # Absolute: drops .4, .1, 0; others .05; P = .4 / .45 = 8/9; R = .4 / .8 = 1/2.
    #   beta 1: 2 * 8/9 * 1/2 / (8/9 + 1/2) = (8/9) / (25/18) = 16/25.
    #   beta 2: 5 * 4/9 / (8/9 + 2) = (20/9) / (26/9) = 10/13.
    # Relative: drops .5, .2, 0; others .1; P = .5 / .6 = 5/6; R = 1/2.
    #   beta 1: 2 * 5/12 / (5/6 + 1/2) = (5/6) / (4/3) = 5/8.
    #   beta 2: 5 * 5/12 / (5/6 + 2) = (25/12) / (17/6) = 25/34.
    expected = {
        (Form.ABSOLUTE, 1.0): 16 / 25,
        (Form.ABSOLUTE, 2.0): 10 / 13,
        (Form.RELATIVE, 1.0): 5 / 8,
        (Form.RELATIVE, 2.0): 25 / 34,
    }
    baseline, masked = {"zh": 0.5, "en": 0.8, "vi": 0.4}, {"zh": 0.4, "en": 0.4, "vi": 0.5}
    for (form, beta), f1 in expected.items():
        assert langspec_f1(baseline, masked, "en", form, beta) == pytest.approx(f1)
    for beta in (1.0, 2.0):
        found = effect_of({name: (baseline[name], masked[name]) for name in baseline}, ACCURACY, beta)
        assert found is not None
        assert found.beta == beta
        assert {form: f1.mean for form, f1 in found.f1.items()} == pytest.approx(
            {form: f1 for (form, of_beta), f1 in expected.items() if of_beta == beta}
        )


def test_langspec_of_a_loss_is_that_of_probabilities() -> None:
    losses = {"en": (1.0, 3.0), "zh": (1.5, 1.7), "vi": (2.0, 2.0)}
    found = effect_of(losses)
    assert found is not None
    unmasked, masked = ({name: math.exp(-pair[place]) for name, pair in losses.items()} for place in (0, 1))
    for form in Form:
        assert found.f1[form].mean == pytest.approx(langspec_f1(unmasked, masked, "en", form))


def test_langspec_of_arrays_is_that_of_each() -> None:
    generator = np.random.default_rng(8)
    baseline, masked = generator.uniform(0.1, 1, (2, 4, 30))
    for form in Form:
        found = langspec_f1_of_arrays(baseline, masked, form, 2.0)
        for place in range(30):
            one = [dict(zip("abcd", scores[:, place].tolist(), strict=True)) for scores in (baseline, masked)]
            assert found[place] == pytest.approx(langspec_f1(one[0], one[1], "a", form, 2.0))


def test_langspec_of_arrays_without_a_baseline() -> None:
    baseline = np.array([[0.5, 0.0, 0.5, np.nan], [0.5, 0.5, 0.0, 0.5]])
    masked = np.array([[0.5, 0.0, 0.5, 0.5], [0.5, 0.5, 0.0, 0.5]])
    for form in Form:
        np.testing.assert_array_equal(langspec_f1_of_arrays(baseline, masked, form), [0.0, np.nan, np.nan, np.nan])


def test_no_langspec_where_a_baseline_is_0_or_a_metric_has_no_score() -> None:
    values: Fed = {("en", "none"): [1, 1, 0], ("en", "m"): [0, 1, 0], ("zh", "none"): [0, 0, 0], ("zh", "m"): [0, 0, 0]}
    findings = analyse(fed_answers(values, ACCURACY), masks(made_for("en")))
    assert findings.effects[0].f1 == {}
    assert finite(findings)
    found = effect_of({"en": (3.0, 5.0), "zh": (3.0, 3.5)}, NATS.model_copy(update={"score": None}))
    assert found is not None
    assert found.f1 == {}


LANGUAGES = ("en", "vi", "zh")


def compared(
    losses: dict[str, tuple[float, float]],
    noise: float = 0.0,
    languages: tuple[str, ...] = LANGUAGES,
    budgets: dict[str, float] | None = None,
) -> Findings:
    """losses: method, or method and draw ("random/1") -> what a mask costs its own language and each other one."""
    generator = np.random.default_rng(9)
    values: Fed = {(language, "none"): generator.normal(3, 0.5, 60) for language in LANGUAGES}
    chosen = []
    for key, (own, others) in losses.items():
        method, _, draw = key.partition("/")
        for language in languages:
            name = f"{key}-{language}"
            chosen.append(
                PlannedMask(
                    name=name,
                    method=method,
                    language=language,
                    budget=(budgets or {}).get(key, 0.01),
                    seed=int(draw) if draw else None,
                )
            )
            for asked in LANGUAGES:
                loss = own if asked == language else others
                values[asked, name] = np.asarray(values[asked, "none"]) + generator.normal(loss, noise, 60)
    findings = analyse(fed_answers(values), masks(*chosen))
    assert finite(findings)
    return findings


def by_method(findings: Findings, measure: str) -> dict[str, MethodRank]:
    return {rank.method: rank for rank in findings.ranks if rank.measure == measure}


def test_a_clearly_better_method_is_first_in_every_resample() -> None:
    findings = compared({"lape": (1.0, 0.5), "attnlrp": (2.0, 0.2), "random/0": (0.1, 0.1)}, noise=0.3)
    measures = {rank.measure for rank in findings.ranks}
    assert measures == {"selectivity", "index", "collateral", "f1 relative", "f1 absolute"}
    for measure in measures:
        best = by_method(findings, measure)["attnlrp"]
        assert (best.rank.mean, best.rank.low, best.rank.high) == (1.0, 1.0, 1.0)
        assert by_method(findings, measure)["random"].rank.mean == 3.0
        assert best.languages == LANGUAGES
        assert best.budget == 0.01


def test_equal_methods_have_ranks_that_overlap() -> None:
    findings = compared({"lape": (1.0, 0.5), "plnd": (1.0, 0.5)}, noise=0.5)
    ranks = by_method(findings, "selectivity")
    assert {rank.rank.mean for rank in ranks.values()} == {1.0, 2.0}
    assert {(rank.rank.low, rank.rank.high) for rank in ranks.values()} == {(1.0, 2.0)}


def test_methods_that_are_the_same_share_a_rank() -> None:
    findings = compared({"lape": (0.0, 0.0), "plnd": (0.0, 0.0)})
    ranks = by_method(findings, "selectivity")
    assert {(rank.rank.mean, rank.rank.low, rank.rank.high) for rank in ranks.values()} == {(1.5, 1.5, 1.5)}
    assert by_method(findings, "collateral") == {}  # nobody does any damage


def test_draws_are_averaged_and_undefined_collateral_is_last() -> None:
    findings = compared({"random/0": (1.0, 0.0), "random/1": (-0.5, 0.0), "lape": (1.0, 0.9)})
    ranks = by_method(findings, "selectivity")
    values = {method: rank.value for method, rank in ranks.items()}
    assert values["random"] is not None
    assert values["lape"] is not None
    assert values["random"].mean == pytest.approx(0.25)
    assert values["lape"].mean == pytest.approx(0.1)
    collateral = by_method(findings, "collateral")
    assert (collateral["random"].value, collateral["random"].rank.mean) == (None, 2.0)
    assert collateral["lape"].rank.mean == 1.0


def test_methods_are_compared_at_one_budget_for_the_same_languages() -> None:
    losses = {"lape": (1.0, 0.5), "plnd": (2.0, 0.5)}
    assert compared(losses, budgets={"plnd": 0.02}).ranks == ()
    assert compared({"lape": (1.0, 0.5)}).ranks == ()
    values: Fed = {(lang, name): level(3) for lang in ("en", "zh") for name in ("none", "a", "b", "c")}
    chosen = masks(made_for("en", "a", "lape"), made_for("en", "b", "plnd"), made_for("zh", "c", "plnd"))
    assert analyse(fed_answers(values), chosen).ranks == ()


def test_the_effect_of_a_dose() -> None:
    # Own damage .5 + log10(budget / 1e-4), others half of it: 1 nat at 1e-4 * 10^.5, where others lose .5.
    values: Fed = {(lang, "none"): level(3) for lang in ("en", "zh")}
    chosen = []
    for power, budget in enumerate((1e-4, 1e-3, 1e-2)):
        chosen.append(made_for("en", f"b{power}", "lape", budget))
        values[("en", f"b{power}")] = level(3 + 0.5 + power)
        values[("zh", f"b{power}")] = level(3 + (0.5 + power) / 2)
    # In any order of masks; another method has one budget only.
    chosen.append(made_for("en", "lone", "plnd", 1e-3))
    values = {**values, ("en", "lone"): level(4), ("zh", "lone"): level(4)}
    answers = fed_answers(values)
    (found,) = analyse(answers, masks(*chosen[::-1])).matched
    assert (found.method, found.language, found.effect, found.seed) == ("lape", "en", 1.0, None)
    assert found.budget is not None
    assert found.collateral is not None
    assert found.budget.mean == pytest.approx(1e-4 * math.sqrt(10))
    assert found.collateral.mean == pytest.approx(0.5)
    assert found.budget.low == pytest.approx(1e-4 * math.sqrt(10))
    assert found.collateral.high == pytest.approx(0.5)
    for effect in (0.4, 2.6):  # less than the smallest does, and more than the largest
        (none,) = analyse(answers, masks(*chosen), matched_effects={"nats_per_token": effect}).matched
        assert (none.budget, none.collateral) == (None, None)
    assert analyse(answers, masks(*chosen), matched_effects={}).matched == ()


def test_every_draw_is_matched_by_itself() -> None:
    losses = {"random/0": (0.5, 0.1), "random/1": (0.4, 0.1)}
    findings = compared(losses)
    assert findings.matched == ()
    low_and_high: Fed = {(lang, "none"): level(3) for lang in ("en", "zh")}
    chosen = []
    for seed in (1, 2):
        for budget in (1e-3, 1e-2):
            name = f"r{seed}-{budget}"
            chosen.append(PlannedMask(name=name, method="random", language="en", budget=budget, seed=seed))
            low_and_high[("en", name)] = level(3 + seed * budget * 100)
            low_and_high[("zh", name)] = level(3)
    found = analyse(fed_answers(low_and_high), masks(*chosen)).matched
    assert [(one.seed, None if one.budget is None else one.budget.mean) for one in found] == [
        (1, pytest.approx(1e-2)),
        (2, pytest.approx(10 ** (-3 + 0.8 / 1.8))),
    ]


def test_the_first_crossing_from_below() -> None:
    budgets = np.array([1.0, 10.0, 100.0, 1000.0])
    own = np.array(
        [
            [0.0, 2.0, 0.0, 2.0],  # twice: half-way to 10
            [1.0, 5.0, 5.0, 5.0],  # just so at the smallest
            [1.1, 0.0, 2.0, 2.0],  # already beyond at the smallest
            [0.0, 0.1, 0.2, 0.9],  # never
            [0.0, np.nan, 2.0, 2.0],
            [0.0, 0.0, 0.0, 1.0],  # just so at the largest
        ]
    ).T
    others = np.broadcast_to(np.array([0.0, 4.0, 6.0, 7.0])[:, None], own.shape)
    budget, lost = crossing(budgets, own, others, 1.0)
    np.testing.assert_allclose(budget, [math.sqrt(10), 1.0, np.nan, np.nan, np.nan, 1000.0])
    np.testing.assert_allclose(lost, [2.0, 0.0, np.nan, np.nan, np.nan, 7.0])


@pytest.mark.parametrize(
    ("small", "large", "has_interval"),
    [
        ([0.0, 0, 0, 0], [4.0, 0, 0, 0], True),  # 68 % draw the first item, and then lose 1 or more
        ([0.0, 0, 0, 0], [2.5, 2.5, -0.5, -0.5], True),  # 11/16 draw at least two of the first two
        ([1.9, 1.9, -0.1, -0.1], [2.5, 2.5, -0.5, -0.5], False),  # 5/16 draw more, and lose 1.4 at the small one
    ],
)
def test_matched_effects_have_an_interval_where_half_of_the_resamples_do(
    small: list[float], large: list[float], has_interval: bool
) -> None:
    values: Fed = {("en", "none"): [0.0] * 4, ("en", "s"): small, ("en", "l"): large}
    values = {**values, ("zh", "none"): level(1), ("zh", "s"): level(1), ("zh", "l"): level(1.5)}
    chosen = masks(made_for("en", "s", "lape", 0.001), made_for("en", "l", "lape", 0.01))
    findings = analyse(fed_answers(values), chosen)
    (found,) = findings.matched
    assert found.budget is not None
    assert found.budget.mean == pytest.approx(0.01)
    assert (found.budget.low is not None) == has_interval
    assert finite(findings)
