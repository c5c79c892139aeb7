import math

import numpy as np
import pytest
from scipy.stats import false_discovery_control

from clients.analysis import Findings, analyse
from clients.analysis.permutations import PERMUTATIONS
from clients.errors import EvaluationError
from clients.evaluation import Band, Cell, Evaluation, PlannedMask, Throughput
from clients.task import Item, ScoreText
from tests.fed import ACCURACY, Fed, FedTask, fed_answers

NONE = PlannedMask(name="none")


def masks(*others: PlannedMask) -> dict[str, PlannedMask]:
    return {mask.name: mask for mask in (NONE, *others)}


def plain(*names: str) -> dict[str, PlannedMask]:
    return masks(*(PlannedMask(name=name) for name in names))


def only(findings: Findings, mask: str, language: str = "en") -> Cell:
    (cell,) = [cell for cell in findings.cells if (cell.mask, cell.language) == (mask, language)]
    return cell


def finite(findings: Findings) -> bool:
    """Whether the findings hold no number that is not one, seen as JSON that forbids them."""
    evaluation = Evaluation(
        name="x",
        plan={},
        model={},
        server_version=None,
        languages=(),
        masks={},
        tasks=(),
        cells=findings.cells,
        effects=findings.effects,
        ranks=findings.ranks,
        matched=findings.matched,
        throughput=Throughput(answers=0, tokens=0, seconds=0, sessions=0),
    )

    def numbers(value: object) -> list[float]:
        if isinstance(value, dict):
            return [number for part in value.values() for number in numbers(part)]
        if isinstance(value, list | tuple):
            return [number for part in value for number in numbers(part)]
        return [value] if isinstance(value, float) else []

    return all(map(math.isfinite, numbers(evaluation.model_dump())))


def test_a_cell_by_hand() -> None:
    values: Fed = {
        ("en", "none"): [[10, 5], [20, 5], [30, 10]],
        ("en", "m"): [[14, 5], [20, 5], [46, 10]],
    }
    findings = analyse(fed_answers(values), plain("m"), seed=4)
    unmasked, masked = only(findings, "none"), only(findings, "m")
    assert unmasked.level is not None
    assert (unmasked.level.mean, unmasked.items) == (3.0, 3)
    assert (unmasked.change, unmasked.relative, unmasked.p_value, unmasked.q_value) == (None, None, None, None)
    assert masked.level is not None
    assert masked.change is not None
    assert masked.relative is not None
    assert (masked.level.mean, masked.change.mean) == (4.0, 1.0)
    assert masked.relative.mean == pytest.approx(1 / 3)
    # Differences 4, 0, 16: of the eight ways to swap, two reach a sum of 20 and two of -20.
    assert masked.p_value == pytest.approx(0.5)
    assert masked.q_value == pytest.approx(0.5)
    assert (masked.band, masked.beyond_band) == (None, None)
    # All items drawn alike give the extremes of the change: 4 / 5 of the first, 0 of the second, 1.6 of the third.
    assert masked.change.low is not None
    assert masked.change.high is not None
    assert masked.change.low == pytest.approx(0.0)
    assert masked.change.high == pytest.approx(1.6)
    assert findings.intervals.seed == 4


def test_a_missing_item_is_left_out_of_changes_only() -> None:
    values: Fed = {("en", "none"): [1.0, 2.0, 9.0], ("en", "m"): [2.0, 3.0, 100.0]}
    cell = only(analyse(fed_answers(values, missing=[("en", "none", 2)]), plain("m")), "m")
    assert cell.level is not None
    assert cell.change is not None
    assert cell.relative is not None
    assert (cell.items, cell.level.mean, cell.change.mean) == (2, 35.0, 1.0)
    assert cell.relative.mean == pytest.approx(1 / 1.5)
    cell = only(analyse(fed_answers(values, missing=[("en", "m", 2)]), plain("m")), "m")
    assert cell.level is not None
    assert (cell.items, cell.level.mean) == (2, 2.5)


