"""Pass rates by line and by word, and the language that takes over, by cases worked out by hand."""

from pathlib import Path

import pytest

from clients.analysis import analyse
from clients.analysis.substitutions import substitutions_of
from clients.compare import compare
from clients.evaluation import Evaluation, PlannedMask, Substitution, TaskInfo, Throughput
from clients.language_confusion import UNIDENTIFIED, Confusion
from clients.reporting.comparison import comparison_sections
from clients.reporting.substitution import substitution_section
from clients.task import Answers, Generate, Generated, Item, Question
from clients.tasks.open_generation import OpenGeneration
from crane_serve.common.reports.render import markdown_page

ENGLISH = "The ferry leaves the harbour every morning, and most of the people on board know each other well."
VIETNAMESE = "Mỗi buổi sáng chuyến phà rời bến cảng, và hầu hết hành khách trên tàu đều quen biết nhau từ lâu."
CHINESE = "渡轮每天早上离开港口，船上的大多数乘客彼此都很熟悉，他们已经认识很多年了。"
JAPANESE = "フェリーは毎朝港を出ます。乗客のほとんどはお互いをよく知っています。"
RUSSIAN = "Паром каждое утро уходит из гавани, и почти все пассажиры давно знают друг друга."


@pytest.mark.parametrize(
    ("language", "text", "substitute"),
    [
        ("en", ENGLISH, None),
        ("en_us", f"{ENGLISH}\n\n{ENGLISH}", None),
        ("en", VIETNAMESE, "vi"),
        ("en", f"{ENGLISH}\n{VIETNAMESE}", "vi"),
        ("en", f"{CHINESE}\n{ENGLISH}\n{VIETNAMESE}", "vi"),  # 100 characters of Vietnamese, 37 of Chinese
        ("en", f"{CHINESE}\n{CHINESE}\n{CHINESE}\n{VIETNAMESE}", "zh"),  # 111 of Chinese
        ("zh", f"{CHINESE}\n{ENGLISH}", "en"),
        ("en", f"{ENGLISH}\nOui, bien sûr.", None),  # a line of three words is not judged
        ("en", "Oui, bien sûr que oui.", "fr"),  # one of five is
        ("zh", "好的，当然。", None),  # shorter, but there is no other
        ("en", f"1 2 3 4 5 6 7\n{ENGLISH}", None),  # numbers are in no language
        ("en", "1 2 3 4 5 6 7", UNIDENTIFIED),
        ("en", "", UNIDENTIFIED),
        ("en", " \n ", UNIDENTIFIED),
    ],
)
def test_lines(language: str, text: str, substitute: str | None) -> None:
    confusion = Confusion.of(text, language)
    assert (confusion.by_line, confusion.substitute) == (substitute is None, substitute)
    assert (confusion.by_word is None) == (substitute is not None)


@pytest.mark.parametrize(
    ("language", "text", "by_word"),
    [
        ("zh", CHINESE, True),
        ("zh", f"{CHINESE}船上有 people 。", False),
        ("zh", f"{CHINESE}船上有 DNA 和 iPhone 和 Einstein ，长 3 km 。", True),  # abbreviations, names and units
        ("zh", f"{CHINESE}选 a 或 Ｂ。", True),
        ("zh", f"{CHINESE}フェリー。", False),
        ("ja", f"{JAPANESE}{CHINESE[:2]}", True),  # Chinese characters are Japanese ones as well
        ("en", ENGLISH, True),
        ("en", f"{ENGLISH} It is called 渡轮 there.", False),
        ("en", f"{ENGLISH} It is called паром there.", False),
        ("en", f"{ENGLISH} Ils savent naturellement nager.", True),  # the same letters: not told
        ("vi", VIETNAMESE, True),
        ("ru", RUSSIAN, True),
        ("ru", f"{RUSSIAN} Они people.", False),
        ("ru", f"{RUSSIAN} Угол α равен π.", True),
    ],
)
def test_words(language: str, text: str, by_word: bool) -> None:
    assert Confusion.of(text, language) == Confusion(True, by_word, None)


TASK = OpenGeneration.model_validate({"name": "talk", "source": {"files": "{lang}.jsonl"}})
ITEMS = tuple(Item(str(number), "en", Generate("?", 8)) for number in range(4))
MIXED = f"{ENGLISH} It is called 渡轮 there."
TEXTS = {"none": [ENGLISH, ENGLISH, ENGLISH, MIXED], "zh": [CHINESE, VIETNAMESE, "", MIXED], "vi": [VIETNAMESE] * 3}


