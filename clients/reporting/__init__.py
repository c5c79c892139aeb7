"""The evaluation for readers: pages, pictures, files of values, tables at the terminal."""

from pathlib import Path
from typing import TYPE_CHECKING

from clients.evaluation import Evaluation
from clients.task import Answers
from crane_serve.common.atomic import write_atomically

if TYPE_CHECKING:
    from rich.table import Table

PAGE_FILE, REPORT_FILE, PICTURE_FILE = "report.html", "report.md", "matrix.png"
CELLS_FILE, CELL_TABLE_FILE, ITEMS_FILE = "cells.csv", "cells.parquet", "items.parquet"
FILES = (PAGE_FILE, REPORT_FILE, PICTURE_FILE, CELLS_FILE, CELL_TABLE_FILE, ITEMS_FILE)


def summary_tables(evaluation: Evaluation) -> list["Table"]:
    """For the terminal: a table for each task, masks by languages, with the change of its headline metric."""
    from clients.reporting import terminal

    return terminal.summary_tables(evaluation)


def write_all(evaluation: Evaluation, answers: Answers, directory: Path) -> list[Path]:
    """Write FILES and the pictures that report.md shows into `directory`; returns all paths.

    report.html stands alone: it holds its pictures and loads nothing. report.md has the same figures and fewer
    examples. cells.* have a row for each task, metric, language and mask, items.parquet one for each answer and metric.
    Pictures that would be empty are left out.
    """
    from clients.reporting.examples import FEW, FULL
    from clients.reporting.files import write_cells_csv, write_cells_parquet, write_items
    from clients.reporting.pictures import draw
    from clients.reporting.sections import report_sections
    from crane_serve.common.reports.render import html_page, markdown_page

    drawn = draw(evaluation)
    title = f"What each mask takes from each language: {evaluation.name}"
    pages = {
        PAGE_FILE: html_page(title, report_sections(evaluation, answers, drawn, FULL), filtered=True),
        REPORT_FILE: markdown_page(title, report_sections(evaluation, answers, drawn, FEW)),
    }
    pictures = [picture for of_section in drawn.values() for picture in of_section]
    contents = {name: page.encode() for name, page in pages.items()}
    contents |= {picture.file: picture.png for picture in pictures}
    for name, content in contents.items():
        write_atomically(directory / name, content)
    write_cells_csv(evaluation, directory / CELLS_FILE)
    write_cells_parquet(evaluation, directory / CELL_TABLE_FILE)
    write_items(evaluation, answers, directory / ITEMS_FILE)
    return [directory / name for name in (*contents, CELLS_FILE, CELL_TABLE_FILE, ITEMS_FILE)]
