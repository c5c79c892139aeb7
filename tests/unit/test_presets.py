"""Templates, presets on hand-written rows of their data sets' columns, and tasks as plan files give them."""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from clients import presets
from clients.errors import EvaluationError
from clients.row_task import RowTask
from clients.task import Generate, Item, ScoreContinuations
from clients.tasks import parse_task
from clients.tasks.choice import Choice
from clients.tasks.perplexity import Perplexity
from clients.templates import Template

# --- templates


def test_a_template_makes_text() -> None:
    assert Template("{{ a }} & {{ b.c }}\n").render({"a": "<x>", "b": {"c": 2}}) == "<x> & 2\n"
    assert Template("{{ a }}{{ lang }}").render({"a": 1, "lang": "en"}, lang="vi") == "1vi"
    assert Template("{{ a | regex_replace('[0-9]', '#') }}").render({"a": "x12"}) == "x##"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{{ a }}", ["x", 1]),
        (" {{- a -}} ", ["x", 1]),
        ("{{ a | length + 1 }}", 3),
        ("{{ a | map('string') }}", ["x", "1"]),
        ("{{ (1, none, true) }}", [1, None, True]),
        ("{{ {'k': a} }}", {"k": ["x", 1]}),
        ("{{ a[0] }}{{ a[1] }}", "x1"),
        ("{{ a[0] }}!", "x!"),
        ("x", "x"),
        ("", ""),
        ("{% if a %}yes{% endif %}", "yes"),
        ("{{ '}}' }}", "}}"),
    ],
)
def test_the_value_of_a_template(text: str, value: object) -> None:
    assert Template(text).value({"a": ["x", 1]}) == value


@pytest.mark.parametrize("text", ["{{ b }}", "{{ b }}!", "{{ [a, b] }}", "{{ a.b }}", "{{ b | length }}"])
def test_a_field_that_is_not_there(text: str) -> None:
    for method in (Template(text).render, Template(text).value):
        if text == "{{ [a, b] }}" and method.__name__ == "render":
            continue  # a list shows its entries by their repr
        with pytest.raises(EvaluationError, match=r"^template \".*\": .*'b'.*; the row has id, a$"):
            method({"id": "1", "a": "x"})


def test_templates_that_are_broken_or_reach_out() -> None:
    with pytest.raises(EvaluationError, match=r'template "\{\{ a": unexpected end of template'):
        Template("{{ a")
    for text in ("{{ a.__class__.__mro__ }}", "{{ a.append(1) }}", "{{ range(1000000) | list }}", "{{ 1 / 0 }}"):
        with pytest.raises(EvaluationError, match="; the row has a"):
            Template(text).value({"a": [1]})


def test_a_template_as_a_field() -> None:
    class Holder(BaseModel):
        text: Template = Template("{{ a }}")

    assert isinstance(Holder(text="x").text, Template)  # type: ignore[arg-type]
    assert Holder(text="x").model_dump(mode="json") == {"text": "x"}  # type: ignore[arg-type]
    assert Holder(text="{{ a }}").model_dump(exclude_defaults=True) == {}  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="unexpected 'end of template'"):
        Holder(text="{{")  # type: ignore[arg-type]


# --- presets

