"""The evaluation at the terminal."""

from collections.abc import Collection

from rich.table import Table
from rich.text import Text

from clients.evaluation import Evaluation, TaskInfo
from clients.reporting.changes import change_table
from clients.reporting.figures import BEYOND, SIGNIFICANT, WITHIN, masks_by_method, metric_title
from crane_serve.common.reports import content
from crane_serve.common.reports.render import visible


def summary_tables(evaluation: Evaluation) -> list[Table]:
    """A table for each task: masks by languages, the change of its headline metric with intervals."""
    return [_table(evaluation, task) for task in evaluation.tasks]


def terminal_table(
    content_table: content.Table, title: str, *, caption: str = "", breaks: Collection[str] = ()
) -> Table:
    """A table of a page for the terminal; markup and control characters in it have no effect. breaks: names of rows
    with a line below."""
    table = Table(title=Text(visible(title)), caption=Text(caption) if caption else None)
    for number, column in enumerate(content_table.columns):
        table.add_column(Text(visible(column)), justify="right" if number else "left")
    for row in content_table.rows:
        table.add_row(*map(_text, row), end_section=row[0].text in breaks)
    return table


def _text(cell: content.Cell) -> Text:
    """The cell on one line, bold if it is strong."""
    return Text(visible(f"{cell.text} {cell.detail}".strip()), style="bold" if cell.strong else "")


def _table(evaluation: Evaluation, task: TaskInfo) -> Table:
    metric = task.metrics[0]
    return terminal_table(
        change_table(evaluation, task, metric),
        f"{task.name}: change of {metric_title(metric)}",
        caption=f"bold: own language; {BEYOND} q < {SIGNIFICANT:g}, outside random masks; {WITHIN} q < {SIGNIFICANT:g}",
        breaks={group[-1] for group in masks_by_method(evaluation, task.masks)},
    )
