"""open_generation: what is asked, how texts are measured, and how a judge's replies count."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from clients import tasks
from clients.errors import CraneError, EvaluationError
from clients.judge import Judge
from clients.task import Generate, Generated, Item, Scored, ScoreOf, Value
from clients.tasks.open_generation import OpenGeneration

ENGLISH = "The ferry leaves the harbour every morning, and most of the people on board know each other well."
VIETNAMESE = "Mỗi buổi sáng chuyến phà rời bến cảng, và hầu hết hành khách trên tàu đều quen biết nhau từ lâu."
CHINESE = "渡轮每天早上离开港口，船上的大多数乘客彼此都很熟悉，他们已经认识很多年了。"
JUDGE = {"base_url": "http://judge/v1", "model": "referee"}


def task(base: Path, language: str = "en", **settings: Any) -> OpenGeneration:
    row = {"id": "a", "text": "How was it?", "topic": "travel"}
    (base / f"{language}.jsonl").write_text(json.dumps(row), encoding="utf-8")
    return OpenGeneration.model_validate({"name": "open", "source": {"files": "{lang}.jsonl"}, **settings})


def values(of: OpenGeneration, item: Item, text: str, **answer: Any) -> dict[str, Value]:
    measured = of.measure(item, Generated(text=text, **{"tokens": 5, "finish_reason": "stop", **answer}))
    assert list(measured) == [metric.name for metric in of.metrics]
    return measured


def test_it_is_found_by_its_kind() -> None:
    assert tasks.find("open_generation") is OpenGeneration


def test_a_row_becomes_a_prompt(tmp_path: Path) -> None:
    (item,) = task(tmp_path).load("en", tmp_path)
    assert item == Item("a", "en", Generate("How was it?", 64, (), 1.1), {})
    settings = {"prompt": "[{{ text }}]", "description": "Be brief. ", "max_tokens": 8, "stop": ["]"]}
    (item,) = task(tmp_path, **settings, repetition_penalty=1).load("en", tmp_path)
    assert item.request == Generate("Be brief. [How was it?]", 8, ("]",), 1.0)


@pytest.mark.parametrize(
    ("language", "text", "in_language", "unidentified"),
    [
        ("en", ENGLISH, 1, 0),
        ("en", VIETNAMESE, 0, 0),
        ("en", CHINESE, 0, 0),
        ("vi", VIETNAMESE, 1, 0),
        ("zh", CHINESE, 1, 0),
        ("zh-hans", CHINESE, 1, 0),
        ("en_us", ENGLISH, 1, 0),
        ("zh", ENGLISH, 0, 0),
        ("en", "", 0, 1),
        ("en", "1 2 3 4 5", 0, 1),
        ("sr", "?!", 0, 1),  # what the identifier calls a text without letters, were it not unsure
    ],
)
def test_the_language_of_a_text(
    tmp_path: Path, language: str, text: str, in_language: float, unidentified: float
) -> None:
    of = task(tmp_path, language)
    measured = values(of, of.load(language, tmp_path)[0], text)
    assert (measured["in_language"], measured["unidentified"]) == (Value(in_language), Value(unidentified))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two three four five", 0.0),  # 2 runs of four words, both different
        ("ha ha ha ha ha", 1 / 2),  # 2 runs, the same
        ("Ha ha, ha ha! HA", 1 / 2),
        ("a b c d a b c d a b", 3 / 7),  # abcd bcda cdab dabc abcd bcda cdab
        ("ha ha ha ha", 0.0),  # 1 run
        ("ha ha ha", 0.0),
        ("", 0.0),
        ("好好好好好好", 2 / 3),  # 3 runs, the same
        ("我爱你我爱你我", 1 / 4),  # 我爱你我 爱你我爱 你我爱你 我爱你我
    ],
)
def test_repetition(tmp_path: Path, text: str, expected: float) -> None:
    of = task(tmp_path)
    total, weight = values(of, of.load("en", tmp_path)[0], text)["repetition"]
    assert (total, weight) == (pytest.approx(expected), 1)


@pytest.mark.parametrize(("text", "tokens", "empty"), [(ENGLISH, 23, 0), (" \n ", 3, 1), ("", 1, 1)])
def test_length_and_empty_texts(tmp_path: Path, text: str, tokens: int, empty: float) -> None:
    of = task(tmp_path)
    measured = values(of, of.load("en", tmp_path)[0], text, tokens=tokens)
    assert (measured["length"], measured["empty"]) == (Value(tokens), Value(empty))


def test_figures_that_make_a_score(tmp_path: Path) -> None:
    assert [metric.name for metric in task(tmp_path).metrics if metric.score] == ["in_language"]
    judged = task(tmp_path, judge={**JUDGE, "highest": 5})
    assert {metric.name: metric.score for metric in judged.metrics if metric.score} == {
        "in_language": ScoreOf.LEVEL,
        "judged": ScoreOf.LEVEL,
    }
    assert {metric.unit for metric in judged.metrics if metric.name == "judged"} == {"marks from 1 to 5"}


@pytest.mark.parametrize(
    ("reply", "judged", "unparseable"),
    [
        ("Fine. Rating: [[8]]", Value(8), Value(0)),
        ("Fine.", Value(0, 0), Value(1)),
        ("Rating: [[80]]", Value(0, 0), Value(1)),
        ("", Value(0, 0), Value(1)),
        (None, Value(0, 0), Value(0, 0)),
    ],
)
def test_replies_count(tmp_path: Path, reply: str | None, judged: Value, unparseable: Value) -> None:
    of = task(tmp_path, judge=JUDGE)
    measured = values(of, of.load("en", tmp_path)[0], ENGLISH, judgement=reply)
    assert (measured["judged"], measured["unparseable"]) == (judged, unparseable)


class Referee:
    """Stands in for Judge.ask, and keeps what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, reply: str | Exception = "Rating: [[2]]") -> None:
        self.asked: list[tuple[str, str, str]] = []
        referee = self

        async def ask(judge: Judge, question: str, answer: str, language: str) -> str:
            await asyncio.sleep(0)
            referee.asked.append((question, answer, language))
            if isinstance(reply, Exception):
                raise reply
            return reply

        monkeypatch.setattr(Judge, "ask", ask)


