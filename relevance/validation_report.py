"""The validation for readers: tables, a page of Markdown, a page of HTML, a file of values, pictures."""

import csv
import io
import math
import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from crane_serve.atomic import write_atomically
from crane_serve.langspec import Form
from crane_serve.statistics import Estimate
from relevance.criteria import LIKE, neurons_of_budget
from relevance.validation import CHOICE, MATCHED, REPORT, MaskEffect, Validation

if TYPE_CHECKING:
    from jinja2 import Environment

    from relevance.pictures import Picture

REPORT_FILE = "report.md"
PAGE_FILE = "report.html"
EFFECTS_FILE = "effects.csv"
TITLE = "What the neurons of each method cost each language"

_DEEPEST_NATS = 5.0  # a change of this size and more gets the deepest colour
_NOTHING = "-"
_SHORT = 16  # characters of a digest that readers see


@dataclass(frozen=True)
class Cell:
    """text: the figure; detail: its interval or range; strong: stands out; change: nats to colour by."""

    text: str
    detail: str = ""
    strong: bool = False
    change: float | None = None

    @property
    def depth(self) -> float:
        """How deep the colour of `change` is: 0 at 0 nats per token, 1 at 5 and beyond, logarithmic between."""
        change = abs(self.change or 0.0)
        return min(1.0, math.log1p(change) / math.log1p(_DEEPEST_NATS))


@dataclass(frozen=True)
class Table:
    """Rows of as many cells as there are columns."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""

    def to_csv(self) -> str:
        """Comma-separated texts of the cells under the names of the columns, without details."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([cell.text for cell in row] for row in self.rows)
        return buffer.getvalue()


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it."""

    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple["Picture", ...] = field(default=())

    @property
    def anchor(self) -> str:
        """Name of the section in links."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Draws:
    """Effects of masks that differ only in their seed: several of a method that draws, one of any other."""

    effects: tuple[MaskEffect, ...]

    @classmethod
    def group(cls, effects: Iterable[MaskEffect]) -> list["Draws"]:
        """By method, rule and language, in the order of their first effect; the same draw counts once."""
        groups: dict[tuple[str, str, str], dict[int | None, MaskEffect]] = {}
        for effect in effects:
            groups.setdefault((effect.method, effect.rule, effect.language), {}).setdefault(effect.seed, effect)
        return [cls(tuple(of_seed.values())) for of_seed in groups.values()]

    @property
    def language(self) -> str:
        """The language of the masks."""
        return self.effects[0].language

    @property
    def name(self) -> str:
        """The method, and for controls the method whose neurons per layer they take over."""
        first = self.effects[0]
        return f"{first.method} like {first.rule.removeprefix(LIKE)}" if first.rule.startswith(LIKE) else first.method

    @property
    def drawn(self) -> bool:
        """Whether the method draws its neurons at random."""
        return self.effects[0].seed is not None

    def mean(self, of: Callable[[MaskEffect], float]) -> float:
        """Mean over the draws."""
        return sum(map(of, self.effects)) / len(self.effects)


def write_all(result: Validation, directory: Path) -> list[Path]:
    """Write report.md, report.html, effects.csv and the pictures into `directory`; returns their paths.

    The page of HTML holds its pictures and needs no other file. Pictures that would be empty are left out.
    """
    from relevance.pictures import draw

    pictures = draw(result)
    sections = report_sections(result, pictures)
    templates = _templates()
    contents = {
        REPORT_FILE: templates.get_template("report.md.jinja").render(title=TITLE, sections=sections).encode(),
        PAGE_FILE: templates.get_template("report.html.jinja").render(title=TITLE, sections=sections).encode(),
        EFFECTS_FILE: effects_table(result).to_csv().encode(),
        **{picture.file: picture.png for picture in pictures},
    }
    for name, content in contents.items():
        write_atomically(directory / name, content)
    return [directory / name for name in contents]


def report_sections(result: Validation, pictures: Sequence["Picture"] = ()) -> list[Section]:
    """Everything that the pages show, in order, each picture under the heading it belongs to."""

    def named(*names: str) -> tuple["Picture", ...]:
        return tuple(picture for picture in pictures if picture.name in names)

    return [
        Section("What was measured", _measured(result), (settings_table(result), texts_table(result))),
        Section("Collateral at matched effect", _about_matched(result), _matched_tables(result), named("collateral")),
        Section(
            "Effects by budget",
            _about_budgets(result),
            tuple(budget_tables(result)),
            named("dose-response", "trade-off"),
        ),
        Section("Published rules", _about_published(result), _published_tables(result)),
        Section("Overlap", _about_overlap(result), tuple(overlap_tables(result)), named("overlap")),
        Section("Stability", _about_stability(result), _stability_tables(result)),
        Section("Neurons per layer", _about_layers(result), _layer_tables(result), named("layers")),
    ]