def test_one_item_has_no_interval_and_no_test() -> None:
    lone = fed_answers({("en", "none"): [1.0], ("en", "m"): [2.0]})
    both = {("en", "none"): [1.0, 5.0, 5.0], ("en", "m"): [2.0, 5.0, 5.0]}
    left = fed_answers(both, missing=[("en", "m", 1), ("en", "m", 2)])
    for answers in (lone, left):
        cell = only(analyse(answers, plain("m")), "m")
        assert cell.change is not None
        assert (cell.change.mean, cell.change.low, cell.change.high) == (1.0, None, None)
        assert (cell.items, cell.p_value, cell.q_value) == (1, None, None)


def test_weights_of_0() -> None:
    values: Fed = {
        ("en", "none"): [[1, 1], [3, 1], [7, 0]],
        ("en", "half"): [[2, 1], [4, 1], [7, 0]],
        ("en", "nothing"): [[2, 0], [4, 0], [7, 0]],
    }
    findings = analyse(fed_answers(values), plain("half", "nothing"))
    half, nothing = only(findings, "half"), only(findings, "nothing")
    assert half.level is not None
    assert half.change is not None
    assert (half.level.mean, half.change.mean, half.items) == (3.0, 1.0, 3)
    assert half.p_value == pytest.approx(0.5)  # of the four sums of 1 and 1 or their negatives two are as large
    assert nothing == Cell(task="fed", metric="nats_per_token", language="en", mask="nothing", items=3)
    assert finite(findings)


def test_no_relative_change_of_0() -> None:
    values: Fed = {("en", "none"): np.zeros(20), ("en", "m"): np.arange(20) % 2}
    findings = analyse(fed_answers(values, ACCURACY), plain("m"))
    cell = only(findings, "m")
    assert cell.change is not None
    assert (cell.change.mean, cell.relative) == (0.5, None)
    assert finite(findings)


def test_relative_change_where_most_resamples_have_no_baseline() -> None:
    values: Fed = {("en", "none"): [1.0, 0, 0, 0], ("en", "m"): [0.0, 0, 0, 0]}
    cell = only(analyse(fed_answers(values, ACCURACY), plain("m")), "m")
    assert cell.relative is not None
    assert (cell.relative.mean, cell.relative.low, cell.relative.high) == (-1.0, -1.0, -1.0)  # (3/4)^4 have none
    unanswered = analyse(fed_answers(values, ACCURACY, missing=[("en", "none", i) for i in range(4)]), plain("m"))
    assert [(cell.mask, cell.change, cell.items) for cell in unanswered.cells] == [("m", None, 0)]


def test_no_difference_is_no_evidence() -> None:
    values: Fed = {("en", "none"): [0.1, 0.2, 0.7] * 10, ("en", "m"): [0.1, 0.2, 0.7] * 10}
    cell = only(analyse(fed_answers(values), plain("m")), "m")
    assert (cell.p_value, cell.q_value) == (1.0, 1.0)
    assert cell.change is not None
    assert (cell.change.mean, cell.change.low, cell.change.high) == (0.0, 0.0, 0.0)


def test_swaps_take_weights_along() -> None:
    masked, unmasked = np.array([[6.0, 1], [4, 2], [9, 2], [5, 4]]), np.array([[2.0, 2], [1, 1], [8, 3], [3, 2]])
    observed = masked.sum(axis=0)[0] / masked.sum(axis=0)[1] - unmasked.sum(axis=0)[0] / unmasked.sum(axis=0)[1]
    swapped = []
    for swap in np.ndindex(2, 2, 2, 2):
        one = np.where(np.array(swap)[:, None] == 1, unmasked, masked).sum(axis=0)
        other = np.where(np.array(swap)[:, None] == 1, masked, unmasked).sum(axis=0)
        swapped.append(one[0] / one[1] - other[0] / other[1])
    upper, lower = (np.mean([sign * s >= sign * observed - 1e-12 for s in swapped]) for sign in (1, -1))
    cell = only(analyse(fed_answers({("en", "none"): unmasked, ("en", "m"): masked}), plain("m")), "m")
    assert cell.p_value == pytest.approx(min(1, 2 * min(upper, lower)))
    assert cell.p_value < 1