@pytest.mark.parametrize("text", [ENGLISH, ""])
async def test_a_reply_is_kept_word_for_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    referee = Referee(monkeypatch)
    of = task(tmp_path, judge=JUDGE, prompt="User: {{ text }}\nBot:", description="Talk.\n")
    (item,) = of.load("en", tmp_path)
    answer = Generated(text=text, tokens=4, finish_reason="length")
    finished = await of.finish(item, answer)
    assert finished == answer.model_copy(update={"judgement": "Rating: [[2]]"})
    assert referee.asked == [("User: How was it?\nBot:", text, "en")]


async def test_the_judge_may_be_shown_another_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    referee = Referee(monkeypatch)
    of = task(tmp_path, judge=JUDGE, prompt="User: {{ text }}\nBot:", question="({{ topic }}) {{ text }}")
    (item,) = of.load("en", tmp_path)
    await of.finish(item, Generated(text="So so.", tokens=4, finish_reason="stop"))
    assert referee.asked == [("(travel) How was it?", "So so.", "en")]


async def test_without_a_judge_nothing_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    referee = Referee(monkeypatch)
    of = task(tmp_path)
    answer = Generated(text="So so.", tokens=4, finish_reason="stop")
    assert await of.finish(of.load("en", tmp_path)[0], answer) is answer
    assert referee.asked == []


async def test_what_the_judge_raises_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Referee(monkeypatch, CraneError(503, "busy", "busy"))
    of = task(tmp_path, judge=JUDGE)
    with pytest.raises(CraneError, match="busy"):
        await of.finish(of.load("en", tmp_path)[0], Generated(text="So so.", tokens=4, finish_reason="stop"))


def test_another_judge_makes_another_item(tmp_path: Path) -> None:
    judges = (None, JUDGE, {**JUDGE, "model": "other"}, {**JUDGE, "base_url": "http://elsewhere/v1"})
    first, second, third, fourth = (task(tmp_path, judge=judge).load("en", tmp_path)[0].digest for judge in judges)
    assert len({first, second, third}) == 3
    assert fourth == second


def test_languages_that_cannot_be_identified_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"'qqq' cannot be identified; expected one that begins with .*, en, "):
        task(tmp_path, "qqq").load("qqq", tmp_path)


def test_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="expected no `shots`"):
        task(tmp_path, shots=1)


def test_what_is_shown(tmp_path: Path) -> None:
    of = task(tmp_path)
    (item,) = of.load("en", tmp_path)
    assert of.shown(item, Generated(text=" So\nso.", tokens=4, finish_reason="stop")) == " So\nso."
    with pytest.raises(EvaluationError, match="the answer is scores"):
        of.measure(item, Scored(scores=()))


def test_settings_come_back(tmp_path: Path) -> None:
    of = task(tmp_path, judge={**JUDGE, "key_variable": "REFEREE_KEY"}, question="{{ topic }}")
    settings = json.loads(json.dumps(of.settings()))
    assert settings["judge"] == {**JUDGE, "key_variable": "REFEREE_KEY"}
    assert settings.pop("kind") == "open_generation"
    assert OpenGeneration.model_validate(settings) == of
