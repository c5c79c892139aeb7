"""Dose-response: the damage of methods by the number of neurons that they take."""

from clients.evaluation import Evaluation, MatchedEffect
from clients.reporting.figures import NOTHING, estimate_cell
from crane_serve.common.reports.content import Cell, Picture, Section, Table
from crane_serve.common.reports.numbers import interval_text


def doses_section(evaluation: Evaluation, pictures: tuple[Picture, ...]) -> Section | None:
    """Pictures and the effects at matched damage; None if no method has several budgets."""
    if not pictures and not evaluation.matched:
        return None
    about = (
        "Damage by the budget of the mask, a fraction of all neurons; above 0 is worse, whatever the metric. Masks of "
        "equal size are not of equal strength: the table compares methods where their own language loses the same.",
    )
    tables = (_matched_table(evaluation),) if evaluation.matched else ()
    return Section("Dose-response", about, tables, pictures)


def _matched_table(evaluation: Evaluation) -> Table:
    columns = ("task", "metric", "language", "damage to it", "method", "seed", "budget", "collateral")
    rows = tuple(
        (
            Cell(effect.task),
            Cell(effect.metric),
            Cell(effect.language),
            Cell(f"{effect.effect:g}"),
            Cell(effect.method),
            Cell(NOTHING if effect.seed is None else str(effect.seed)),
            _budget_cell(effect),
            estimate_cell(effect.collateral, 2, signed=True),
        )
        for effect in evaluation.matched
    )
    return Table(columns, rows, "What the others lose for each unit that the own language loses, at matched damage")


def _budget_cell(effect: MatchedEffect) -> Cell:
    if effect.budget is None:
        return Cell("not between the budgets")
    ends = (None if end is None else 100 * end for end in (effect.budget.low, effect.budget.high))
    low, high = ends
    percent = effect.budget.model_copy(update={"mean": 100 * effect.budget.mean, "low": low, "high": high})
    return Cell(f"{percent.mean:.3g} %", interval_text(percent, 3))
