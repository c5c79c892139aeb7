"""Tables, pages and pictures of validations made by hand."""

import csv
import warnings
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import matplotlib.image
import pytest

from crane_serve.common.masks import Fingerprint
from crane_serve.common.numbers.bootstrap import Estimate
from crane_serve.common.numbers.langspec import Form
from relevance.validation.pictures import draw
from relevance.validation.report import report_sections, write_all
from relevance.validation.result import CHOICE, MATCHED, REPORT, MaskEffect, Overlap, Texts, Validation, ValidationPlan
from relevance.validation.tables import (
    Cell,
    Draws,
    Table,
    budget_tables,
    by_budget,
    effects_table,
    layers_table,
    mask_table,
    matched_table,
    number_text,
    overlap_tables,
    stability_table,
)

LAYERS, WIDTH = 2, 500
PICTURES = {"collateral.png", "dose-response.png", "trade-off.png", "overlap.png", "layers.png"}


def estimate(mean: float, spread: float | None = 0.1) -> Estimate:
    return Estimate(
        mean=mean, low=None if spread is None else mean - spread, high=None if spread is None else mean + spread
    )


def effect(
    method: str,
    language: str,
    changes: Sequence[float],
    *,
    languages: Sequence[str] = ("en", "zh"),
    rule: str = "budget",
    seed: int | None = None,
    neurons: int = 10,
    collateral: float | None = 0.5,
    spread: float | None = 0.1,
    f1: tuple[float, float] = (0.25, 0.75),
) -> MaskEffect:
    return MaskEffect(
        method=method,
        language=language,
        rule=rule,
        seed=seed,
        budget=neurons / (LAYERS * WIDTH),
        neurons=neurons,
        digest="0" * 64,
        changes={name: estimate(change, spread) for name, change in zip(languages, changes, strict=True)},
        collateral=None if collateral is None else estimate(collateral, spread),
        f1=dict(zip((Form.RELATIVE, Form.ABSOLUTE), f1, strict=True)),
    )


def validation(
    effects: Sequence[MaskEffect] = (),
    *,
    methods: tuple[str, ...] = ("attnlrp", "random"),
    languages: tuple[str, ...] = ("en", "zh"),
    budgets: tuple[float, ...] = (0.01, 0.05),
    match: float | None = 1.0,
    unreached: Sequence[tuple[str, str]] = (),
    overlaps: Sequence[Overlap] = (),
    stability: dict[str, dict[str, float]] | None = None,
    layers: dict[str, dict[str, list[int]]] | None = None,
) -> Validation:
    texts = {
        part: Texts(
            corpus_digest="c" * 64,
            split=part,
            documents=dict.fromkeys(languages, 20),
            tokens=dict.fromkeys(languages, 1234),
            nats_per_token=dict.fromkeys(languages, 3.456),
        )
        for part in (CHOICE, REPORT)
    }
    return Validation(
        fingerprint=Fingerprint(
            architecture="TinyForCausalLM",
            layers=LAYERS,
            hidden_size=8,
            intermediate_sizes=(WIDTH,) * LAYERS,
            config_digest="a" * 64,
            weights_digest="b" * 64,
        ),
        languages=languages,
        dtype="float32",
        plan=ValidationPlan(methods=methods, budgets=budgets, effect=match, matched_to="attnlrp"),
        relevance_digest="d" * 64,
        texts=texts,
        effects=list(effects),
        unreached=list(unreached),
        empty=[],
        overlap_budget=0.01,
        overlaps=list(overlaps),
        stability=stability or {},
        layers=layers or {},
    )


def small() -> Validation:
    """Two languages, a method and three draws of random neurons, everything there is."""
    effects = [
        effect("attnlrp", language, changes, neurons=neurons)
        for neurons in (10, 50)
        for language, changes in (("en", (1.234, 0.2)), ("zh", (-0.004, neurons / 10)))
    ]
    for seed, change in enumerate((0.1, 0.2, 0.6)):
        for rule in ("budget", "like:attnlrp"):
            collateral = None if seed == 0 else change
            effects += [
                effect("random", "en", (change, -change), rule=rule, seed=seed, neurons=10, collateral=collateral),
                effect("random", "zh", (0.0, change), rule=rule, seed=seed, neurons=10, collateral=0.0),
            ]
    effects += [effect("attnlrp", "en", (2.0, 0.1), rule="published", neurons=33, spread=None)]
    effects += [effect("attnlrp", language, (1.0, 1.0), rule=MATCHED, neurons=7) for language in ("en", "zh")]
    effects += [
        effect("random", language, (1.0, 1.0), rule=MATCHED, neurons=700 + seed, seed=seed, collateral=collateral)
        for language in ("en", "zh")
        for seed, collateral in enumerate((0.8, 1.0, 1.5))
    ]
    names = [(method, language) for method in ("attnlrp", "lape") for language in ("en", "zh")]
    same = {"en": 0.1, "zh": 0.3}
    overlaps = [
        Overlap(first=one, second=other, budget=0.01, jaccard=same[one[1]] if one[1] == other[1] else 0.05)
        for place, one in enumerate(names)
        for other in names[place + 1 :]
    ]
    return validation(
        effects,
        overlaps=overlaps,
        stability={"attnlrp": {"en": 0.5, "zh": 0.75}},
        layers={"attnlrp": {"en": [4, 6], "zh": [10, 0]}},
    )