MMLU = {"question": " Which? ", "choices": ["w", "x", "y", "z"], "answer": 2, "subject": "high_school_biology"}
C_EVAL = {"question": "哪个？", "A": "甲", "B": "乙", "C": "丙", "D": "丁", "answer": "D", "config": "law"}
GLOBAL_MMLU = {
    "question": "Cái nào?",
    "option_a": "w",
    "option_b": "x",
    "option_c": "y",
    "option_d": "z",
    "answer": "B",
    "sample_id": "virology/test/1",
    "subject": "virology",
    "subject_category": "Medical",
}
BELEBELE = {
    "link": "u",
    "question_number": 1,
    "flores_passage": "Đoạn.",
    "question": "Gì?",
    "correct_answer_num": "4",
    "mc_answer1": "w",
    "mc_answer2": "x",
    "mc_answer3": "y",
    "mc_answer4": "z",
    "dialect": "vie_Latn",
    "ds": "d",
}
M3EXAM = {
    "question_text": "哪个？",
    "background": "",
    "answer_text": "B",
    "options": ["A. 甲", "B. 乙", "C. 丙"],
    "language": "chinese",
    "level": "low",
    "subject": "chinese",
    "subject_category": "language",
}
XCOPA = {
    "premise": "Người đàn ông bật vòi.",
    "choice1": "Bồn đầy.",
    "choice2": "Nước chảy.",
    "question": "effect",
    "label": 1,
    "idx": 3,
    "changed": False,
}
COPA = {"premise": "The man fell! ", "choice1": "It rained.", "choice2": "He sang.", "question": "cause", "label": 0}
XNLI = {"premise": "Anh ngủ", "hypothesis": "Anh thức.", "label": 2}
MGSM = {"question": "2 + 3 = ?", "answer": None, "answer_number": 5, "equation_solution": None}
XQUAD = {"context": "In 1066.", "question": "When?", "answers": ["1066"], "title": "T"}


