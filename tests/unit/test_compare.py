"""Comparing two evaluations."""

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from clients.answers import Score
from clients.compare import Comparison, compare, independent_difference
from clients.errors import EvaluationError
from clients.evaluation import UNMASKED, Evaluation, PlannedMask
from clients.reporting.comparison import FILES, terminal_tables, write_comparison
from clients.task import Answers, Item, Question, Scored, ScoreText
from crane_serve.common.numbers.bootstrap import Estimate
from tests.evaluations import Texts, evaluation_of

ITEMS = 40
MASK = PlannedMask(name="m", digest="1" * 64, method="x", language="en", budget=0.01, neurons=5)


def run(
    changes: list[float],
    *,
    mask: PlannedMask = MASK,
    task: str = "ppl",
    base: list[float] | None = None,
    text: str = "text",
    missing: tuple[int, ...] = (),
) -> tuple[Evaluation, Answers]:
    """One text per change in nats; each has one token. missing: those without an answer under the mask."""
    base = base or [3.0] * len(changes)
    items = tuple(Item(f"i{n:02}", "en", ScoreText(f"{text} {n}")) for n in range(len(changes)))
    given = {}
    for n, (item, change) in enumerate(zip(items, changes, strict=True)):
        for name, nats in ((UNMASKED, base[n]), (mask.name, base[n] + change)):
            if name == UNMASKED or n not in missing:
                given[Question(task, "en", item.id, name)] = Scored(scores=(Score(logprob=-nats, tokens=1, bytes=2),))
    answers = Answers({task: Texts(name=task)}, {task: {"en": items}}, given)
    return evaluation_of(answers, {UNMASKED: PlannedMask(name=UNMASKED), mask.name: mask}), answers


def noisy(seed: int, shift: float = 0.0) -> list[float]:
    return (np.random.default_rng(seed).normal(1.0 + shift, 1.0, ITEMS)).tolist()


def test_paired_difference_is_that_of_the_items() -> None:
    one = noisy(0)
    gain = np.random.default_rng(1).normal(0.5, 0.1, ITEMS)
    (first, first_answers), (second, second_answers) = run(one), run((np.array(one) + gain).tolist())
    found = compare(first, second, first_answers, second_answers).cells[0]
    assert (found.task, found.metric, found.mask, found.paired, found.items) == (
        "ppl", "nats_per_token", "m", True, ITEMS
    )  # fmt: skip
    assert found.difference.mean == pytest.approx(gain.mean())
    standard_error = gain.std(ddof=1) / math.sqrt(ITEMS)
    assert found.difference.low is not None
    assert found.difference.high is not None
    assert found.difference.high - found.difference.low == pytest.approx(2 * 1.96 * standard_error, rel=0.15)
    assert found.second.mean - found.first.mean == pytest.approx(found.difference.mean)
    independent = compare(first, second).cells[0]
    assert not independent.paired
    assert independent.items is None
    assert independent.difference.mean == pytest.approx(gain.mean())
    assert independent.difference.low is not None
    assert independent.difference.low < 0.3 < 0.45 < found.difference.low  # pairing takes the items' own noise out


def test_bits_are_weighed_by_bytes() -> None:
    runs = run([1.0, 3.0]), run([2.0, 6.0])
    comparison = compare(runs[0][0], runs[1][0], runs[0][1], runs[1][1])
    (bits,) = [cell for cell in comparison.cells if cell.metric == "bits_per_byte"]
    assert bits.difference.mean == pytest.approx((4.0 - 2.0) / math.log(2) / 2)


def test_only_items_answered_four_times_are_paired() -> None:
    first, first_answers = run([0.0, 1.0, 2.0, 9.0], missing=(3,))
    second, second_answers = run([9.0, 2.0, 4.0, 9.0], missing=(0,))
    found = compare(first, second, first_answers, second_answers).cells[0]
    assert found.items == 2
    assert found.difference.mean == pytest.approx(1.5)  # 2 - 1 and 4 - 2
    assert found.first.mean == pytest.approx(1.0)  # over its own three


def test_one_common_item_has_no_interval() -> None:
    (first, first_answers), (second, second_answers) = run([1.0]), run([3.0])
    difference = compare(first, second, first_answers, second_answers).cells[0].difference
    assert difference == Estimate(mean=2.0, low=None, high=None)


def test_other_items_are_independent_and_said_to_be() -> None:
    (first, first_answers), (second, second_answers) = run(noisy(0)), run(noisy(1), text="other")
    comparison = compare(first, second, first_answers, second_answers)
    assert not comparison.cells[0].paired
    assert "task ppl asked other items in en, compared as independent samples" in comparison.differences


def test_independent_intervals() -> None:
    first = Estimate(mean=1.0, low=0.6, high=1.3)
    second = Estimate(mean=2.0, low=1.6, high=2.4)
    found = independent_difference(first, second)
    assert found.mean == 1.0
    assert found.low == pytest.approx(0.5)  # 1 - hypot(0.4, 0.3)
    assert found.high == pytest.approx(1 + math.hypot(0.4, 0.4))
    for lacking in (Estimate(mean=1.0, low=None, high=None), Estimate(mean=1.0, low=None, high=2.0)):
        assert independent_difference(lacking, second) == Estimate(mean=1.0, low=None, high=None)


