"""The task `cloze`: candidates, ranks, ties, several right answers, chance."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from clients.answers import Score
from clients.errors import EvaluationError
from clients.task import Item, ScoreContinuations, Scored
from clients.tasks import parse_task
from clients.tasks.cloze import Cloze

ROWS = [
    {"id": "fr", "country": "France", "answer": "Paris"},
    {"id": "bo", "country": "Bolivia", "answer": ["Sucre", "La Paz"]},
    {"id": "vn", "country": "Vietnam", "answer": "Hanoi"},
    {"id": "la", "country": "Laos", "answer": "Vientiane"},
]


def task(tmp_path: Path, rows: list[dict[str, Any]] | None = None, **settings: Any) -> Cloze:
    content = "".join(json.dumps(row) + "\n" for row in (ROWS if rows is None else rows))
    (tmp_path / "rows.jsonl").write_text(content)
    given = {"kind": "cloze", "source": {"files": "rows.jsonl"}, "prompt": "The capital of {{ country }} is"}
    made = parse_task(given | settings, "task 1")
    assert isinstance(made, Cloze)
    return made


def scored(*logprobs: float) -> Scored:
    return Scored(scores=tuple(Score(logprob=logprob, tokens=1, bytes=1) for logprob in logprobs))


def totals(made: Cloze, item: Item, *logprobs: float) -> dict[str, float]:
    return {name: value.total for name, value in made.measure(item, scored(*logprobs)).items()}


def test_all_answers_are_the_candidates(tmp_path: Path) -> None:
    items = task(tmp_path, limit=2).load("en", tmp_path)
    candidates = ["Paris", "Sucre", "La Paz", "Hanoi", "Vientiane"]
    assert items[0] == Item(
        "fr",
        "en",
        ScoreContinuations("The capital of France is", tuple(f" {each}" for each in candidates)),
        {"candidates": candidates, "right": [0]},
    )
    assert [item.id for item in items] == ["fr", "vn"]
    assert task(tmp_path).load("en", tmp_path)[1].reference["right"] == [1, 2]


def test_given_candidates(tmp_path: Path) -> None:
    item = task(tmp_path, ROWS[:1], candidates=["Rome", "Paris", "Rome"], delimiter="").load("en", tmp_path)[0]
    assert item.request == ScoreContinuations("The capital of France is", ("Rome", "Paris"))
    rows = [ROWS[0] | {"among": ["Paris", "Lyon"]}]
    item = task(tmp_path, rows, candidates="{{ among }}").load("en", tmp_path)[0]
    assert item.reference == {"candidates": ["Paris", "Lyon"], "right": [0]}
    item = task(tmp_path, ROWS[:1], candidates="{{ words.cities }}", words={"en": {"cities": ["Paris", "Oslo"]}}).load(
        "en", tmp_path
    )[0]
    assert item.reference["candidates"] == ["Paris", "Oslo"]


def test_examples(tmp_path: Path) -> None:
    item = task(tmp_path, shots=2).load("en", tmp_path)[0]
    assert (
        item.prompt == "The capital of Bolivia is Sucre\n\nThe capital of Vietnam is Hanoi\n\nThe capital of France is"
    )
    item = task(tmp_path, shots=1, shots_source={"files": "rows.jsonl"}).load("en", tmp_path)[0]
    assert item.prompt == "The capital of Bolivia is Sucre\n\nThe capital of France is"


def test_figures_by_hand(tmp_path: Path) -> None:
    made = task(tmp_path)
    france, bolivia, *_ = made.load("en", tmp_path)
    assert totals(made, france, -2.0, -3.0, -1.0, -4.0, -1.5) == {
        "hits_at_1": 0.0,
        "mrr": 1 / 3,
        "answer_nats": 2.0,
        "margin": -1.0,
    }
    assert totals(made, france, -0.5, -3.0, -1.0, -4.0, -1.5) == {
        "hits_at_1": 1.0,
        "mrr": 1.0,
        "answer_nats": 0.5,
        "margin": 0.5,
    }
    assert made.shown(france, scored(-2.0, -3.0, -1.0, -4.0, -1.5)) == "La Paz"
    # The best right one counts, and the other right one, although better than Paris, takes no rank from it.
    assert totals(made, bolivia, -2.5, -2.0, -1.5, -1.0, -9.0) == {
        "hits_at_1": 0.0,
        "mrr": 1 / 2,
        "answer_nats": 1.5,
        "margin": -0.5,
    }


def test_ties_count_against_the_answer(tmp_path: Path) -> None:
    made = task(tmp_path)
    france = made.load("en", tmp_path)[0]
    assert totals(made, france, -1.0, -1.0, -1.0, -5.0, -5.0) == {
        "hits_at_1": 0.0,
        "mrr": 1 / 3,
        "answer_nats": 1.0,
        "margin": 0.0,
    }
    assert made.shown(france, scored(-1.0, -1.0, -2.0, -5.0, -5.0)) == "Sucre"


def test_chance_is_that_of_all_orders(tmp_path: Path) -> None:
    made = task(tmp_path)
    items = made.load("en", tmp_path)[:2]  # one right of five, two right of five
    expected: dict[str, list[float]] = {"hits_at_1": [], "mrr": []}
    for item in items:
        values = [totals(made, item, *order) for order in itertools.permutations([-1.0, -2.0, -3.0, -4.0, -5.0])]
        for metric, means in expected.items():
            means.append(sum(value[metric] for value in values) / len(values))
    assert made.chance(items) == pytest.approx({metric: sum(means) / 2 for metric, means in expected.items()})
    assert made.chance(items[:1]) == pytest.approx({"hits_at_1": 1 / 5, "mrr": (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 5})
    assert made.chance(()) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": ["Rome", "Oslo"]}, "row 'fr': the answer 'Paris' is not one of the candidates"),
        ({"candidates": "{{ country }}"}, "row 'fr': candidates: found 'France'; expected a list of texts"),
        ({"candidates": "{{ ['Paris', 'Paris'] }}"}, "row 'fr': 1 different candidates; expected 2 to 1024"),
        ({"candidates": "{{ range(1025) | list }}"}, "row 'fr': 1025 different candidates; expected 2 to 1024"),
        (
            {"answer": "{{ ['a', 'b'] }}", "candidates": "{{ ['a', 'b'] }}"},
            "row 'fr': all candidates are right; expected a wrong one",
        ),
        ({"candidates": "{{ ['Paris', ' '] }}"}, "row 'fr': candidates: found ' '; expected text"),
    ],
)
def test_rows_that_cannot_be_asked(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        task(tmp_path, **settings).load("en", tmp_path)


def test_an_answer_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"rows.jsonl, row 'row-1': answer: found None; expected text"):
        task(tmp_path, [{"country": "France", "answer": None}]).load("en", tmp_path)


def test_metrics_are_those_measured(tmp_path: Path) -> None:
    made = task(tmp_path)
    item = made.load("en", tmp_path)[0]
    assert [metric.name for metric in made.metrics] == list(totals(made, item, -1.0, -2.0, -3.0, -4.0, -5.0))