def answers(texts: dict[str, list[str]]) -> Answers:
    given = {
        Question("talk", "en", item.id, mask): Generated(text=text, tokens=1, finish_reason="stop")
        for mask, of_mask in texts.items()
        for item, text in zip(ITEMS, of_mask, strict=False)
    }
    return Answers({"talk": TASK}, {"talk": {"en": ITEMS}}, given)


def evaluation(texts: dict[str, list[str]], name: str = "first") -> Evaluation:
    of = answers(texts)
    masks = {mask: PlannedMask(name=mask) for mask in texts}
    task = TaskInfo(name="talk", kind="open_generation", settings={}, metrics=TASK.metrics, languages=("en",),
                    masks=tuple(texts), items={"en": 4}, digests={})  # fmt: skip
    return Evaluation(name=name, plan={}, model={}, server_version=None, languages=("en",), masks=masks,
                      tasks=(task,), cells=analyse(of, masks).cells, substitutions=substitutions_of(of, masks),
                      throughput=Throughput(answers=0, tokens=0, seconds=0, sessions=0))  # fmt: skip


@pytest.mark.parametrize(
    ("mask", "metric", "level"),
    [
        ("none", "line_pass", 1.0),
        ("none", "word_pass", 3 / 4),
        ("none", "substituted", 0.0),
        ("zh", "line_pass", 1 / 4),
        ("zh", "word_pass", 0.0),  # of the one that passes by line
        ("zh", "substituted", 2 / 4),  # the empty one is in no language
        ("vi", "line_pass", 0.0),
        ("vi", "substituted", 1.0),
    ],
)
def test_rates(mask: str, metric: str, level: float) -> None:
    cell = evaluation(TEXTS).cell("talk", metric, "en", mask)
    assert cell is not None
    assert cell.level is not None
    assert cell.level.mean == pytest.approx(level)


def test_where_no_text_passes_by_line_words_have_no_rate() -> None:
    cell = evaluation(TEXTS).cell("talk", "word_pass", "en", "vi")
    assert cell is None or (cell.level, cell.change) == (None, None)


def test_languages_that_take_over() -> None:
    assert evaluation(TEXTS).substitutions == (
        Substitution(task="talk", language="en", mask="none", answers=4, languages={}),
        Substitution(task="talk", language="en", mask="zh", answers=4, languages={UNIDENTIFIED: 1, "vi": 1, "zh": 1}),
        Substitution(task="talk", language="en", mask="vi", answers=3, languages={"vi": 3}),
    )


def test_they_are_in_the_report_and_in_the_results(tmp_path: Path) -> None:
    of = evaluation(TEXTS)
    of.write(tmp_path)
    assert Evaluation.read(tmp_path) == of
    section = substitution_section(of)
    assert section is not None
    lines = markdown_page("", [section]).splitlines()
    assert "| mask | failing | vi | unidentified | zh |" in lines
    assert "| none | 0 of 4 | - | - | - |" in lines
    assert "| zh | 3 of 4 | 33.3 % | 33.3 % | 33.3 % |" in lines
    assert "| vi | 3 of 3 | 100 % | - | - |" in lines
    assert substitution_section(evaluation({"none": [ENGLISH], "zh": [ENGLISH]})) is None


def test_they_are_compared() -> None:
    second = {"none": [ENGLISH] * 4, "zh": [ENGLISH, CHINESE, CHINESE, ENGLISH], "fr": [CHINESE] * 4}
    comparison = compare(evaluation(TEXTS), evaluation(second, "second"))
    assert [metric.name for metric in comparison.metrics["talk"]][5:] == ["line_pass", "word_pass", "substituted"]
    lines = markdown_page("", comparison_sections(comparison)).splitlines()
    start = lines.index("## Which language takes over")
    assert "| zh | 3 of 4 | 33.3 % | 33.3 % | 33.3 % |" in lines[start:]
    assert "| zh | 2 of 4 | 100 % |" in lines[start:]
    assert not [line for line in lines[start:] if line.startswith(("| vi |", "| fr |"))], "masks of one of them only"
