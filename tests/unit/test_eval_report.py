"""Reports of evaluations: pages, pictures, files of values and terminal tables."""

import csv
import io
import random
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from clients.evaluation import UNMASKED, Band, Cell, Evaluation, Failure, Intervals, PlannedMask, TaskInfo, Throughput
from clients.reporting import FILES, summary_tables, write_all
from clients.reporting.changes import change_table
from clients.reporting.examples import FEW, FULL, Extent, changed, examples_section
from clients.reporting.files import cell_rows, write_items
from clients.reporting.overview import at_chance, overview_section
from clients.reporting.pictures import draw
from clients.task import Answers, Generate, Generated, Item, Metric, Question
from crane_serve.common.numbers.bootstrap import Estimate
from crane_serve.common.reports.content import Section
from crane_serve.common.reports.render import cut, html_page, visible
from tests.evaluations import LANGUAGES, Written, evaluation_of, made_answers, planned_masks

VOID = {"meta", "img", "input"}
ACCURACY = Metric(name="accuracy", title="Accuracy", unit="share", higher_is_better=True)
LOSS = Metric(name="loss", title="Loss", unit="nats", higher_is_better=False)
ATTACK = '<script>alert("x")</script>'


class Page(HTMLParser):
    """Checks that tags are balanced and headings in order, and collects what a page shows and loads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.levels: list[int] = []
        self.loaded: list[str] = []
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
        if tag == "th":
            assert given["scope"] in ("row", "col")
        if tag == "img":
            assert given["alt"]
        if re.fullmatch("h[1-6]", tag):
            self.levels.append(int(tag[1]))
        self.loaded += [given[name] or "" for name in ("src", "srcset", "data") if name in given]
        if "href" in given:
            self.links.add(given["href"] or "")
        if "id" in given:
            self.anchors.add(f"#{given['id']}")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def made() -> tuple[Evaluation, Answers]:
    masks = planned_masks(("en", "zh"), draws=2)
    answers = made_answers(masks, ("en", "zh"), items=8)
    failure = Failure(task="qa", mask="lape-en-0.01", language="en", item="q1", error="timed out | twice")
    return evaluation_of(answers, masks, failures=[failure]), answers


@pytest.fixture(scope="module")
def written(made: tuple[Evaluation, Answers], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as for missing glyphs and layouts that do not fit
        paths = write_all(*made, directory)
    assert {path.name for path in paths} == {path.name for path in directory.iterdir()}
    return directory


def small(
    cells: list[Cell],
    *,
    metric: Metric = ACCURACY,
    masks: tuple[PlannedMask, ...] = (),
    chance: dict[str, float] | None = None,
    languages: tuple[str, ...] = ("en", "zh"),
) -> Evaluation:
    """One task `t` with one metric."""
    names = {UNMASKED: PlannedMask(name=UNMASKED)} | {mask.name: mask for mask in masks}
    task = TaskInfo(
        name="t",
        kind="written",
        settings={"kind": "written", "name": "t", "shots": 3},
        metrics=(metric,),
        languages=languages,
        masks=tuple(names),
        items=dict.fromkeys(languages, 5),
        digests=dict.fromkeys(languages, "d" * 64),
        chance={metric.name: chance or {}},
    )
    return Evaluation(
        name="small",
        plan={},
        model={"name": "m", "weights_digest": "a" * 64, "sizes": [4, 4, 4]},
        server_version=None,
        languages=languages,
        masks=names,
        tasks=(task,),
        cells=tuple(cells),
        intervals=Intervals(seed=5),
        throughput=Throughput(answers=6, tokens=7, seconds=2.0, sessions=2),
    )


def cell(mask: str, language: str, change: float | None, *, metric: str = "accuracy", **more: object) -> Cell:
    estimate = None if change is None else Estimate(mean=change, low=change - 0.1, high=change + 0.1)
    return Cell(task="t", metric=metric, language=language, mask=mask, items=5, change=estimate).model_copy(update=more)


def test_every_file_is_written(written: Path) -> None:
    names = {path.name for path in written.iterdir()}
    assert set(FILES) <= names
    assert names - set(FILES) == {*(f"dose-response-{task}.png" for task in ("ppl", "pick", "qa")), "layers.png"}


def test_the_page_stands_alone_and_is_well_formed(written: Path) -> None:
    html = (written / "report.html").read_text()
    page = Page(html)
    assert page.loaded
    assert all(source.startswith("data:image/png;base64,") for source in page.loaded)
    assert "http:" not in html
    assert "https:" not in html
    assert "link" not in page.tags
    assert page.tags.count("script") == 1  # the filter
    assert page.links
    assert page.links <= page.anchors
    assert page.levels[0] == 1
    assert page.levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(page.levels, page.levels[1:], strict=False))


def test_sections_are_in_order(written: Path) -> None:
    headings = re.findall(r"^## (.*)$", (written / "report.md").read_text(), re.M)
    assert headings == [
        "What was asked",
        "What each mask changed",
        "Selectivity",
        "Dose-response",
        "Layers",
        "Answers that changed",
    ]


def test_both_pages_have_the_same_figures(made: tuple[Evaluation, Answers], written: Path) -> None:
    evaluation, _ = made
    page = Page((written / "report.html").read_text())
    markdown = (written / "report.md").read_text()
    for task in evaluation.tasks:
        for metric in task.metrics:
            for row in change_table(evaluation, task, metric).rows:
                for shown in row:
                    text = f"{shown.text} {shown.detail}".strip()
                    assert text in page.cells
                    assert text in markdown
    for picture in written.glob("*.png"):
        assert f"]({picture.name})" in markdown


def test_cells_of_the_heat_map() -> None:
    masks = (PlannedMask(name="a", method="x", language="en"), PlannedMask(name="b", method="x", language="zh"))
    evaluation = small(
        [
            cell("a", "en", -0.5, q_value=0.01, beyond_band=True, band=Band(mean=0, low=-0.1, high=0.1, draws=3)),
            cell("a", "zh", 0.25, q_value=0.01),
            cell("b", "en", -0.125, q_value=0.05, beyond_band=True),
        ],
        masks=masks,
    )
    table = change_table(evaluation, evaluation.tasks[0], ACCURACY)
    (name, first, second), (_, third, missing) = table.rows
    assert (table.columns, name.text) == (("mask", "en", "zh"), "a")
    assert (first.text, first.detail, first.strong) == ("-0.500 ●", "[-0.600, -0.400]", True)
    assert (second.text, second.strong, third.text) == ("+0.250 ○", False, "-0.125")
    assert (missing.text, missing.strong) == ("-", True)
    assert [shown.change for shown in (first, second, third, missing)] == [0.5, -0.25, 0.125, None]  # damage
    assert first.depth == 1.0
    assert 0 < third.depth < second.depth < 1


def test_colours_follow_damage_not_sign() -> None:
    masks = (PlannedMask(name="a", method="x", language="en"),)
    for metric, expected in ((ACCURACY, "gain"), (LOSS, "loss")):
        evaluation = small([cell("a", "en", 0.5, metric=metric.name)], metric=metric, masks=masks)
        html = html_page("t", [Section("s", tables=(change_table(evaluation, evaluation.tasks[0], metric),))])
        assert re.findall(r'<td class="strong (\w+)"', html) == [expected]


@pytest.mark.parametrize(
    ("metric", "level", "chance", "said"),
    [
        (ACCURACY, (0.5, 0.4, 0.6), 0.4, "at chance"),
        (ACCURACY, (0.5, 0.4, 0.6), 0.39, ""),
        (ACCURACY, (0.5, 0.4, 0.6), 0.61, "below chance"),
        (LOSS, (0.5, 0.4, 0.6), 0.39, "below chance"),
        (LOSS, (0.5, 0.4, 0.6), 0.61, ""),
        (ACCURACY, (0.5, None, None), 0.5, "at chance"),
        (ACCURACY, (0.5, None, None), 0.4, ""),
    ],
)
def test_chance(metric: Metric, level: tuple[float, float | None, float | None], chance: float, said: str) -> None:
    found = at_chance(Estimate(mean=level[0], low=level[1], high=level[2]), chance, metric)
    assert found == (f"{said}: a loss here cannot be seen" if said else "")


def test_what_was_asked() -> None:
    level = Estimate(mean=0.5, low=0.4, high=0.6)
    cells = [cell(UNMASKED, "en", None, level=level), cell(UNMASKED, "zh", None, level=level)]
    cells += [
        cell("a", "en", -0.1, p_value=0.01, q_value=0.02),
        cell("a", "zh", -0.1, p_value=0.04, q_value=0.08),
        cell("r", "zh", -0.1, p_value=0.01),  # a random control
    ]
    masks = (PlannedMask(name="a", budget=0.015, neurons=1234, seed=7), PlannedMask(name="r", seed=9))
    section = overview_section(small(cells, masks=masks, chance={"en": 0.5, "zh": 0.25}))
    text = " ".join(section.paragraphs)
    assert "t (Accuracy) in en: the unmasked model is at chance: a loss here cannot be seen." in text
    assert "6 answers, 7 tokens, in 2.0 s (3.0 answers per second, 2 sessions)" in text
    assert "2 changes were tested" in text
    assert "about 0.1 of them would have p < 0.05 by chance; 2 have" in text
    assert "of the 1 with q < 0.05, about 0.1 or fewer" in text  # 0.05
    assert "seed 5" in text
    tables = {part.title: part.tables[0] for part in section.parts}
    assert [shown.text for shown in tables["Masks"].rows[1]] == ["a", "-", "-", "1.5 %", "7", "1,234", "-"]
    settings = {row[0].text: row[1].text for row in tables["Settings"].rows}
    assert settings["model sizes"] == "4 x 3"
    assert settings["model weights_digest"] == "a" * 16
    assert settings["seeds of drawn masks"] == "7, 9"
    assert "shots: 3" in tables["Tasks"].rows[0][3].text


def test_values_in_csv_and_parquet(made: tuple[Evaluation, Answers], written: Path) -> None:
    evaluation, _ = made
    with (written / "cells.csv").open(newline="") as file:
        from_csv = list(csv.DictReader(file))
    from_parquet = pq.read_table(written / "cells.parquet").to_pylist()
    assert len(from_csv) == len(from_parquet) == len(evaluation.cells)
    assert from_parquet == cell_rows(evaluation)
    for text, row, of in zip(from_csv, from_parquet, evaluation.cells, strict=True):
        assert row == {**row, "task": of.task, "metric": of.metric, "language": of.language, "mask": of.mask}
        mask = evaluation.masks[of.mask]
        assert (row["mask_digest"], row["method"], row["budget"]) == (mask.digest, mask.method, mask.budget)
        assert row["own_language"] == (mask.language == of.language)
        assert text["change"] == ("" if of.change is None else str(of.change.mean))
        assert row["level_low"] == (None if of.level is None else of.level.low)
        if of.change is not None:
            assert row["damage"] == (of.change.mean if of.task == "ppl" else -of.change.mean)


def test_items_hold_every_answer_and_add_up_to_the_cells(made: tuple[Evaluation, Answers], written: Path) -> None:
    evaluation, answers = made
    rows = pq.read_table(written / "items.parquet").to_pylist()
    metrics = {"ppl": 2, "pick": 1, "qa": 1}
    assert len(rows) == sum(metrics[question.task] for question in answers.answers)
    for place in (("ppl", "bits_per_byte", "zh", "attnlrp-zh-0.05"), ("qa", "match", "en", UNMASKED)):
        found = [row for row in rows if (row["task"], row["metric"], row["language"], row["mask"]) == place]
        level = sum(row["total"] for row in found) / sum(row["weight"] for row in found)
        of = evaluation.cell(*place)
        assert of is not None
        assert of.level is not None
        assert level == pytest.approx(of.level.mean)
    (row,) = [row for row in rows if (row["item"], row["language"], row["mask"]) == ("q3", "en", "attnlrp-en-0.05")]
    item = answers.items["qa"]["en"][3]
    assert (row["prompt"], row["answer"], row["item_digest"]) == (item.prompt, "???", item.digest)
    assert row["mask_digest"] == evaluation.masks["attnlrp-en-0.05"].digest


def test_prompts_take_no_more_room_under_many_masks(tmp_path: Path) -> None:
    sizes = []
    rng = random.Random(0)
    items = tuple(Item(f"q{n}", "en", Generate(rng.randbytes(2000).hex(), 5), {"text": "x"}) for n in range(5))
    for count in (1, 20):
        masks = tuple(PlannedMask(name=f"m{n}") for n in range(count))
        evaluation = small([], masks=masks, languages=("en",))
        given = {
            Question("t", "en", item.id, mask): Generated(text="x", tokens=1, finish_reason="stop")
            for item in items
            for mask in evaluation.masks
        }
        write_items(evaluation, Answers({"t": Written(name="t")}, {"t": {"en": items}}, given), tmp_path / "items")
        sizes.append((tmp_path / "items").stat().st_size)
    assert sizes[0] > 5 * 2000
    assert sizes[1] - sizes[0] < 2000


def hostile(text: str) -> tuple[Evaluation, Answers]:
    """A task whose prompt, item, reference and answers are all `text`."""
    item = Item(text, "en", Generate(text, 5), {"text": text})
    masks = (PlannedMask(name="a", method="x", language="en"),)
    given = {
        Question("t", "en", text, UNMASKED): Generated(text=text, tokens=1, finish_reason="stop"),
        Question("t", "en", text, "a"): Generated(text=f"{text}2", tokens=1, finish_reason="stop"),
    }
    failure = Failure(task="t", mask="a", language="en", item=text, error=text)
    evaluation = small([cell("a", "en", -1.0)], masks=masks, languages=("en",)).model_copy(
        update={"name": text, "model": {"name": text}, "failures": (failure,)}
    )
    return evaluation, Answers({"t": Written(name="t")}, {"t": {"en": (item,)}}, given)


def test_markup_in_texts_is_harmless(tmp_path: Path) -> None:
    write_all(*hostile(ATTACK), tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert html.count("<script") == 1
    assert ATTACK not in html
    assert ATTACK in Page(html).cells
    markdown = (tmp_path / "report.md").read_text()
    assert not re.search(r"(?<!\\)<script", markdown)


def test_markdown_in_texts_is_harmless(tmp_path: Path) -> None:
    write_all(*hostile("a|b\n# c [d](javascript:e) ![f](g) **h** _i_ `j` $k$ &lt;"), tmp_path)
    lines = (tmp_path / "report.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith(r"| a\|b # c") and "→" in line]
    assert r"[d\](javascript:e) ![f\](g) \*\*h\*\* \_i\_ \`j\` \$k\$ \&lt;" in row
    assert len(re.findall(r"(?<!\\)\|", row)) == 7
    assert not any(line.startswith("# c") for line in lines)


def test_control_characters_are_visible(tmp_path: Path) -> None:
    write_all(*hostile("a\x00b\x1b[2J\u202ec\ud800d\x7f"), tmp_path)
    for name in ("report.html", "report.md"):
        content = (tmp_path / name).read_text()
        assert "a␀b␛[2J\ufffdc\ufffdd␡" in content
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", content)
    assert pq.read_table(tmp_path / "items.parquet").column("answer").to_pylist()[0].startswith("a\x00b\x1b[2J\u202ec?")


@pytest.mark.parametrize("text", ["plain", "tab\tand\nline", "中文 và tiếng Việt", "zero\u200dwidth"])
def test_ordinary_text_stays(text: str) -> None:
    assert visible(text) == text


def test_long_texts_are_cut_with_a_note(tmp_path: Path) -> None:
    text = "word " * 2000
    write_all(*hostile(text), tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert any(shown.endswith(" [... 9,200 more characters]") for shown in page.cells)
    assert max(map(len, page.cells)) < 900
    assert cut("abc", 3) == "abc"
    assert cut("abcd", 3) == "abc [... 1 more characters]"


def test_examples_are_those_whose_shown_answer_changed(made: tuple[Evaluation, Answers]) -> None:
    evaluation, answers = made
    mask = "lape-en-0.05"
    found = [example.item.id for example in changed(answers, "qa", "en", mask)]
    expected = [
        item.id
        for item in answers.items["qa"]["en"]
        if answers.answers[Question("qa", "en", item.id, mask)].text  # type: ignore[union-attr]
        != answers.answers[Question("qa", "en", item.id, UNMASKED)].text  # type: ignore[union-attr]
    ]
    assert found == expected
    assert 1 < len(found) < len(answers.items["qa"]["en"])
    section = examples_section(evaluation, answers, Extent(1, 100))
    assert [part.title for part in section.parts] == ["pick", "qa"]  # perplexity has nothing to read
    (of_mask,) = [part for part in section.parts[1].parts if part.title == mask]
    table = of_mask.tables[0]
    assert table.title == (
        f"en, the mask's own language: 1 of {len(found)} changed answers; {len(found) - 1} more are in items.parquet"
    )
    prompt = answers.items["qa"]["en"][int(found[0][1:])].prompt
    assert [shown.text for shown in table.rows[0]] == [
        found[0],
        prompt,
        "In the hills.",
        "In the hills.",
        "???",
        "1 → 0",
    ]
    assert table.rows[0][1].language == "en"


def test_few_examples_are_of_the_own_language(made: tuple[Evaluation, Answers]) -> None:
    section = examples_section(*made, FEW)
    tables = [table for part in section.parts for mask in part.parts for table in mask.tables]
    assert tables
    assert all("own language" in table.title and len(table.rows) <= FEW.items for table in tables)
    more = examples_section(*made, FULL)
    assert sum(len(mask.tables) for part in more.parts for mask in part.parts) > len(tables)


def test_pictures_hold_something_and_are_not_cut_off(written: Path) -> None:
    for path in written.glob("*.png"):
        pixels = matplotlib.image.imread(path)[..., :3]
        assert (pixels[[0, -1]] == 1).all(), f"{path.name} is cut off above or below"
        assert (pixels[:, [0, -1]] == 1).all(), f"{path.name} is cut off at a side"
        assert (pixels < 0.9).any(axis=2).mean() > 0.01, f"{path.name} is empty"


def test_pictures_of_odd_names_and_values() -> None:
    masks = (PlannedMask(name="中$x_{$", method="x", language="en"), PlannedMask(name="b", method="y"))
    for change in (0.0, 1e9, -1e-9):
        evaluation = small([cell("中$x_{$", "en", change)], masks=masks)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            drawn = draw(evaluation)
        assert [len(pictures) for pictures in drawn.values()] == [1, 0, 0]


def test_methods_of_one_budget_have_no_dose_response(tmp_path: Path) -> None:
    masks = {name: mask for name, mask in planned_masks(draws=0).items() if mask.budget in (None, 0.01)}
    answers = made_answers(masks, items=3)
    write_all(evaluation_of(answers, masks), answers, tmp_path)
    assert not list(tmp_path.glob("dose-response*"))


def test_an_evaluation_without_masks(tmp_path: Path) -> None:
    masks = {UNMASKED: PlannedMask(name=UNMASKED)}
    answers = made_answers(masks, items=3)
    write_all(evaluation_of(answers, masks), answers, tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert "No mask was made for one of several languages" in markdown
    assert "No change was tested" in markdown
    Page((tmp_path / "report.html").read_text())


def test_an_evaluation_without_answers(tmp_path: Path) -> None:
    masks = planned_masks(draws=0)
    answers = made_answers(masks, items=2)
    nothing = Answers(answers.tasks, answers.items, {})
    write_all(evaluation_of(nothing, masks), nothing, tmp_path)
    Page((tmp_path / "report.html").read_text())
    assert pq.read_table(tmp_path / "cells.parquet").num_rows == pq.read_table(tmp_path / "items.parquet").num_rows == 0


def test_terminal_tables(made: tuple[Evaluation, Answers]) -> None:
    evaluation, _ = made
    tables = summary_tables(evaluation)
    assert len(tables) == len(evaluation.tasks)
    out = io.StringIO()
    Console(file=out, width=200).print(tables[0])
    found = evaluation.cell("ppl", "nats_per_token", "zh", "attnlrp-zh-0.05")
    assert found is not None
    assert found.change is not None
    assert f"{found.change.mean:+.2f}" in out.getvalue()
    assert all(language in out.getvalue() for language in LANGUAGES if language != "vi")


def test_names_have_no_effect_on_the_terminal() -> None:
    mask = PlannedMask(name="[red]a[/red]\x1b[2J", method="x")
    out = io.StringIO()
    Console(file=out, width=200).print(summary_tables(small([cell(mask.name, "en", 0.1)], masks=(mask,)))[0])
    assert "[red]a[/red]␛[2J" in out.getvalue()