def large(languages: tuple[str, ...] = ("en", "vi", "zh"), methods: int = 4) -> Validation:
    """Methods of growing strength, at three budgets and matched."""
    names = tuple(f"method-{number}" for number in range(methods))
    effects, overlaps = [], []
    for number, method in enumerate(names, 1):
        for place, language in enumerate(languages):
            for rule, neurons in (("budget", 10), ("budget", 20), ("budget", 50), (MATCHED, 15)):
                changes = [neurons * number / (10 if other == language else 40) for other in languages]
                of = effect(method, language, changes, languages=languages, rule=rule, neurons=neurons, spread=0.02)
                effects.append(of.model_copy(update={"collateral": estimate(number / 4 + place / 10)}))
        overlaps += [
            Overlap(first=(one, language), second=(method, language), budget=0.01, jaccard=0.4)
            for one in names[: number - 1]
            for language in languages
        ]
    layers = {method: {language: [3, 7] for language in languages} for method in names}
    return validation(
        effects,
        methods=names,
        languages=languages,
        budgets=(0.01, 0.02, 0.05),
        overlaps=overlaps,
        layers=layers,
    )


def shown(cell: Cell) -> str:
    return f"{cell.text} {cell.detail}".strip()


def row(table: Table, *first: str) -> dict[str, str]:
    """The one row that begins with `first`, by column."""
    (found,) = [cells for cells in table.rows if tuple(cell.text for cell in cells[: len(first)]) == first]
    return {column: shown(cell) for column, cell in zip(table.columns, found, strict=True)}


def test_numbers() -> None:
    assert number_text(-0.004, signed=True) == "+0.00"
    assert number_text(-0.004) == "0.00"
    assert number_text(1234.5678, signed=True) == "+1,234.57"
    assert number_text(0.12345, 3) == "0.123"


def test_a_row_of_a_method_without_draws() -> None:
    table = budget_tables(small())[0]
    assert table.title == "1 % of all neurons (10)"
    assert row(table, "attnlrp", "en") == {
        "method": "attnlrp",
        "mask": "en",
        "en": "+1.23 [+1.13, +1.33]",
        "zh": "+0.20 [+0.10, +0.30]",
        "mean of the others": "+0.20",
        "collateral": "0.50 [0.40, 0.60]",
        "F1 relative": "0.25",
        "F1 absolute": "0.75",
        "neurons": "10 (1 %)",
    }
    (cells,) = [cells for cells in table.rows if cells[0].text == "attnlrp" and cells[1].text == "zh"]
    assert [cell.strong for cell in cells[2:4]] == [False, True]
    assert [cell.change for cell in cells[2:5]] == [-0.004, 1.0, None]


def test_draws_are_averaged_with_their_range() -> None:
    table = budget_tables(small())[0]
    for name in ("random", "random like attnlrp"):
        found = row(table, name, "en")
        assert found["method"] == f"{name} (mean of 3 draws)"
        assert found["en"] == "+0.30 (+0.10 to +0.60)"  # 0.1, 0.2, 0.6
        assert found["zh"] == found["mean of the others"] == "-0.30 (-0.60 to -0.10)"
        assert found["collateral"] == "0.40 (0.20 to 0.60), 2 of 3 draws"
        assert found["F1 relative"] == "0.25 (0.25 to 0.25)"


def test_the_same_draw_counts_once_and_one_draw_shows_its_seed_and_interval() -> None:
    one = effect("random", "en", (0.5, 0.1), seed=4)
    (draws,) = Draws.group([one, one])
    assert draws.effects == (one,)
    found = row(mask_table(validation(), [draws]), "random", "en")
    assert found["method"] == "random (seed 4)"
    assert found["en"] == "+0.50 [+0.40, +0.60]"