def test_a_swap_without_weight_counts_as_extreme() -> None:
    # Masked (5, 1), (0, 0); unmasked (0, 0), (1, 1). No swap or two: changes 4 and -4. One swap: one side is empty.
    values: Fed = {("en", "none"): [[0, 0], [1, 1]], ("en", "m"): [[5, 1], [0, 0]]}
    assert only(analyse(fed_answers(values), plain("m")), "m").p_value == 1.0
    # Three more items of no difference do not change that one swap in two leaves both sides with weight, but move it.
    more: Fed = {key: [*np.asarray(rows), [0.0, 0.0]] for key, rows in values.items()}
    assert only(analyse(fed_answers(more), plain("m")), "m").p_value == 1.0


def test_the_smallest_p_value() -> None:
    values: Fed = {("en", "none"): np.zeros(60), ("en", "m"): np.ones(60)}
    assert only(analyse(fed_answers(values), plain("m")), "m").p_value == pytest.approx(2 / (PERMUTATIONS + 1))
    values = {("en", "none"): np.zeros(10), ("en", "m"): np.ones(10)}
    assert only(analyse(fed_answers(values), plain("m")), "m").p_value == pytest.approx(2 / 2**10)


def test_bands_are_of_random_masks_of_the_same_size_and_language() -> None:
    def control(name: str, neurons: int, language: str = "en") -> PlannedMask:
        return PlannedMask(name=name, method="random", language=language, neurons=neurons)

    chosen = masks(
        PlannedMask(name="m", method="lape", language="en", neurons=1000),
        PlannedMask(name="small", method="lape", language="en", neurons=10),
        PlannedMask(name="en@0.5", neurons=1000),
        control("r0", 900),
        control("r1", 1100),
        control("big", 1101),
        control("zh", 1000, "zh"),
    )
    shifts = {"none": 0, "m": 3, "small": 1, "en@0.5": 1, "r0": 1, "r1": 4, "big": 50, "zh": 60}
    values: Fed = {("vi", name): np.arange(5) + shift for name, shift in shifts.items()}
    findings = analyse(fed_answers(values), chosen)
    cell = only(findings, "m", "vi")
    assert (cell.band, cell.beyond_band) == (Band(mean=2.5, low=1.0, high=4.0, draws=2), False)
    for name in ("small", "en@0.5", "r0", "none"):
        assert (only(findings, name, "vi").band, only(findings, name, "vi").beyond_band) == (None, None)
    beyond = analyse(fed_answers({**values, ("vi", "m"): np.arange(5) + 4.5}), chosen)
    assert only(beyond, "m", "vi").beyond_band is True
    assert {cell.mask for cell in findings.cells if cell.q_value is None} == {"none", "r0", "r1", "big", "zh"}


def test_q_values_are_over_all_cells_but_controls() -> None:
    generator = np.random.default_rng(5)
    names = [f"m{place}" for place in range(6)]
    chosen = masks(*(PlannedMask(name=name) for name in names), PlannedMask(name="r", method="random", language="en"))
    values: Fed = {
        (language, name): generator.normal(0.25 * (place - 1), 0.6, 30)
        for language in ("en", "zh")
        for place, name in enumerate(["none", *names, "r"])
    }
    findings = analyse(fed_answers(values), chosen)
    tested = [cell for cell in findings.cells if cell.q_value is not None]
    assert len(tested) == 12
    p_values = [cell.p_value for cell in tested]
    np.testing.assert_allclose([cell.q_value for cell in tested], false_discovery_control(p_values))
    assert only(findings, "r").p_value is not None


def test_masks_and_parallel_languages_are_drawn_together() -> None:
    generator = np.random.default_rng(6)
    shared = generator.normal(0, 5, 40)
    values: Fed = {(language, "none"): np.zeros(40) for language in ("en", "zh")}
    values = {**values, ("en", "en"): shared + 2, ("zh", "en"): shared, ("en", "m"): shared + 2}
    chosen = masks(PlannedMask(name="en", language="en"), PlannedMask(name="m"))
    findings = analyse(fed_answers(values), chosen)
    assert only(findings, "en").change == only(findings, "m").change
    (effect,) = findings.effects
    assert effect.own.low is not None
    assert effect.own.high is not None
    assert effect.own.high - effect.own.low > 2
    for end in (effect.selectivity.mean, effect.selectivity.low, effect.selectivity.high):
        assert end == pytest.approx(2.0)  # what parallel items share cancels in every resample