def settings_table(result: Validation) -> Table:
    """Model, number format and plan."""
    model, plan = result.fingerprint, result.plan
    sizes = sorted(set(model.intermediate_sizes))
    per_layer = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    settings = {
        "model": f"{model.architecture}, weights {model.weights_digest[:_SHORT]}",
        "neurons": f"{sum(model.intermediate_sizes):,} in {model.layers} layers ({per_layer} in each)",
        "number format": result.dtype,
        "methods": ", ".join(plan.methods),
        "budgets": ", ".join(f"{budget:g}" for budget in plan.budgets) or _NOTHING,
        "matched effect": _NOTHING if plan.effect is None else f"{plan.effect:g} nats per token",
        "seeds of methods that draw": ", ".join(map(str, plan.seeds)) or _NOTHING,
        "controls matched to": plan.matched_to or _NOTHING,
        "corpus of the scores": result.relevance_digest[:_SHORT],
        "made by": result.created_by,
    }
    return Table(("setting", "value"), tuple((Cell(name), Cell(value)) for name, value in settings.items()))


def texts_table(result: Validation) -> Table:
    """What the masks were measured on, one row for each part and language."""
    uses = {CHOICE: "choosing numbers of neurons", REPORT: "everything reported"}
    return Table(
        ("used for", "split", "corpus", "language", "documents", "tokens", "unmasked nats per token"),
        tuple(
            (
                Cell(uses.get(part, part)),
                Cell(texts.split or "whole corpus"),
                Cell(texts.corpus_digest[:_SHORT]),
                Cell(language),
                Cell(f"{texts.documents[language]:,}"),
                Cell(f"{texts.tokens[language]:,}"),
                Cell(f"{texts.nats_per_token[language]:.2f}"),
            )
            for part, texts in result.texts.items()
            for language in texts.documents
        ),
    )


def matched_table(result: Validation) -> Table:
    """Per method what the others lose for each nat that the target loses, least first."""
    per_language = ("neurons", "own change", "collateral")
    columns = ["method", "mean collateral", *(f"{name}: {what}" for name in result.languages for what in per_language)]
    methods = [method for method in result.plan.methods if _was_matched(result, method)]
    return Table(
        tuple(columns), tuple(_matched_row(result, method) for method in sorted(methods, key=collateral_order(result)))
    )


def collateral_order(result: Validation) -> Callable[[str], float]:
    """Key that sorts methods by their collateral at matched effect, those that do not reach it last."""

    def key(method: str) -> float:
        mean = result.collateral_at_matched_effect(method)
        return math.inf if mean is None else mean

    return key


def by_budget(result: Validation) -> dict[float, list[Draws]]:
    """Draws under each of the plan's budgets, controls included, at the budget whose number of neurons is nearest.

    Of budgets that come to the same number of neurons, the first stands for all.
    """
    total = sum(result.fingerprint.intermediate_sizes)
    budgets: dict[int, float] = {}
    for budget in result.plan.budgets:
        budgets.setdefault(neurons_of_budget(budget, total), budget)
    found: dict[float, list[MaskEffect]] = {budget: [] for budget in budgets.values()}
    for effect in result.effects:
        if budgets and (effect.rule == "budget" or effect.rule.startswith(LIKE)):
            nearest = min(budgets, key=lambda count: abs(math.log(count / max(effect.neurons, 1))))
            found[budgets[nearest]].append(effect)
    return {budget: Draws.group(effects) for budget, effects in found.items() if effects}


def budget_tables(result: Validation) -> list[Table]:
    """One table for each budget, a row for each method and language of a mask."""
    total = sum(result.fingerprint.intermediate_sizes)
    return [
        mask_table(result, draws, f"{_percent(budget)} of all neurons ({neurons_of_budget(budget, total):,})")
        for budget, draws in by_budget(result).items()
    ]


def mask_table(result: Validation, draws: Iterable[Draws], title: str = "") -> Table:
    """What masks cost every language, a row for each."""
    return Table(
        (
            "method",
            "mask",
            *result.languages,
            "mean of the others",
            "collateral",
            *(f"F1 {form}" for form in Form),
            "neurons",
        ),
        tuple(_mask_row(result, of) for of in draws),
        title,
    )