def test_effects_belong_to_the_nearest_budget() -> None:
    sizes = (10, 11, 48, 50)  # controls may lack a few neurons
    effects = [effect(f"m{size}", "en", (1, 0), neurons=size, rule="like:attnlrp") for size in sizes]
    found = by_budget(validation([*effects, effect("m", "en", (1, 0), rule="published")]))
    names = {budget: [of.name for of in draws] for budget, draws in found.items()}
    assert names == {0.01: ["m10 like attnlrp", "m11 like attnlrp"], 0.05: ["m48 like attnlrp", "m50 like attnlrp"]}
    alike = validation([effect("m", "en", (1, 0))] * 2, budgets=(0.01, 0.0101))
    assert [(budget, len(draws)) for budget, draws in by_budget(alike).items()] == [(0.01, 1)]


def test_matched_effects_are_sorted_and_averaged() -> None:
    table = matched_table(small())
    assert [cells[0].text for cells in table.rows] == ["attnlrp", "random"]
    assert row(table, "attnlrp")["mean collateral"] == "0.50"
    found = row(table, "random")
    assert found["mean collateral"] == "1.10 (0.80 to 1.50)"  # 0.8, 1.0, 1.5
    assert found["en: collateral"] == "1.10 (0.80 to 1.50)"
    assert found["en: neurons"] == "701 (70.1 %, 700 to 702)"


def test_what_does_not_reach_the_effect_comes_last_and_says_so() -> None:
    effects = [effect("attnlrp", "zh", (0.1, 1.0), rule=MATCHED, collateral=0.1)]
    effects += [
        effect("random", language, (1, 1), rule=MATCHED, seed=seed, collateral=0.9 + seed / 10)
        for language, seeds in (("en", (0, 1)), ("zh", (0,)))
        for seed in seeds
    ]
    result = validation(effects, unreached=[("attnlrp", "en"), ("random", "zh")])
    table = matched_table(result)
    assert [cells[0].text for cells in table.rows] == ["random", "attnlrp"]
    missed = row(table, "attnlrp")
    assert missed["mean collateral"] == missed["en: neurons"] == missed["en: own change"] == "-"
    assert missed["en: collateral"] == "not reached with all neurons"
    assert missed["zh: collateral"] == "0.10 [0.00, 0.20]"
    found = row(table, "random")
    assert found["zh: collateral"] == "0.90 [0.80, 1.00], 1 of 2 draws not reached with all neurons"
    assert found["mean collateral"] == "0.93 (0.90 to 0.90), 1 of 2 draws in every language"
    assert "collateral" in {picture.name for picture in draw(result)}


def test_overlaps_stability_and_layers() -> None:
    result = small()
    methods, languages = overlap_tables(result)
    assert row(methods, "attnlrp") == {"method": "attnlrp", "attnlrp": "1.000", "lape": "0.200"}  # of 0.1 and 0.3
    assert row(methods, "lape")["attnlrp"] == "0.200"
    assert row(languages, "lape") == {"method": "lape", "en, zh": "0.050"}
    assert row(stability_table(result), "attnlrp")["mean"] == "0.625"
    assert row(layers_table(result), "attnlrp", "zh") == {
        "method": "attnlrp",
        "language": "zh",
        "0": "10",
        "1": "0",
    }


