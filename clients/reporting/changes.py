"""The changes by every mask in every language: heat maps as tables, one set for each task."""

from collections.abc import Callable

from clients.evaluation import UNMASKED, Evaluation, TaskInfo
from clients.reporting.figures import (
    BEYOND,
    SIGNIFICANT,
    WITHIN,
    Scale,
    estimate_cell,
    mark,
    masks_by_method,
    metric_title,
    percent_cell,
)
from clients.task import Metric
from crane_serve.common.reports.content import Cell, Picture, Section, Table

_ABOUT = (
    "Changes are signed: masked minus unmasked, over the items answered both ways. Colour shows damage whatever the "
    "sign of the metric: orange is worse than unmasked, blue better, deeper is more; the deepest colour of a table is "
    "its largest change, and the scale between is logarithmic."
)


def changes_section(evaluation: Evaluation, pictures: tuple[Picture, ...] = ()) -> Section:
    """A part for each task: the headline metric open, the others folded. pictures: shown with the first task."""
    parts = tuple(
        _task_part(evaluation, task, () if number else pictures) for number, task in enumerate(evaluation.tasks)
    )
    return Section("What each mask changed", (_ABOUT,), (_legend(),), parts=parts)


def change_table(evaluation: Evaluation, task: TaskInfo, metric: Metric) -> Table:
    """Masks by languages, the change in the metric's unit."""
    rows = _rows(evaluation, task)
    cells = [evaluation.cell(task.name, metric.name, language, mask) for mask in rows for language in task.languages]
    scale = Scale.of(cell.change.mean for cell in cells if cell is not None and cell.change is not None)

    def change_cell(mask: str, language: str) -> Cell:
        cell = evaluation.cell(task.name, metric.name, language, mask)
        own = evaluation.masks[mask].language == language
        if cell is None or cell.change is None:
            return estimate_cell(None, scale.digits, strong=own)
        damage = metric.damage(cell.change.mean)
        return estimate_cell(
            cell.change, scale.digits, signed=True, strong=own, change=damage, full=scale.full, mark=mark(cell)
        )

    return _matrix(task, rows, change_cell, f"Change in {metric.unit}: {_direction(metric)}")


def _relative_table(evaluation: Evaluation, task: TaskInfo, metric: Metric) -> Table:
    rows = _rows(evaluation, task)
    cells = [evaluation.cell(task.name, metric.name, language, mask) for mask in rows for language in task.languages]
    scale = Scale.of(cell.relative.mean for cell in cells if cell is not None and cell.relative is not None)

    def relative_cell(mask: str, language: str) -> Cell:
        cell = evaluation.cell(task.name, metric.name, language, mask)
        own = evaluation.masks[mask].language == language
        relative = None if cell is None else cell.relative
        damage = None if relative is None else metric.damage(relative.mean)
        return percent_cell(relative, strong=own, change=damage, full=scale.full)

    return _matrix(task, rows, relative_cell, f"Change in percent of the unmasked level: {_direction(metric)}")


def _level_table(evaluation: Evaluation, task: TaskInfo, metric: Metric) -> Table:
    def level_cell(mask: str, language: str) -> Cell:
        cell = evaluation.cell(task.name, metric.name, language, mask)
        own = evaluation.masks[mask].language == language
        return estimate_cell(None if cell is None else cell.level, 3, strong=own)

    return _matrix(task, [UNMASKED, *_rows(evaluation, task)], level_cell, f"Level in {metric.unit}")


def _task_part(evaluation: Evaluation, task: TaskInfo, pictures: tuple[Picture, ...]) -> Section:
    headline, *others = task.metrics
    tables = (change_table(evaluation, task, headline), _relative_table(evaluation, task, headline))
    levels = Section(f"Levels of {headline.title}", tables=(_level_table(evaluation, task, headline),), folded=True)
    folded = (
        Section(
            metric_title(metric),
            tables=(
                change_table(evaluation, task, metric),
                _relative_table(evaluation, task, metric),
                _level_table(evaluation, task, metric),
            ),
            folded=True,
        )
        for metric in others
    )
    return Section(f"{task.name}: {metric_title(headline)}", (), tables, pictures, (levels, *folded))


def _matrix(task: TaskInfo, masks: list[str], cell_of: Callable[[str, str], Cell], title: str) -> Table:
    rows = tuple((Cell(mask), *(cell_of(mask, language) for language in task.languages)) for mask in masks)
    return Table(("mask", *task.languages), rows, title)


def _rows(evaluation: Evaluation, task: TaskInfo) -> list[str]:
    return [mask for group in masks_by_method(evaluation, task.masks) for mask in group]


def _direction(metric: Metric) -> str:
    return "below 0 is worse" if metric.higher_is_better else "above 0 is worse"


def _legend() -> Table:
    rows = (
        (Cell("worse than unmasked"), Cell("orange", change=1.0, full=1.0)),
        (Cell("better than unmasked"), Cell("blue", change=-1.0, full=1.0)),
        (Cell("the language the mask was made for"), Cell("bold", strong=True)),
        (Cell(f"q < {SIGNIFICANT:g}, and outside what random masks of that size do"), Cell(BEYOND)),
        (Cell(f"q < {SIGNIFICANT:g}, within what random masks do or without any to compare with"), Cell(WITHIN)),
        (Cell("interval"), Cell("", "[low, high]")),
    )
    return Table(("meaning", "sign"), rows, "Legend")
