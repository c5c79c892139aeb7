"""Two evaluations side by side, for readers."""

from pathlib import Path
from typing import Any

import rich.table

from clients.compare import ComparedCell, Comparison
from clients.reporting.figures import NOTHING, Scale, estimate_cell, metric_title
from clients.reporting.files import columns_of, csv_content
from clients.reporting.substitution import ABOUT, substitution_tables
from clients.reporting.terminal import terminal_table
from clients.task import Metric
from crane_serve.common.atomic import write_atomically
from crane_serve.common.reports.content import Cell, Section, Table
from crane_serve.common.reports.render import html_page, markdown_page

FILES = ("compare.html", "compare.md", "compare.csv")
_INDEPENDENT = "†"


def write_comparison(comparison: Comparison, directory: Path) -> list[Path]:
    """Write compare.html (which stands alone), compare.md and compare.csv; returns their paths."""
    title = f"{comparison.second} against {comparison.first}"
    sections = comparison_sections(comparison)
    pages = html_page(title, sections, filtered=True), markdown_page(title, sections)
    contents = (*(page.encode() for page in pages), csv_content(comparison_rows(comparison)))
    for name, file in zip(FILES, contents, strict=True):
        write_atomically(directory / name, file)
    return [directory / name for name in FILES]


def terminal_tables(comparison: Comparison) -> list[rich.table.Table]:
    """For the terminal: a table for each task with the differences of its headline metric."""
    title = f"{comparison.second} minus {comparison.first}"
    return [
        terminal_table(difference_table(comparison, task, metrics[0]), f"{task}: {title}")
        for task, metrics in comparison.metrics.items()
    ]


def comparison_sections(comparison: Comparison) -> list[Section]:
    """The differences in settings and in results: for each metric a matrix, and both changes folded."""
    sections = (_overview(comparison), _findings(comparison), _taking_over(comparison))
    return [section for section in sections if section is not None]


def comparison_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """A row for each task, metric, language and mask, by column; None for what does not exist."""
    return [_row(comparison, cell) for cell in comparison.cells]


def _overview(comparison: Comparison) -> Section:
    about = (
        f"first: {comparison.first}; second: {comparison.second}. A change is masked minus unmasked; a difference is "
        "the change in the second minus that in the first.",
        "Where both asked the same items and the answers are at hand, differences are paired: their intervals are "
        "of a joint bootstrap over the items answered four times. Elsewhere the samples are taken as independent, "
        "and the intervals of both changes are combined by MOVER (Zou and Donner, 2008).",
    )
    lists = (
        ("What differs in how they were made", comparison.differences or ("Nothing that was recorded.",)),
        ("Only in the first", comparison.only_first),
        ("Only in the second", comparison.only_second),
    )
    return Section("What is compared", about, parts=tuple(Section(title, lines) for title, lines in lists if lines))


def _findings(comparison: Comparison) -> Section:
    about = (
        "Signed, in the metric's unit. Orange: the mask does more damage in the second; blue: less; deeper is "
        f"more. {_INDEPENDENT} marks differences of independent samples.",
    )
    parts = tuple(
        Section(
            f"{task}: {metric_title(metric)}",
            tables=(difference_table(comparison, task, metric),),
            parts=(
                Section(
                    f"{task}, {metric.title}: both changes", tables=(_list(comparison, task, metric),), folded=True
                ),
            ),
            folded=metric is not metrics[0],
        )
        for task, metrics in comparison.metrics.items()
        for metric in metrics
    )
    return Section("Differences", about, parts=parts)


def _taking_over(comparison: Comparison) -> Section | None:
    names = (comparison.first, comparison.second)
    parts = tuple(
        Section(f"{task}: which language takes over", tables=tables)
        for task in comparison.metrics
        if (
            tables := tuple(
                table
                for name, substitutions in zip(names, comparison.substitutions, strict=True)
                for table in substitution_tables((of for of in substitutions if of.task == task), f", in {name}")
            )
        )
    )
    return Section("Which language takes over", (ABOUT,), parts=parts) if parts else None


def _of(comparison: Comparison, task: str, metric: Metric) -> list[ComparedCell]:
    return [cell for cell in comparison.cells if (cell.task, cell.metric) == (task, metric.name)]


def difference_table(comparison: Comparison, task: str, metric: Metric) -> Table:
    """Masks by languages: the change in the second minus the change in the first, coloured by damage."""
    cells = _of(comparison, task, metric)
    scale = Scale.of(cell.difference.mean for cell in cells)
    languages = tuple(dict.fromkeys(cell.language for cell in cells))
    by_place = {(cell.mask_name, cell.language): cell for cell in cells}

    def difference_cell(mask: str, language: str) -> Cell:
        cell = by_place.get((mask, language))
        return Cell(NOTHING) if cell is None else _difference_cell(cell, metric, scale)

    rows = tuple(
        (Cell(mask), *(difference_cell(mask, language) for language in languages))
        for mask in dict.fromkeys(cell.mask_name for cell in cells)
    )
    direction = "below 0: the second loses more" if metric.higher_is_better else "above 0: the second loses more"
    return Table(("mask", *languages), rows, f"Second minus first in {metric.unit}; {direction}")


def _list(comparison: Comparison, task: str, metric: Metric) -> Table:
    cells = _of(comparison, task, metric)
    scale = Scale.of(change.mean for cell in cells for change in (cell.first, cell.second))
    rows = tuple(
        (
            Cell(cell.mask_name),
            Cell(cell.language),
            estimate_cell(cell.first, scale.digits, signed=True),
            estimate_cell(cell.second, scale.digits, signed=True),
            estimate_cell(cell.difference, scale.digits, signed=True),
            Cell(f"paired, {cell.items:,} items" if cell.paired else "independent"),
        )
        for cell in cells
    )
    return Table(("mask", "language", "first", "second", "second minus first", "samples"), rows)


def _row(comparison: Comparison, cell: ComparedCell) -> dict[str, Any]:
    metric = next(metric for metric in comparison.metrics[cell.task] if metric.name == cell.metric)
    return {
        "task": cell.task,
        "metric": cell.metric,
        "unit": metric.unit,
        "higher_is_better": metric.higher_is_better,
        "language": cell.language,
        "mask": cell.mask,
        "second_mask": cell.second_mask,
        **columns_of("first", cell.first),
        **columns_of("second", cell.second),
        **columns_of("difference", cell.difference),
        "samples": "paired" if cell.paired else "independent",
        "items": cell.items,
    }


def _difference_cell(cell: ComparedCell, metric: Metric, scale: Scale) -> Cell:
    damage = metric.damage(cell.difference.mean)
    mark = "" if cell.paired else _INDEPENDENT
    return estimate_cell(cell.difference, scale.digits, signed=True, change=damage, full=scale.full, mark=mark)