def overlap_tables(result: Validation) -> list[Table]:
    """Jaccard overlap of methods, averaged over the languages, and of languages, for each method."""
    if not result.overlaps:
        return []
    methods, means = method_overlaps(result)
    of_methods = Table(
        ("method", *methods),
        tuple(
            (Cell(method), *(_jaccard_cell(value) for value in row)) for method, row in zip(methods, means, strict=True)
        ),
        "Methods, mean over the languages",
    )
    between = {(overlap.first, overlap.second): overlap.jaccard for overlap in result.overlaps}
    between |= {(second, first): value for (first, second), value in between.items()}
    pairs = list(combinations(result.languages, 2))
    of_languages = Table(
        ("method", *(f"{one}, {other}" for one, other in pairs)),
        tuple(
            (Cell(method), *(_jaccard_cell(between.get(((method, one), (method, other)))) for one, other in pairs))
            for method in methods
        ),
        "Languages of one method",
    )
    return [of_methods, of_languages]


def method_overlaps(result: Validation) -> tuple[list[str], list[list[float | None]]]:
    """Methods in order, and [methods][methods] their overlap in the same language, averaged over the languages."""
    found: dict[tuple[str, str], list[float]] = {}
    methods: dict[str, None] = {}
    for overlap in result.overlaps:
        (first, language), (second, other) = overlap.first, overlap.second
        methods |= {first: None, second: None}
        if language == other:
            found.setdefault((first, second), []).append(overlap.jaccard)
            found.setdefault((second, first), []).append(overlap.jaccard)

    def mean(first: str, second: str) -> float | None:
        values = found.get((first, second))
        return 1.0 if first == second else None if values is None else sum(values) / len(values)

    return list(methods), [[mean(first, second) for second in methods] for first in methods]


def stability_table(result: Validation) -> Table:
    """Jaccard overlap of the sets from two halves of a corpus, by method and language."""
    rows = []
    for method, by_language in result.stability.items():
        values = [by_language.get(language) for language in result.languages]
        known = [value for value in values if value is not None]
        mean = sum(known) / len(known) if known else None
        rows.append((Cell(method), *map(_jaccard_cell, values), _jaccard_cell(mean)))
    return Table(("method", *result.languages, "mean"), tuple(rows))


def layers_table(result: Validation) -> Table:
    """How many neurons of each layer are in a set, by method and language."""
    return Table(
        ("method", "language", *map(str, range(result.fingerprint.layers))),
        tuple(
            (Cell(method), Cell(language), *(Cell(f"{count:,}") for count in counts))
            for method, by_language in result.layers.items()
            for language, counts in by_language.items()
        ),
    )


def effects_table(result: Validation) -> Table:
    """Every measured change in a row of its own, at full precision: a mask times a measured language.

    Empty cells are values that do not exist.
    """
    columns = (
        *("method", "mask_language", "rule", "seed", "budget", "neurons", "digest"),
        *("language", "change", "low", "high", "collateral", "collateral_low", "collateral_high"),
        *(f"f1_{form}" for form in Form),
    )
    rows = []
    for effect in result.effects:
        collateral = _values(effect.collateral)
        for language, change in effect.changes.items():
            values = (
                *(effect.method, effect.language, effect.rule, effect.seed, effect.budget, effect.neurons),
                *(effect.digest, language, *_values(change), *collateral),
                *(effect.f1[form] for form in Form),
            )
            rows.append(tuple(Cell("" if value is None else str(value)) for value in values))
    return Table(columns, tuple(rows))


def number_text(value: float, digits: int = 2, *, signed: bool = False) -> str:
    """Rounded, without a minus sign before zeros."""
    rounded = round(value, digits) + 0.0
    return f"{rounded:+,.{digits}f}" if signed else f"{rounded:,.{digits}f}"


def estimate_cell(
    estimates: Sequence[Estimate | None], *, signed: bool = False, strong: bool = False, colored: bool = False
) -> Cell:
    """One estimate with [its interval], or the mean of several draws with (their range). None: it does not exist."""
    known = [estimate for estimate in estimates if estimate is not None]
    if not known:
        return Cell(_NOTHING)
    mean = sum(estimate.mean for estimate in known) / len(known)
    if len(estimates) == 1:
        detail = _interval(known[0], signed)
    else:
        detail = _range([estimate.mean for estimate in known], signed=signed)
        if len(known) < len(estimates):
            detail += f", {len(known)} of {len(estimates)} draws"
    return Cell(number_text(mean, signed=signed), detail, strong, mean if colored else None)