def test_the_file_of_values_is_exact(tmp_path: Path) -> None:
    result = small()
    write_all(result, tmp_path)
    with (tmp_path / "effects.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    pairs = [(of, language) for of in result.effects for language in of.changes]
    assert len(rows) == len(pairs) == len(effects_table(result).rows)

    def number(text: str) -> float | None:
        return float(text) if text else None

    for found, (of, language) in zip(rows, pairs, strict=True):
        change, collateral = of.changes[language], of.collateral
        assert (found["method"], found["mask_language"], found["rule"]) == (of.method, of.language, of.rule)
        assert (found["language"], found["digest"]) == (language, of.digest)
        assert (number(found["seed"]), number(found["budget"]), number(found["neurons"])) == (
            of.seed,
            of.budget,
            of.neurons,
        )
        assert (number(found["change"]), number(found["low"]), number(found["high"])) == (
            change.mean,
            change.low,
            change.high,
        )
        expected = (None, None, None) if collateral is None else (collateral.mean, collateral.low, collateral.high)
        assert tuple(number(found[name]) for name in ("collateral", "collateral_low", "collateral_high")) == expected
        assert (number(found["f1_relative"]), number(found["f1_absolute"])) == (0.25, 0.75)
    assert any(not found["collateral"] for found in rows)
    assert any(not found["low"] for found in rows)


class Page(HTMLParser):
    """Checks that tags are balanced, and collects what a page shows and loads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.images: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
        if tag == "img":
            self.images.append(given["src"] or "")
            assert given["alt"]
        if "href" in given:
            self.links.append(given["href"] or "")
        if "id" in given:
            self.anchors.add(given["id"] or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.cells[-1] += data


def test_the_page_stands_alone_and_shows_the_tables(tmp_path: Path) -> None:
    result = small()
    paths = write_all(result, tmp_path)
    assert {path.name for path in paths} == {"report.md", "report.html", "effects.csv", *PICTURES}
    assert all(path.is_file() for path in paths)
    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "http" not in html
    assert len(page.images) == len(PICTURES)
    assert all(image.startswith("data:image/png;base64,") for image in page.images)
    assert page.links
    assert {link.removeprefix("#") for link in page.links} <= page.anchors
    for section in report_sections(result):
        for table in section.tables:
            for cells in table.rows:
                assert {shown(cell) for cell in cells} <= set(page.cells)
    assert '<td class="gain"' in html
    assert '<td class="strong loss"' in html


def test_the_markdown_holds_the_same_tables(tmp_path: Path) -> None:
    result = small()
    write_all(result, tmp_path)
    lines = (tmp_path / "report.md").read_text().splitlines()
    for section in report_sections(result):
        assert f"## {section.title}" in lines
        for table in section.tables:
            assert lines[lines.index(f"| {' | '.join(table.columns)} |") + 1] == "|" + " --- |" * len(table.columns)
            for cells in table.rows:
                texts = [f"**{shown(cell)}**" if cell.strong else shown(cell) for cell in cells]
                assert f"| {' | '.join(texts)} |" in lines
    for name in PICTURES:
        assert any(line.endswith(f"]({name})") for line in lines)
    for fact in ("bbbbbbbbbbbbbbbb", "float32", "4,000 resamples", "b = 1", "exp(-nats per token)", "1,234", "3.46"):
        assert any(fact in line for line in lines)


def test_markup_in_names_is_harmless(tmp_path: Path) -> None:
    name = "<b>a|b</b>"
    write_all(validation([effect(name, "en", (1, 0))], methods=(name,)), tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert name not in html
    assert name in Page(html).cells
    assert r"| \<b>a\|b\</b> | en |" in (tmp_path / "report.md").read_text()


def test_nothing_measured(tmp_path: Path) -> None:
    paths = write_all(validation(match=None, budgets=()), tmp_path)
    assert [path.name for path in paths] == ["report.md", "report.html", "effects.csv"]
    assert not Page((tmp_path / "report.html").read_text()).images
    assert (tmp_path / "effects.csv").read_text().count("\n") == 1
    report = (tmp_path / "report.md").read_text()
    for said in ("No effect to match", "No budget", "No method was tried", "No overlaps", "No scores", "No sets"):
        assert said in report


def test_nothing_reaches_the_effect(tmp_path: Path) -> None:
    unreached = [(method, language) for method in ("attnlrp", "random") for language in ("en", "zh")]
    result = validation(unreached=unreached)
    write_all(result, tmp_path)
    assert row(matched_table(result), "random")["zh: collateral"] == "not reached with all neurons"


@pytest.mark.parametrize(("languages", "methods"), [(("en", "zh"), 1), (("a", "b", "c", "d", "e", "f"), 16)])
def test_pictures(languages: tuple[str, ...], methods: int) -> None:
    before = dict(mpl.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as for missing glyphs and layouts that do not fit
        pictures = draw(large(languages, methods))
    assert dict(mpl.rcParams) == before
    assert {picture.file for picture in pictures} == (PICTURES if methods > 1 else PICTURES - {"overlap.png"})
    for picture in pictures:
        assert picture.png.startswith(b"\x89PNG\r\n\x1a\n")
        assert picture.png.endswith(b"IEND\xaeB`\x82")
        assert picture.caption


def test_pictures_keep_their_margins_white_and_hold_something(tmp_path: Path) -> None:
    write_all(large(), tmp_path)
    for name in PICTURES:
        pixels = matplotlib.image.imread(tmp_path / name)[..., :3]
        assert (pixels[[0, -1]] == 1).all(), f"{name} is cut off above or below"
        assert (pixels[:, [0, -1]] == 1).all(), f"{name} is cut off at a side"
        assert (pixels < 0.9).any(axis=2).mean() > 0.01, f"{name} is empty"


def test_gains_huge_losses_and_no_neurons_are_drawn() -> None:
    effects = [
        effect("attnlrp", "en", (900.0, -40.0), collateral=-0.05),
        effect("attnlrp", "zh", (0.0, 0.0), neurons=0, collateral=None),
        effect("attnlrp", "en", (1.0, 60.0), rule=MATCHED, collateral=60.0),
        effect("attnlrp", "zh", (-1.0, 1.0), rule=MATCHED, collateral=-1.0, spread=None),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [picture.name for picture in draw(validation(effects))] == ["collateral", "dose-response", "trade-off"]