def asked(tmp_path: Path, name: str, language: str, rows: list[dict[str, Any]], shots: int = 0) -> tuple[Item, ...]:
    """The items that a preset makes of rows in a file."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = parse_task({"preset": name, "source": {"files": "rows.jsonl"}, "shots": shots}, "task")
    return task.load(language, tmp_path)


@pytest.mark.parametrize(
    ("name", "language", "row", "context", "right"),
    [
        (
            "mmlu",
            "en",
            MMLU,
            "The following are multiple choice questions (with answers) about high school biology.\n\n"
            "Which?\nA. w\nB. x\nC. y\nD. z\nAnswer:",
            " C",
        ),
        (
            "c-eval",
            "zh",
            C_EVAL,
            "以下是中国关于法学的单项选择题，请选出其中的正确答案。\n\n哪个？\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案：",
            " D",
        ),
        ("global-mmlu", "vi", GLOBAL_MMLU, "Cái nào?\nA. w\nB. x\nC. y\nD. z\nAnswer:", " B"),
        ("belebele", "vi", BELEBELE, "P: Đoạn.\nQ: Gì?\nA: w\nB: x\nC: y\nD: z\nAnswer:", " D"),
        ("m3exam", "zh", M3EXAM, "哪个？\nA. 甲\nB. 乙\nC. 丙\n答案：", " B"),
        (
            "m3exam",
            "en",
            M3EXAM | {"background": "Read. ", "answer_text": "3", "options": ["(1) p", "(2) q", "(3) r", "(4) s"]},
            "Read.\n哪个？\n(1) p\n(2) q\n(3) r\n(4) s\nAnswer:",
            " 3",
        ),
        ("xcopa", "vi", XCOPA, "Người đàn ông bật vòi vì vậy", " nước chảy."),
        ("copa", "vi", XCOPA, "Người đàn ông bật vòi vì vậy", " nước chảy."),
        ("copa", "en", COPA, "The man fell because", " it rained."),
        ("copa", "zh", COPA | {"premise": "他摔了。", "choice1": "下雨了。"}, "他摔了 因为", " 下雨了。"),
        ("xnli", "vi", XNLI, "Anh ngủ, đúng?", " Không, Anh thức."),
        ("xnli", "en", XNLI | {"label": 0}, "Anh ngủ, right?", " Yes, Anh thức."),
    ],
)
def test_choice_presets(
    tmp_path: Path, name: str, language: str, row: dict[str, Any], context: str, right: str
) -> None:
    (item,) = asked(tmp_path, name, language, [row])
    assert isinstance(item.request, ScoreContinuations)
    assert item.request.context == context
    index = item.reference["answer"]
    assert isinstance(index, int)
    assert item.request.continuations[index] == right


def test_questions_whose_right_option_is_missing_are_left_out_of_m3exam(tmp_path: Path) -> None:
    rows = [M3EXAM | {"id": key, "answer_text": key} for key in ("A", "D", "4", "3", "", "0", "c")]
    assert [item.id for item in asked(tmp_path, "m3exam", "zh", [row for row in rows if row["id"]])] == ["A", "3", "c"]


def test_presets_with_examples_of_the_same_subject(tmp_path: Path) -> None:
    rows = [MMLU | {"question": f"{subject} {n}", "subject": subject} for n in (1, 2) for subject in ("anatomy", "law")]
    item = asked(tmp_path, "mmlu", "en", rows, shots=1)[1]
    options = "A. w\nB. x\nC. y\nD. z\nAnswer:"
    assert item.prompt == (
        "The following are multiple choice questions (with answers) about law.\n\n"
        f"law 2\n{options} C\n\nlaw 1\n{options}"
    )


def test_generation_presets(tmp_path: Path) -> None:
    (item,) = asked(tmp_path, "xquad", "en", [XQUAD])
    assert isinstance(item.request, Generate)
    assert item.request.prompt == "Context: In 1066.\nQuestion: When?\nAnswer:"
    assert item.reference == {"answers": ["1066"]}
    example = MGSM | {"question": "Question: 1 + 1 = ?", "answer": "Step: 2", "answer_number": 2}
    item = asked(tmp_path, "mgsm", "en", [MGSM, example], shots=1)[0]
    assert isinstance(item.request, Generate)
    assert item.request.prompt == "Question: 1 + 1 = ?\nAnswer: 2\n\nQuestion: 2 + 3 = ?\nAnswer:"
    assert item.reference == {"answers": ["5"]}


def test_all_presets_parse_and_the_words_of_each_serve_its_languages() -> None:
    assert presets.names() == (
        *("belebele", "c-eval", "copa", "global-mmlu", "m3exam", "mgsm", "mmlu", "xcopa", "xnli", "xquad"),
    )
    for name in presets.names():
        given: dict[str, Any] = {"preset": name}
        if "source" not in presets.load(name):
            given["source"] = {"files": "x.jsonl"}
        task = parse_task(given, "task")
        assert isinstance(task, RowTask)
        assert task.name == name
        wordings = {frozenset(words) for words in task.words.values()}
        assert len(wordings) <= 1, f"{name}: languages have different words"
        assert not task.source.codes or not task.words or set(task.source.codes) == set(task.words)


@pytest.mark.parametrize("name", presets.names())
def test_presets_read_data_files_of_commits_or_main(name: str) -> None:
    """No branch that the Hub makes and drops by itself, and one state of the data for questions and examples."""
    settings = presets.load(name)
    sources = [settings[key] for key in ("source", "shots_source") if key in settings]
    assert len({(source.get("dataset"), source.get("revision")) for source in sources}) <= 1
    for source in sources:
        assert re.fullmatch("[0-9a-f]{40}", source.get("revision", "0" * 40))
    if name in ("c-eval", "mgsm"):  # their main branches have had loading scripts
        assert all("revision" in source for source in sources)


def test_presets_are_in_the_package_data() -> None:
    assert all((files(presets) / f"{name}.yaml").is_file() for name in presets.names())
    with pytest.raises(EvaluationError, match="unknown preset 'nope'; there are belebele, c-eval, "):
        presets.load("nope")


# --- tasks of a plan


def test_a_task_by_kind() -> None:
    task = parse_task({"kind": "perplexity", "source": {"corpus": "embedded"}}, "task 1")
    assert isinstance(task, Perplexity)
    assert task.name == "perplexity"
    assert parse_task({"kind": "perplexity", "name": "mine", "source": {"corpus": "embedded"}}, "t").name == "mine"


def test_settings_of_a_task_make_it_again() -> None:
    for name in ("mmlu", "m3exam", "belebele", "mgsm"):
        task = parse_task({"preset": name, "limit": 5}, "task")
        settings = json.loads(json.dumps(task.settings()))
        assert parse_task(settings, "task") == task


def test_a_plan_overrides_a_preset() -> None:
    task = parse_task({"preset": "mmlu", "name": "law", "limit": 10, "source": {"config": "law"}}, "task 1")
    assert isinstance(task, Choice)
    assert (task.name, task.limit, task.shots) == ("law", 10, 5)
    assert task.source.model_dump(exclude_defaults=True) == {
        "dataset": "cais/mmlu",
        "config": "law",
        "split": "test",
    }
    assert task.shots_source is not None
    assert parse_task({"preset": "mmlu", "shots_source": None}, "task 1").settings().get("shots_source") is None


def test_a_source_elsewhere_drops_what_belonged_to_the_dataset() -> None:
    task = parse_task({"preset": "belebele", "source": {"files": "{lang}.jsonl"}}, "task 1")
    assert isinstance(task, Choice)
    assert task.source.model_dump(exclude_defaults=True) == {
        "files": "{lang}.jsonl",
        "id": ("link", "question_number"),
    }
    moved = parse_task({"preset": "mmlu", "source": {"files": "x.csv", "split": "mine"}}, "task 1")
    assert isinstance(moved, Choice)
    assert moved.shots_source is None
    assert moved.source.split == "mine"


def test_words_are_added_to_those_of_a_preset() -> None:
    words = {"it": {"cause": "perché", "effect": "quindi"}}
    task = parse_task({"preset": "copa", "source": {"files": "x.jsonl"}, "words": words}, "task 1")
    assert isinstance(task, Choice)
    assert set(task.words) == {"en", "vi", "zh", "it"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{}", r"expected a kind \(choice, cloze, .*perplexity.*\) or a preset \(belebele, .*xquad\)"),
        ("{kind: nope}", "unknown kind of task 'nope'; there are choice, cloze, "),
        ("{preset: nope}", "unknown preset 'nope'; there are belebele, "),
        ("{kind: perplexity}", "source: missing, but perplexity needs it"),
        ("{preset: copa}", "source: missing, but choice needs it"),
        (
            "{kind: perplexity, source: {corpus: embedded}, texts: a}",
            "texts: unknown setting; there are name, languages",
        ),
        ("{kind: perplexity, source: {corpus: a, path: b}}", "source.path: unknown setting; there are files, corpus, "),
        ("{preset: mmlu, shots_source: {path: b}}", "shots_source.path: unknown setting; there are files, corpus, "),
        ("{kind: perplexity, source: {}}", "source: expected one of files, corpus, dataset; found none"),
        (
            "{kind: perplexity, source: {corpus: a}, limit: 0}",
            "limit: Input should be greater than or equal to 1; found 0",
        ),
        ("{preset: mmlu, shots: 33}", "shots: Input should be less than or equal to 32; found 33"),
        ("{preset: mmlu, pick: last}", "pick: Input should be 'spread' or 'first'; found 'last'"),
        ("{preset: mmlu, question: '{{ a'}", 'question: template "{{ a": unexpected end of template'),
        ("{preset: mmlu, choices: [A]}", "choices: "),
        ("{preset: mmlu, name: Not a name}", "name: String should match pattern"),
        ("{kind: perplexity, source: here}", "source: Input should be a valid dictionary"),
    ],
)
def test_tasks_that_cannot_be_used(given: str, message: str) -> None:
    with pytest.raises(EvaluationError) as caught:
        parse_task(yaml.safe_load(given), "plan.yaml, task 2")
    text = str(caught.value)
    assert text.startswith("plan.yaml, task 2: ")
    assert "\n" not in text
    said = text.removeprefix("plan.yaml, task 2: ")
    assert said.startswith(message) or re.match(message, said)
