"""The task `perplexity`: what is asked, and totals in nats and bits."""

import math
from pathlib import Path
from typing import Any

import pytest

from clients.answers import Score
from clients.errors import EvaluationError
from clients.task import Item, Scored, ScoreOf, ScoreText
from clients.tasks import parse_task
from clients.tasks.perplexity import Perplexity


def task(**settings: Any) -> Perplexity:
    made = parse_task({"kind": "perplexity", "source": {"corpus": "embedded", "split": "test"}} | settings, "task 1")
    assert isinstance(made, Perplexity)
    return made


def test_texts_of_the_embedded_corpus() -> None:
    items = {language: task(limit=3).load(language, Path()) for language in ("en", "vi")}
    assert len(items["en"]) == 3
    assert [item.id for item in items["en"]] == [item.id for item in items["vi"]]
    assert [item.request for item in items["en"]] != [item.request for item in items["vi"]]


def test_a_template_makes_the_text(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("One two.\n")
    made = task(source={"files": "{lang}.txt"}, text="{{ lang }}: {{ text }}\n")
    assert made.load("en", tmp_path) == (Item("line-1", "en", ScoreText("en: One two.\n")),)


def test_figures_by_hand() -> None:
    item = Item("a", "en", ScoreText("x"))
    values = task().measure(item, Scored(scores=(Score(logprob=-6.0, tokens=4, bytes=10),)))
    assert values["nats_per_token"] == (6.0, 4)
    assert values["bits_per_byte"] == (pytest.approx(6 / math.log(2)), 10)
    empty = task().measure(item, Scored(scores=(Score(logprob=0.0, tokens=0, bytes=0),)))
    assert {value.weight for value in empty.values()} == {0}
    with pytest.raises(EvaluationError, match="item 'a' in en: the answer is 0 scores; expected 1 scores"):
        task().measure(item, Scored(scores=()))


def test_the_headline_makes_a_score_and_bits_do_not() -> None:
    nats, bits = task().metrics
    assert (nats.name, nats.score, nats.damage(0.5)) == ("nats_per_token", ScoreOf.EXP_NEGATIVE, 0.5)
    assert (bits.name, bits.score, bits.damage(0.5)) == ("bits_per_byte", None, 0.5)


@pytest.mark.parametrize("settings", [{"shots": 1}, {"description": "x"}, {"shots_source": {"corpus": "embedded"}}])
def test_examples_do_not_fit(settings: dict[str, Any]) -> None:
    with pytest.raises(EvaluationError, match=r"task 1: .*do not fit perplexity"):
        task(**settings)