def test_parallel_items_asked_in_another_order_are_drawn_together() -> None:
    shared = np.random.default_rng(6).normal(0, 5, 40)
    answers = fed_answers(
        {("en", "none"): np.zeros(40), ("zh", "none"): np.zeros(40), ("en", "en"): shared + 2, ("zh", "en"): shared}
    )
    by_language = dict(answers.items["fed"])
    by_language["zh"] = by_language["zh"][::-1]
    (effect,) = analyse(
        type(answers)(answers.tasks, {"fed": by_language}, answers.answers),
        masks(PlannedMask(name="en", language="en")),
    ).effects
    assert effect.selectivity.low == pytest.approx(2.0)


def test_the_seed_alone_decides() -> None:
    generator = np.random.default_rng(7)
    values: Fed = {("en", name): generator.normal(0, 1, 30) for name in ("none", "m")}
    first, again, other = (analyse(fed_answers(values), plain("m"), seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert only(first, "m").change != only(other, "m").change


def test_answers_to_what_was_not_asked_are_left_out() -> None:
    values: Fed = {("en", "none"): [1.0, 2.0], ("en", "m"): [2.0, 3.0], ("en", "gone"): [2.0, 3.0]}
    answers = fed_answers(values)
    asked = type(answers)(answers.tasks, {"fed": {"en": answers.items["fed"]["en"][:1]}}, answers.answers)
    assert [(cell.mask, cell.items) for cell in analyse(asked, plain("m")).cells] == [("none", 1), ("m", 1)]
    nothing = type(answers)(answers.tasks, {"fed": {"en": (Item("other", "en", ScoreText("")),)}}, answers.answers)
    assert analyse(nothing, plain("m")).cells == ()


def test_a_mask_asked_in_some_tasks_only() -> None:
    one = fed_answers({("en", "none"): [1.0, 2.0], ("en", "m"): [2.0, 3.0]}, name="one")
    two = fed_answers({("en", "none"): [1.0, 2.0]}, name="two")
    both = type(one)({**two.tasks, **one.tasks}, {**one.items, **two.items}, {**one.answers, **two.answers})
    assert [(cell.task, cell.mask) for cell in analyse(both, plain("m")).cells] == [
        ("two", "none"),
        ("one", "none"),
        ("one", "m"),
    ]


@pytest.mark.parametrize("row", [[math.nan, 1], [math.inf, 1], [1, -1], [1, math.nan]])
def test_impossible_values(row: list[float]) -> None:
    with pytest.raises(EvaluationError, match=r"fed in en: nats_per_token of item 'i0001' under mask 'm'"):
        analyse(fed_answers({("en", "none"): [[1, 1], [1, 1]], ("en", "m"): [[1, 1], row]}), plain("m"))


def test_impossible_settings() -> None:
    answers = fed_answers({("en", "none"): [1.0, 2.0]})
    with pytest.raises(EvaluationError, match="beta is 0"):
        analyse(answers, plain(), beta=0)
    with pytest.raises(EvaluationError, match="matched effect of accuracy is -1"):
        analyse(answers, plain(), matched_effects={"accuracy": -1})


def test_a_metric_that_an_answer_does_not_have() -> None:
    class Silent(FedTask):
        def measure(self, item: Item, answer: object) -> dict[str, object]:  # type: ignore[override]
            return {}

    answers = fed_answers({("en", "none"): [1.0, 2.0], ("en", "m"): [2.0, 3.0]})
    silent = type(answers)({"fed": Silent(name="fed")}, answers.items, answers.answers)
    findings = analyse(silent, plain("m"))
    assert [(cell.level, cell.change, cell.items) for cell in findings.cells] == [(None, None, 2)] * 2
