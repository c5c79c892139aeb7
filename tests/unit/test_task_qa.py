"""qa: prompts and examples made of rows, and answers marked by figures worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from clients import tasks
from clients.errors import EvaluationError
from clients.task import Generate, Generated, Item, Scored, ScoreOf
from clients.tasks.qa import QuestionAnswering

ROWS: list[dict[str, Any]] = [
    {"id": "a", "question": "Who built it?", "answers": ["The Stone Guild", "Stone Guild"]},
    {"id": "b", "question": "When?", "answers": ["1987"]},
    {"id": "c", "question": "How long?", "answers": {"text": ["ten miles", "10 miles"]}},
]


def task(rows: list[dict[str, Any]], base: Path, language: str = "en", **settings: Any) -> QuestionAnswering:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (base / f"{language}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    given = {"prompt": "Q: {{ question }}\nA:", "answers": "{{ answers }}", "source": {"files": "{lang}.jsonl"}}
    return QuestionAnswering.model_validate({"name": "qa", **given, **settings})


def figures(of: QuestionAnswering, item: Item, text: str) -> dict[str, float]:
    values = of.measure(item, Generated(text=text, tokens=3, finish_reason="stop"))
    assert all(value.weight == 1 for value in values.values())
    assert list(values) == [metric.name for metric in of.metrics]
    return {name: value.total for name, value in values.items()}


def test_it_is_found_by_its_kind() -> None:
    assert tasks.find("qa") is QuestionAnswering


def test_a_row_becomes_a_prompt(tmp_path: Path) -> None:
    first, second = task(ROWS[:2], tmp_path).load("en", tmp_path)
    assert first == Item(
        "a",
        "en",
        Generate("Q: Who built it?\nA:", max_tokens=32, stop=("\n",), repetition_penalty=1.0),
        {"answers": ["The Stone Guild", "Stone Guild"]},
    )
    assert (second.id, second.reference) == ("b", {"answers": ["1987"]})


def test_an_example_ends_in_its_first_answer(tmp_path: Path) -> None:
    first, second = task(ROWS[:2], tmp_path, shots=1, description="Answer.\n\n").load("en", tmp_path)
    assert first.prompt == "Answer.\n\nQ: When?\nA: 1987\n\nQ: Who built it?\nA:"
    assert second.prompt == "Answer.\n\nQ: Who built it?\nA: The Stone Guild\n\nQ: When?\nA:"


def test_answers_may_stand_deeper_or_alone(tmp_path: Path) -> None:
    (item,) = task(ROWS[2:], tmp_path, answers="{{ answers.text }}").load("en", tmp_path)
    assert item.reference == {"answers": ["ten miles", "10 miles"]}
    (item,) = task(ROWS[2:], tmp_path, answers="{{ answers.text[1] }}").load("en", tmp_path)
    assert item.reference == {"answers": ["10 miles"]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" the stone guild.", {"f1": 1.0, "exact_match": 1.0, "unanswered": 0.0}),
        # "a" is an article; 2 of the 4 other words are right and both expected ones are there
        ("a guild of stone masons", {"f1": 2 * 2 / (4 + 2), "exact_match": 0.0, "unanswered": 0.0}),
        ("nobody", {"f1": 0.0, "exact_match": 0.0, "unanswered": 0.0}),
        (" \n", {"f1": 0.0, "exact_match": 0.0, "unanswered": 1.0}),
    ],
)
def test_texts_are_compared_by_words(tmp_path: Path, text: str, expected: dict[str, float]) -> None:
    of = task(ROWS[:1], tmp_path)
    assert figures(of, of.load("en", tmp_path)[0], text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("language", "accepted", "text", "f1"),
    [
        ("zh", "iPhone 4手机", "黑色iPhone手机", 2 * 3 / (5 + 4)),  # 黑 色 iphone 手 机 | iphone 4 手 机
        ("zh", "1949年10月", "1949 年", 2 * 2 / (2 + 4)),
        ("vi", "cái cầu Rồng", "cầu Rồng của Đà Nẵng", 2 * 2 / (4 + 2)),
        ("en", "cái cầu", "cầu", 2 * 1 / (1 + 2)),  # no article in English
    ],
)
def test_words_are_those_of_the_language(tmp_path: Path, language: str, accepted: str, text: str, f1: float) -> None:
    of = task([{"question": "?", "answers": [accepted]}], tmp_path, language)
    assert figures(of, of.load(language, tmp_path)[0], text)["f1"] == pytest.approx(f1)


@pytest.mark.parametrize(
    ("language", "text", "exact_match", "unanswered"),
    [
        ("en", "5 + 1,229 = 1,234.", 1, 0),
        ("en", "1234.0", 1, 0),
        ("en", "1,234 is more than 7", 0, 0),
        ("en", "1.234", 0, 0),
        ("vi", "Đáp án là 1.234.", 1, 0),
        ("zh", "答案是１，２３４。", 1, 0),
        ("zh", "不知道", 0, 1),
        ("en", "", 0, 1),
    ],
)
def test_numbers_are_compared_by_value(
    tmp_path: Path, language: str, text: str, exact_match: float, unanswered: float
) -> None:
    of = task([{"question": "?", "answers": 1234}], tmp_path, language, match="number")
    (item,) = of.load(language, tmp_path)
    assert item.reference == {"answers": ["1234"]}
    assert figures(of, item, text) == {"exact_match": exact_match, "unanswered": unanswered}


def test_an_accepted_number_is_no_matter_of_language(tmp_path: Path) -> None:
    of = task([{"question": "?", "answers": 1.125}], tmp_path, "vi", match="number")
    (item,) = of.load("vi", tmp_path)
    assert figures(of, item, "1,125 kg")["exact_match"] == 0  # 1125
    assert figures(of, item, "1,1250 kg")["exact_match"] == 1


def test_figures_that_make_a_score(tmp_path: Path) -> None:
    scores = {metric.name: (metric.score, metric.higher_is_better) for metric in task(ROWS[:1], tmp_path).metrics}
    assert scores == {
        "f1": (ScoreOf.LEVEL, True),
        "exact_match": (ScoreOf.LEVEL, True),
        "unanswered": (None, False),
    }


@pytest.mark.parametrize(
    ("answers", "settings", "message"),
    [
        ([], {}, r"row 'row-1': `answers` gives \[\]; expected a text or number"),
        (["a", " "], {}, "expected a text or number"),
        (None, {}, "expected a text or number"),
        (True, {}, "expected a text or number"),
        ([["a"]], {}, "expected a text or number"),
        (["twelve"], {"match": "number"}, "expected numbers"),
        (["a"], {"answers": "{{ solutions }}"}, "solutions"),
        (["a"], {"prompt": "{{ '' }}"}, "the prompt is empty"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, answers: Any, settings: dict[str, Any], message: str) -> None:
    of = task([{"question": "?", "answers": answers}], tmp_path, **settings)
    with pytest.raises(EvaluationError, match=message):
        of.load("en", tmp_path)


@pytest.mark.parametrize(
    "settings",
    [{"max_tokens": 0}, {"stop": [""]}, {"stop": ["x"] * 17}, {"match": "letters"}, {"repetition_penalty": 0}],
)
def test_bad_settings_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        task(ROWS[:1], tmp_path, **settings)


def test_what_is_shown(tmp_path: Path) -> None:
    of = task(ROWS[:1], tmp_path)
    (item,) = of.load("en", tmp_path)
    assert of.shown(item, Generated(text=" Stone Guild ", tokens=2, finish_reason="stop")) == "Stone Guild"
    with pytest.raises(EvaluationError, match="the answer is scores; expected a generated text"):
        of.shown(item, Scored(scores=()))


def test_settings_come_back(tmp_path: Path) -> None:
    of = task(ROWS[:1], tmp_path, match="number", stop=[])
    settings = json.loads(json.dumps(of.settings()))
    assert settings.pop("kind") == "qa"
    assert QuestionAnswering.model_validate(settings) == of