def _mask_row(result: Validation, draws: Draws) -> tuple[Cell, ...]:
    effects = draws.effects
    return (
        _name_cell(draws),
        Cell(draws.language),
        *(
            estimate_cell(
                [effect.changes[name] for effect in effects], signed=True, strong=name == draws.language, colored=True
            )
            for name in result.languages
        ),
        _values_cell([effect.others for effect in effects], signed=True),
        estimate_cell([effect.collateral for effect in effects]),
        *(_values_cell([effect.f1[form] for effect in effects]) for form in Form),
        _neurons_cell(result, effects),
    )


def _matched_tables(result: Validation) -> tuple[Table, ...]:
    table = matched_table(result)
    return (table,) if table.rows else ()


def _was_matched(result: Validation, method: str) -> bool:
    tried = [*((effect.method, effect.language) for effect in result.of_rule(MATCHED)), *result.unreached]
    return any(name == method for name, _ in tried)


def _matched_row(result: Validation, method: str) -> tuple[Cell, ...]:
    found = Draws.group(effect for effect in result.of_rule(MATCHED) if effect.method == method)
    by_language = {draws.language: draws for draws in found}
    cells: list[Cell] = []
    for language in result.languages:
        short = result.unreached.count((method, language))
        cells += _matched_cells(result, by_language.get(language), short)
    name = _name_cell(found[0]) if found else Cell(method)
    return (name, _mean_collateral_cell(result, method, found), *cells)


def _matched_cells(result: Validation, draws: Draws | None, unreached: int) -> list[Cell]:
    """Number of neurons, own change and collateral of one language, `unreached` of whose draws fell short."""
    if draws is None:
        return [Cell(_NOTHING), Cell(_NOTHING), Cell("not reached with all neurons" if unreached else _NOTHING)]
    collateral = estimate_cell([effect.collateral for effect in draws.effects])
    if unreached:
        short = f"{unreached} of {unreached + len(draws.effects)} draws not reached with all neurons"
        collateral = Cell(collateral.text, ", ".join(filter(None, (collateral.detail, short))))
    return [
        _neurons_cell(result, draws.effects),
        estimate_cell([effect.own for effect in draws.effects], signed=True, colored=True),
        collateral,
    ]


def _mean_collateral_cell(result: Validation, method: str, found: Sequence[Draws]) -> Cell:
    mean = result.collateral_at_matched_effect(method)
    if mean is None:
        return Cell(_NOTHING)
    by_seed: dict[int | None, list[float]] = {}
    for draws in found:
        for effect in draws.effects:
            if effect.collateral is not None:
                by_seed.setdefault(effect.seed, []).append(effect.collateral.mean)
    means = [sum(of_seed) / len(of_seed) for of_seed in by_seed.values() if len(of_seed) == len(result.languages)]
    detail = _range(means) if len(by_seed) > 1 and means else ""
    if len(means) < len(by_seed):
        detail += f", {len(means)} of {len(by_seed)} draws in every language"
    return Cell(number_text(mean), detail.removeprefix(", "), strong=True)


def _published_tables(result: Validation) -> tuple[Table, ...]:
    draws = Draws.group(result.of_rule("published"))
    return (mask_table(result, draws),) if draws else ()


def _stability_tables(result: Validation) -> tuple[Table, ...]:
    return (stability_table(result),) if result.stability else ()


def _layer_tables(result: Validation) -> tuple[Table, ...]:
    return (layers_table(result),) if result.layers else ()


def _measured(result: Validation) -> tuple[str, ...]:
    return (
        "A mask switches off a set of MLP neurons, chosen for one language. Every mask was measured in every language: "
        "its change is the loss in nats per token with the mask minus the loss of the whole model, over the tokens of "
        "all documents. Changes are signed; above 0 is a loss, below 0 a gain. Bold: the mask's own language.",
        f"[low, high] is a {result.confidence:.0%} percentile interval of a paired bootstrap over documents with "
        f"{result.resamples:,} resamples. It covers the choice of documents, not the choice of neurons, and is not "
        "corrected for the number of cells. A figure without brackets has no interval. Methods that draw their neurons "
        "are shown by the mean of their draws with (lowest to highest draw); effects.csv has each draw.",
        "Collateral is what the other languages lose on average, in nats per token, for each nat per token that the "
        "mask's own language loses: 0 is a mask that costs only its own language, 1 one that costs all the same, and "
        "below 0 the others gain. It does not exist where the own language loses nothing.",
        "LangSpec-F1 comes from CRANE's published evaluation code. Its scores are exp(-nats per token), the geometric "
        "mean probability of a token: B unmasked, M masked. With the drop d of each language, t the mask's own "
        "language, P = d_t / (d_t + mean of d over the others) and R, F1 = 2 P R / (P + R), that is b = 1. Relative "
        "form: d = max((B - M) / B, 0), R = d_t. Absolute form: d = max(B - M, 0), R = d_t / B_t. Both clip: a "
        "language that gains counts as one that loses nothing.",
    )


