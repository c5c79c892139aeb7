"""The damage of each mask to its own language compared with the others, and the ranks of the methods."""

from clients.evaluation import Effect, Evaluation, MethodRank, TaskInfo
from clients.reporting.figures import NOTHING, Scale, budget_text, estimate_cell, metric_title
from clients.task import Metric
from crane_serve.common.numbers.langspec import Form
from crane_serve.common.reports.content import Cell, Section, Table
from crane_serve.common.reports.numbers import interval_text, number_text

_ABOUT = (
    "Above 0 is damage, whatever the metric. own: to the language the mask was made for; others: mean over the others; "
    "selectivity: own minus others; index: (own - others) / (|own| + |others|), from -1 to 1; collateral: others / "
    "own, where own is above 0. LangSpec-F1 is that of CRANE's published evaluation code (relative and absolute form), "
    "of metrics that make a score; it clips gains to 0, so it is shown beside the signed figures."
)


def selectivity_section(evaluation: Evaluation) -> Section:
    """A part for each task that has effects: the headline metric open, the others folded."""
    parts = [part for task in evaluation.tasks if (part := _task_part(evaluation, task)) is not None]
    if not parts:
        return Section("Selectivity", ("No mask was made for one of several languages that were asked.",))
    return Section("Selectivity", (_ABOUT,), parts=tuple(parts))


def _task_part(evaluation: Evaluation, task: TaskInfo) -> Section | None:
    tables = {metric.name: _tables(evaluation, task, metric) for metric in task.metrics}
    if not any(tables.values()):
        return None
    headline, *others = task.metrics
    folded = tuple(
        Section(metric_title(metric), tables=tables[metric.name], folded=True)
        for metric in others
        if tables[metric.name]
    )
    return Section(f"{task.name}: {metric_title(headline)}", tables=tables[headline.name], parts=folded)


def _tables(evaluation: Evaluation, task: TaskInfo, metric: Metric) -> tuple[Table, ...]:
    effects = [effect for effect in evaluation.effects if (effect.task, effect.metric) == (task.name, metric.name)]
    ranks = [rank for rank in evaluation.ranks if (rank.task, rank.metric) == (task.name, metric.name)]
    tables = []
    if effects:
        tables.append(_effect_table(effects, metric))
    if ranks:
        tables.append(_rank_table(ranks))
    return tuple(tables)


def _effect_table(effects: list[Effect], metric: Metric) -> Table:
    betas = ", ".join(f"{beta:g}" for beta in sorted({effect.beta for effect in effects}))
    scale = Scale.of(estimate.mean for effect in effects for estimate in (effect.own, effect.others))
    forms = [form for form in Form if any(form in effect.f1 for effect in effects)]
    columns = (
        *("mask", "language", "own", "others", "selectivity", "index", "collateral"),
        *(f"F1 {form}" for form in forms),
    )
    rows = tuple(
        (
            Cell(effect.mask),
            Cell(effect.language),
            *(
                estimate_cell(estimate, scale.digits, signed=True, change=estimate.mean, full=scale.full)
                for estimate in (effect.own, effect.others)
            ),
            estimate_cell(effect.selectivity, scale.digits, signed=True),
            estimate_cell(effect.index, 2, signed=True),
            estimate_cell(effect.collateral, 2, signed=True),
            *(estimate_cell(effect.f1.get(form), 3) for form in forms),
        )
        for effect in effects
    )
    return Table(columns, rows, f"Damage in {metric.unit}" + (f"; F1 at beta = {betas}" if forms else ""))


def _rank_table(ranks: list[MethodRank]) -> Table:
    ordered = sorted(ranks, key=lambda rank: (rank.measure, rank.budget or 0.0, rank.rank.mean))
    rows = tuple(
        (
            Cell(rank.method),
            Cell(rank.measure),
            Cell(budget_text(rank.budget)),
            Cell(number_text(rank.rank.mean, 1).removesuffix(".0"), interval_text(rank.rank, 1).replace(".0", "")),
            estimate_cell(rank.value, 3, signed=not rank.measure.startswith("f1")),
            Cell(", ".join(rank.languages) or NOTHING),
        )
        for rank in ordered
    )
    return Table(("method", "measure", "budget", "rank", "mean", "languages"), rows, "Methods, 1 is the best rank")
