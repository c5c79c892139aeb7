"""The tables of a validation. Changes are in nats per token; 5 and more have the deepest colour."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from crane_serve.common.numbers.bootstrap import Estimate
from crane_serve.common.numbers.langspec import Form
from crane_serve.common.reports.content import Cell, Table
from crane_serve.common.reports.numbers import interval_text, number_text, percent_text
from relevance.selection_options import LIKE, ZERO, neurons_of_budget
from relevance.validation.result import CHOICE, MATCHED, REPORT, MaskEffect, Validation

_NOTHING = "-"
_SHORT = 16  # characters of a digest that readers see


@dataclass(frozen=True)
class Draws:
    """Effects of masks that differ only in their seed: several for a method that draws, one for any other."""

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
        """The method, and for controls the method whose numbers of neurons per layer they use."""
        first = self.effects[0]
        return f"{first.method} like {first.rule.removeprefix(LIKE)}" if first.rule.startswith(LIKE) else first.method

    @property
    def drawn(self) -> bool:
        """Whether the method draws its neurons at random."""
        return self.effects[0].seed is not None

    def mean(self, of: Callable[[MaskEffect], float]) -> float:
        """Mean over the draws."""
        return sum(map(of, self.effects)) / len(self.effects)


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
        **_interventions(result),
        "corpus of the scores": result.relevance_digest[:_SHORT],
        "made by": result.created_by,
    }
    return Table(("setting", "value"), tuple((Cell(name), Cell(value)) for name, value in settings.items()))


def _interventions(result: Validation) -> dict[str, str]:
    """What became of neurons, for methods where they did not become 0."""
    others = {group.name: group.effects[0].intervention for group in Draws.group(result.effects)}
    listed = ", ".join(f"{what} of {name}" for name, what in others.items() if what != ZERO)
    return {"value in the place of a neuron's": f"{listed}; else 0"} if listed else {}


def texts_table(result: Validation) -> Table:
    """The texts that the masks were measured on, one row for each part and language."""
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
    """Per method the loss of the others for each nat that the target loses, least first."""
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

    Budgets that mean the same number of neurons are shown once, as the first of them.
    """
    total = sum(result.fingerprint.intermediate_sizes)
    budgets: dict[int, float] = {}
    for budget in result.plan.budgets:
        budgets.setdefault(neurons_of_budget(budget, total), budget)
    by_budget: dict[float, list[MaskEffect]] = {budget: [] for budget in budgets.values()}
    for effect in result.effects:
        if budgets and (effect.rule == "budget" or effect.rule.startswith(LIKE)):
            nearest = min(budgets, key=lambda count: abs(math.log(count / max(effect.neurons, 1))))
            by_budget[budgets[nearest]].append(effect)
    return {budget: Draws.group(effects) for budget, effects in by_budget.items() if effects}


def budget_tables(result: Validation) -> list[Table]:
    """One table for each budget, a row for each method and language of a mask."""
    total = sum(result.fingerprint.intermediate_sizes)
    return [
        mask_table(result, draws, f"{percent_text(budget)} of all neurons ({neurons_of_budget(budget, total):,})")
        for budget, draws in by_budget(result).items()
    ]


def mask_table(result: Validation, draws: Iterable[Draws], title: str = "") -> Table:
    """The cost of masks for every language, a row for each mask."""
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
    jaccards: dict[tuple[str, str], list[float]] = {}
    methods: dict[str, None] = {}
    for overlap in result.overlaps:
        (first, language), (second, other) = overlap.first, overlap.second
        methods |= {first: None, second: None}
        if language == other:
            jaccards.setdefault((first, second), []).append(overlap.jaccard)
            jaccards.setdefault((second, first), []).append(overlap.jaccard)

    def mean(first: str, second: str) -> float | None:
        values = jaccards.get((first, second))
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


def estimate_cell(
    estimates: Sequence[Estimate | None], *, signed: bool = False, strong: bool = False, colored: bool = False
) -> Cell:
    """One estimate with [its interval], or the mean of several draws with (their range). None: it does not exist."""
    known = [estimate for estimate in estimates if estimate is not None]
    if not known:
        return Cell(_NOTHING)
    mean = sum(estimate.mean for estimate in known) / len(known)
    if len(estimates) == 1:
        detail = interval_text(known[0], signed=signed)
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


def _was_matched(result: Validation, method: str) -> bool:
    tried = [*((effect.method, effect.language) for effect in result.of_rule(MATCHED)), *result.unreached]
    return any(name == method for name, _ in tried)


def _matched_row(result: Validation, method: str) -> tuple[Cell, ...]:
    groups = Draws.group(effect for effect in result.of_rule(MATCHED) if effect.method == method)
    by_language = {draws.language: draws for draws in groups}
    cells: list[Cell] = []
    for language in result.languages:
        short = result.unreached.count((method, language))
        cells += _matched_cells(result, by_language.get(language), short)
    name = _name_cell(groups[0]) if groups else Cell(method)
    return (name, _mean_collateral_cell(result, method, groups), *cells)


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


def _mean_collateral_cell(result: Validation, method: str, groups: Sequence[Draws]) -> Cell:
    mean = result.collateral_at_matched_effect(method)
    if mean is None:
        return Cell(_NOTHING)
    by_seed: dict[int | None, list[float]] = {}
    for draws in groups:
        for effect in draws.effects:
            if effect.collateral is not None:
                by_seed.setdefault(effect.seed, []).append(effect.collateral.mean)
    means = [sum(of_seed) / len(of_seed) for of_seed in by_seed.values() if len(of_seed) == len(result.languages)]
    detail = _range(means) if len(by_seed) > 1 and means else ""
    if len(means) < len(by_seed):
        detail += f", {len(means)} of {len(by_seed)} draws in every language"
    return Cell(number_text(mean), detail.removeprefix(", "), strong=True)


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
    share = percent_text(mean / sum(result.fingerprint.intermediate_sizes))
    spread = f", {min(counts):,} to {max(counts):,}" if min(counts) < max(counts) else ""
    return Cell(f"{mean:,.0f}", f"({share}{spread})")


def _jaccard_cell(value: float | None) -> Cell:
    return Cell(_NOTHING if value is None else number_text(value, 3))


def _range(values: Sequence[float], *, signed: bool = False) -> str:
    return f"({number_text(min(values), signed=signed)} to {number_text(max(values), signed=signed)})"


def _values(estimate: Estimate | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if estimate is None else (estimate.mean, estimate.low, estimate.high)
