"""The task `choice`, and what all tasks over rows share: which rows, examples, wording, errors."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from clients.answers import Score
from clients.errors import EvaluationError
from clients.task import Generated, Item, ScoreContinuations, Scored
from clients.tasks import parse_task
from clients.tasks.choice import Choice

ROWS = [
    {"id": "a", "q": "Two and two?", "options": ["three", "four"], "right": 1, "subject": "sums"},
    {"id": "b", "q": "A cat is?", "options": ["animal", "plant", "stone"], "right": 0, "subject": "life"},
    {"id": "c", "q": "Five less one?", "options": ["four", "nine"], "right": 0, "subject": "sums"},
    {"id": "d", "q": "Moss is?", "options": ["a stone", "a plant"], "right": 1, "subject": "life"},
]


def task(tmp_path: Path, rows: list[dict[str, Any]] | None = None, **settings: Any) -> Choice:
    content = "".join(json.dumps(row) + "\n" for row in (ROWS if rows is None else rows))
    (tmp_path / "rows.jsonl").write_text(content)
    given = {
        "kind": "choice",
        "source": {"files": "rows.jsonl"},
        "question": "{{ q }}",
        "choices": "{{ options }}",
        "answer": "{{ right }}",
    }
    made = parse_task(given | settings, "task 1")
    assert isinstance(made, Choice)
    return made


def scored(*logprobs: float) -> Scored:
    return Scored(scores=tuple(Score(logprob=logprob, tokens=1, bytes=1) for logprob in logprobs))


def question(item: Item) -> ScoreContinuations:
    assert isinstance(item.request, ScoreContinuations)
    return item.request


# --- requests


def test_a_question_and_its_choices(tmp_path: Path) -> None:
    items = task(tmp_path, delimiter="|").load("en", tmp_path)
    assert [item.id for item in items] == ["a", "b", "c", "d"]
    assert items[1] == Item(
        "b",
        "en",
        ScoreContinuations("A cat is?", ("|animal", "|plant", "|stone")),
        {"choices": ["animal", "plant", "stone"], "answer": 0},
    )


def test_examples_stand_before_the_question(tmp_path: Path) -> None:
    items = task(tmp_path, shots=2, description="In {{ lang }}:\n", shot_separator="\n--\n").load("en", tmp_path)
    assert question(items[0]).context == ("In en:\nA cat is? animal\n--\nFive less one? four\n--\nTwo and two?")
    assert question(items[3]).context == "In en:\nTwo and two? four\n--\nA cat is? animal\n--\nMoss is?"


def test_examples_of_another_source(tmp_path: Path) -> None:
    other = {"q": "Water is?", "options": ["wet", "dry"], "right": 0}
    (tmp_path / "dev.jsonl").write_text(json.dumps(other) + "\n" + json.dumps(ROWS[0]) + "\n")
    items = task(tmp_path, shots=1, shots_source={"files": "dev.jsonl"}).load("en", tmp_path)
    assert {question(item).context.split("\n\n")[0] for item in items} == {"Water is? wet"}
    with pytest.raises(EvaluationError, match=r"dev.jsonl: 1 examples for row 'a'; expected 2, as `shots` says"):
        task(tmp_path, shots=2, shots_source={"files": "dev.jsonl"}).load("en", tmp_path)


def test_an_item_is_no_example_of_itself_where_the_same_rows_are_given_twice(tmp_path: Path) -> None:
    items = task(tmp_path, shots=1, shots_source={"files": "rows.jsonl"}).load("en", tmp_path)
    assert question(items[0]).context == "A cat is? animal\n\nTwo and two?"


def test_examples_share_a_field_with_the_item(tmp_path: Path) -> None:
    items = task(tmp_path, shots=1, shots_by="subject").load("en", tmp_path)
    before = [question(item).context.split("\n\n")[0] for item in items]
    assert before == ["Five less one? four", "Moss is? a plant", "Two and two? four", "A cat is? animal"]
    with pytest.raises(EvaluationError, match="1 examples with subject 'sums' for row 'a'; expected 2"):
        task(tmp_path, shots=2, shots_by="subject").load("en", tmp_path)


def test_picked_rows(tmp_path: Path) -> None:
    rows = [ROWS[0] | {"id": str(number)} for number in range(10)]
    spread = task(tmp_path, rows, limit=4).load("en", tmp_path)
    assert [item.id for item in spread] == ["0", "2", "5", "7"]
    first = task(tmp_path, rows, limit=4, pick="first").load("en", tmp_path)
    assert [item.id for item in first] == ["0", "1", "2", "3"]
    assert len(task(tmp_path, rows, limit=99).load("en", tmp_path)) == 10


def test_kept_rows(tmp_path: Path) -> None:
    kept = task(tmp_path, where="{{ subject == 'life' }}", shots=1).load("en", tmp_path)
    assert [question(item).context for item in kept] == [
        "Moss is? a plant\n\nA cat is?",
        "A cat is? animal\n\nMoss is?",
    ]
    with pytest.raises(EvaluationError, match="`where` keeps no row"):
        task(tmp_path, where="{{ subject == 'art' }}").load("en", tmp_path)
    with pytest.raises(EvaluationError, match=r"rows.jsonl, row 'a': template .*'art' is undefined"):
        task(tmp_path, where="{{ art }}").load("en", tmp_path)


def test_words_of_a_language(tmp_path: Path) -> None:
    made = task(tmp_path, words={"vi": {"ask": "Hỏi"}, "en": {"ask": "Ask"}}, question="{{ words.ask }}: {{ q }}")
    assert question(made.load("vi", tmp_path)[0]).context == "Hỏi: Two and two?"
    with pytest.raises(EvaluationError, match="words: none for 'zh'; there are words for vi, en"):
        made.load("zh", tmp_path)


def test_a_list_of_templates_as_choices(tmp_path: Path) -> None:
    rows = [{"good": "Yes", "bad": "No"}]
    made = task(tmp_path, rows, question="?", choices=["{{ bad | lower }}", "{{ good | lower }}"], answer="yes")
    assert made.load("en", tmp_path)[0].reference == {"choices": ["no", "yes"], "answer": 1}


# --- the right answer


@pytest.mark.parametrize(
    ("right", "letters", "index"),
    [
        *[(0, False, 0), (2, False, 2), (1.0, False, 1), ("c", False, 2), ("1", False, 1)],
        *[("A", True, 0), (" b ", True, 1), ("C", True, 2), (1, True, 1)],
    ],
)
def test_right_answers(tmp_path: Path, right: Any, letters: bool, index: int) -> None:
    rows = [{"q": "?", "options": ["a", "b", "c"], "right": right}]
    assert task(tmp_path, rows, letters=letters).load("en", tmp_path)[0].reference["answer"] == index


@pytest.mark.parametrize(
    ("right", "letters"),
    [
        *[(-1, False), (3, False), ("d", False), ("3", False), (None, False), (True, False), (0.5, False)],
        *[("D", True), ("AB", True), ("", True), ("1", True)],
    ],
)
def test_wrong_answers(tmp_path: Path, right: Any, letters: bool) -> None:
    rows = [{"q": "?", "options": ["a", "b", "c"], "right": right}]
    expected = "a letter from A to C" if letters else "a choice's text"
    message = f"rows.jsonl, row 'row-1': answer is .*; expected {expected} or an index from 0 to 2"
    with pytest.raises(EvaluationError, match=message):
        task(tmp_path, rows, letters=letters).load("en", tmp_path)


def test_digits_that_may_be_a_text_or_an_index(tmp_path: Path) -> None:
    rows = [{"q": "?", "options": ["2", "1", "3"], "right": "1"}]
    assert task(tmp_path, rows).load("en", tmp_path)[0].reference["answer"] == 1
    rows[0]["right"] = "2"
    with pytest.raises(EvaluationError, match="answer '2' is the text of choice 0 and may be an index"):
        task(tmp_path, rows).load("en", tmp_path)
    assert task(tmp_path, rows, answer="{{ right | int }}").load("en", tmp_path)[0].reference["answer"] == 2
    assert task(tmp_path, rows, answer="{{ options.index(right) }}").load("en", tmp_path)[0].reference["answer"] == 0


@pytest.mark.parametrize("options", [["a"], "ab", [], ["a", ""], ["a", None], ["a", ["b"]]])
def test_choices_that_cannot_be_used(tmp_path: Path, options: Any) -> None:
    with pytest.raises(EvaluationError, match=r"rows.jsonl, row 'row-1': .*choices"):
        task(tmp_path, [{"q": "?", "options": options, "right": 0}]).load("en", tmp_path)


# --- figures


def test_figures_by_hand(tmp_path: Path) -> None:
    item = task(tmp_path).load("en", tmp_path)[1]  # animal (6 characters) is right, then plant (5), stone (5)
    made = task(tmp_path)
    # Per character: -6 / 6 = -1, -5.5 / 5 = -1.1, -7 / 5 = -1.4.
    values = made.measure(item, scored(-6.0, -5.5, -7.0))
    assert {name: value.total for name, value in values.items()} == {
        "accuracy": 0.0,
        "accuracy_norm": 1.0,
        "margin": -0.5,
    }
    assert all(value.weight == 1 for value in values.values())
    assert made.shown(item, scored(-6.0, -5.5, -7.0)) == "plant"
    assert made.measure(item, scored(-1.0, -4.0, -3.0))["margin"].total == 2.0


def test_the_first_of_equals_is_taken(tmp_path: Path) -> None:
    made = task(tmp_path)
    first, last = made.load("en", tmp_path)[2:]  # right: the first of "four" and "nine", the last of two of 7 letters
    for item, taken in ((first, 1.0), (last, 0.0)):
        values = made.measure(item, scored(-3.0, -3.0))
        assert (values["accuracy"].total, values["accuracy_norm"].total, values["margin"].total) == (taken, taken, 0.0)


def test_chance(tmp_path: Path) -> None:
    made = task(tmp_path)
    guessing = (1 / 2 + 1 / 3 + 1 / 2 + 1 / 2) / 4
    assert made.chance(made.load("en", tmp_path)) == pytest.approx({"accuracy": guessing, "accuracy_norm": guessing})
    assert made.chance(()) == {}


def test_answers_that_do_not_fit(tmp_path: Path) -> None:
    made = task(tmp_path)
    item = made.load("en", tmp_path)[0]
    with pytest.raises(EvaluationError, match="item 'a' in en: the answer is 3 scores; expected 2 scores"):
        made.measure(item, scored(-1.0, -2.0, -3.0))
    with pytest.raises(EvaluationError, match="the answer is a generated text; expected 2 scores"):
        made.measure(item, Generated(text="x", tokens=1, finish_reason="stop"))


def test_metrics_are_those_measured(tmp_path: Path) -> None:
    made = task(tmp_path)
    item = made.load("en", tmp_path)[0]
    assert [metric.name for metric in made.metrics] == list(made.measure(item, scored(-1.0, -2.0)))


# --- against lm-evaluation-harness


def test_the_same_as_lm_evaluation_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = pytest.importorskip("lm_eval.api.task")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    files = {"test": str(tmp_path / "rows.jsonl"), "dev": str(tmp_path / "dev.jsonl")}
    text = {"description": "Answer, please.\n\n", "doc": "Q: {{ q }}\nA:"}
    made = task(
        tmp_path,
        shots=2,
        shots_source={"files": "dev.jsonl"},
        description=text["description"],
        question=text["doc"],
    )
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row | {"id": row["q"]}) + "\n" for row in ROWS[::-1]))
    harness = api.ConfigurableTask(
        config={
            "task": "local",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path / "cache")},
            "output_type": "multiple_choice",
            "test_split": "test",
            "fewshot_split": "dev",
            "fewshot_config": {"sampler": "first_n"},
            "num_fewshot": 2,
            "description": text["description"],
            "doc_to_text": text["doc"],
            "doc_to_choice": "{{ options }}",
            "doc_to_target": "right",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
    )
    items = made.load("en", tmp_path)
    for number, (item, doc) in enumerate(zip(items, harness.test_docs(), strict=True)):
        context = harness.fewshot_context(doc, 2)
        requests = harness.construct_requests(doc, context)
        asked = question(item)
        assert [request.args for request in requests] == [(asked.context, each) for each in asked.continuations]
        for turn in range(6):
            logprobs = [-4 + 3 * math.sin(1 + number + 2.3 * turn * place) for place in range(1, len(requests) + 1)]
            theirs = harness.process_results(doc, [(logprob, False) for logprob in logprobs])
            ours = made.measure(item, scored(*logprobs))
            assert (ours["accuracy"].total, ours["accuracy_norm"].total) == (theirs["acc"], theirs["acc_norm"])