def _about_matched(result: Validation) -> tuple[str, ...]:
    if result.plan.effect is None:
        return ("No effect to match was planned.",)
    return (
        f"Each method takes the best of its ranking until the own language loses {result.plan.effect:g} nats per "
        "token. How many that takes was found on the texts for choosing; what is shown was measured on those for "
        "reporting, so the own changes differ somewhat. Methods are sorted by the mean over the languages, the least "
        "collateral first.",
    )


def _about_budgets(result: Validation) -> tuple[str, ...]:
    if not by_budget(result):
        return ("No budget was measured.",)
    controls = ""
    if result.plan.matched_to is not None:
        controls = (
            f' "random like {result.plan.matched_to}" and such draw as many neurons in each layer as that method.'
        )
    return (f"Masks of equal size.{controls} Equal size is not equal strength: compare the whole rows.",)


def _about_published(result: Validation) -> tuple[str, ...]:
    empty = ", ".join(f"{method} for {language}" for method, language in result.empty)
    nothing = (f"Takes no neuron: {empty}.",) if empty else ()
    if not result.of_rule("published"):
        return ("No method was tried with the rule it was published with.", *nothing)
    return ("Masks by the selection rule that each method was published with; their sizes differ.", *nothing)


def _about_overlap(result: Validation) -> tuple[str, ...]:
    if not result.overlaps:
        return ("No overlaps were computed.",)
    chance = result.overlap_budget / (2 - result.overlap_budget)
    return (
        f"Jaccard overlap, |intersection| / |union|, of the best {_percent(result.overlap_budget)} of all neurons. "
        f"Two sets drawn at random overlap by about {chance:.3f}.",
    )


def _about_stability(result: Validation) -> tuple[str, ...]:
    if not result.stability:
        return ("No scores from halves of a corpus were given.",)
    return (
        "Jaccard overlap of the sets that a method chooses from two halves of a corpus, at "
        f"{_percent(result.overlap_budget)} of all neurons. 1: the same neurons from both.",
    )


def _about_layers(result: Validation) -> tuple[str, ...]:
    if not result.layers:
        return ("No sets were counted.",)
    return (f"Where the best {_percent(result.overlap_budget)} of all neurons lie, from the first layer to the last.",)


def _name_cell(draws: Draws) -> Cell:
    if not draws.drawn:
        return Cell(draws.name)
    count = len(draws.effects)
    return Cell(draws.name, f"(mean of {count} draws)" if count > 1 else f"(seed {draws.effects[0].seed})")


def _values_cell(values: Sequence[float], *, signed: bool = False) -> Cell:
    mean = sum(values) / len(values)
    return Cell(number_text(mean, signed=signed), _range(values, signed=signed) if len(values) > 1 else "")


def _neurons_cell(result: Validation, effects: Sequence[MaskEffect]) -> Cell:
    counts = [effect.neurons for effect in effects]
    mean = sum(counts) / len(counts)
    share = _percent(mean / sum(result.fingerprint.intermediate_sizes))
    spread = f", {min(counts):,} to {max(counts):,}" if min(counts) < max(counts) else ""
    return Cell(f"{mean:,.0f}", f"({share}{spread})")


def _jaccard_cell(value: float | None) -> Cell:
    return Cell(_NOTHING if value is None else number_text(value, 3))


def _interval(estimate: Estimate, signed: bool) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f"[{number_text(estimate.low, signed=signed)}, {number_text(estimate.high, signed=signed)}]"


def _range(values: Sequence[float], *, signed: bool = False) -> str:
    return f"({number_text(min(values), signed=signed)} to {number_text(max(values), signed=signed)})"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"


def _values(estimate: Estimate | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if estimate is None else (estimate.mean, estimate.low, estimate.high)


def _templates() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("relevance"),
        autoescape=select_autoescape(enabled_extensions=("html.jinja",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["markdown"] = _markdown
    environment.filters["data_uri"] = _data_uri
    return environment


def _markdown(text: str) -> str:
    """On one line, with what Markdown takes for markup escaped."""
    return re.sub(r"([\\`*<|])", r"\\\1", " ".join(text.split()))


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"