def test_the_same_twice_differs_by_nothing() -> None:
    first, answers = run(noisy(0))
    comparison = compare(first, first, answers, answers)
    assert comparison.differences == comparison.only_first == comparison.only_second == ()
    assert {cell.difference for cell in comparison.cells} == {Estimate(mean=0.0, low=0.0, high=0.0)}


def test_seeds() -> None:
    (first, first_answers), (second, second_answers) = run(noisy(0)), run(noisy(1))

    def found(seed: int) -> Estimate:
        return compare(first, second, first_answers, second_answers, seed=seed).cells[0].difference

    assert found(3) == found(3)
    assert found(3) != found(4)
    assert found(3).mean == found(4).mean


def test_masks_of_other_names_are_matched_by_how_they_were_made() -> None:
    (first, first_answers), (second, second_answers) = (
        run(noisy(0)),
        run(noisy(1), mask=MASK.model_copy(update={"name": "n", "digest": "2" * 64})),
    )
    comparison = compare(first, second, first_answers, second_answers)
    assert (comparison.cells[0].mask, comparison.cells[0].second_mask) == ("m", "n")
    assert comparison.cells[0].mask_name == "m = n"
    assert comparison.cells[0].paired
    assert any("matched by method, language, budget and seed" in phrase for phrase in comparison.differences)
    assert "1 of 1 masks have other neurons or scales (digests): m" in comparison.differences


def test_what_differs() -> None:
    first, _ = run(noisy(0))
    task = first.tasks[0]
    second = first.model_copy(
        update={
            "model": {**first.model, "name": "large"},
            "server_version": "2.0",
            "versions": {"python": "3.13.0", "numpy": "2.1"},
            "tasks": (task.model_copy(update={"settings": {**task.settings, "shots": 3}}),),
        }
    )
    assert set(compare(first, second).differences) == {
        "model name: tiny against large",
        "server version: 1.2.3 against 2.0",
        "version of python: 3.12.0 against 3.13.0",
        "version of numpy: not recorded against 2.1",
        "task ppl shots: not recorded against 3",
    }


def test_what_only_one_has() -> None:
    first, _ = run(noisy(0))
    extra = first.tasks[0].model_copy(update={"name": "more"})
    wider = first.tasks[0].model_copy(update={"languages": ("en", "vi"), "metrics": first.tasks[0].metrics[:1]})
    second = first.model_copy(update={"tasks": (wider, extra), "masks": {**first.masks, "z": PlannedMask(name="z")}})
    comparison = compare(first, second)
    assert comparison.only_first == ("metric bits_per_byte of task ppl",)
    assert comparison.only_second == ("task ppl in vi", "task more", "mask z")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"mask": MASK.model_copy(update={"name": "n", "budget": 0.5})}, r"\(m\).*\(n\) have no mask in common"),
        ({"task": "other"}, r"\(ppl\).*\(other\) have no task in common"),
        ({"missing": tuple(range(ITEMS))}, "no change of a metric"),
    ],
)
def test_nothing_to_compare(other: dict[str, object], message: str) -> None:
    first, _ = run(noisy(0))
    second, _ = run(noisy(1), **other)  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match=message):
        compare(first, second)


@pytest.fixture
def comparison() -> Comparison:
    (first, first_answers), (second, second_answers) = run(noisy(0)), run(noisy(1, 2.0))
    named = second.model_copy(update={"name": "<b>two|2</b>"})
    return compare(first, named, first_answers, second_answers)


def test_files(comparison: Comparison, tmp_path: Path) -> None:
    paths = write_comparison(comparison, tmp_path)
    assert [path.name for path in paths] == list(FILES)
    html, markdown = ((tmp_path / name).read_text() for name in FILES[:2])
    difference = f"{comparison.cells[0].difference.mean:+.2f}"
    assert difference in html
    assert f"| m | {difference} [" in markdown
    assert "<b>" not in html
    assert r"\<b>two\|2\</b>" in markdown
    assert '<td class="loss"' in html  # more nats per token: worse
    with (tmp_path / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["metric"] for row in rows] == ["nats_per_token", "bits_per_byte"]
    assert float(rows[0]["difference"]) == comparison.cells[0].difference.mean
    assert float(rows[0]["second_low"]) == comparison.cells[0].second.low
    assert (rows[0]["samples"], rows[0]["items"]) == ("paired", str(ITEMS))


def test_terminal_tables(comparison: Comparison) -> None:
    out = io.StringIO()
    (table,) = terminal_tables(comparison)
    Console(file=out, width=120).print(table)
    assert f"{comparison.cells[0].difference.mean:+.2f}" in out.getvalue()
    assert "ppl: <b>two|2</b> minus made up" in out.getvalue()
