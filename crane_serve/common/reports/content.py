"""The content of a page, in any output format: sections of paragraphs, tables of typed cells, and pictures."""

import csv
import io
import math
import re
from dataclasses import dataclass

_SPREAD = 5.0  # the colour is linear below about a fifth of the deepest change, logarithmic above


@dataclass(frozen=True)
class Cell:
    """text: the figure; detail: its interval or range; strong: stands out; change: what to colour by, above 0 a loss;
    full: the change that gets the deepest colour, in the same unit; language: of the text, as a BCP 47 tag.
    """

    text: str
    detail: str = ""
    strong: bool = False
    change: float | None = None
    full: float = 5.0
    language: str | None = None

    @property
    def depth(self) -> float:
        """How deep the colour of `change` is: 0 for none, 1 at `full` and beyond, logarithmic between."""
        share = abs(self.change or 0.0) / self.full if self.full > 0 else 0.0
        return min(1.0, math.log1p(_SPREAD * share) / math.log1p(_SPREAD))


@dataclass(frozen=True)
class Table:
    """Rows of as many cells as there are columns. prose: the cells hold texts, whose line breaks are kept."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    prose: bool = False

    def to_csv(self) -> str:
        """Comma-separated texts of the cells under the names of the columns, without details."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([cell.text for cell in row] for row in self.rows)
        return buffer.getvalue()


@dataclass(frozen=True)
class Picture:
    """name: of its file, without suffix; caption: what it shows; png: content of the file."""

    name: str
    caption: str
    png: bytes

    @property
    def file(self) -> str:
        """Name of its file."""
        return f"{self.name}.png"


@dataclass(frozen=True)
class Section:
    """A heading with the content below it. parts: sections one level lower; folded: closed at first, on pages that
    support it."""

    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    parts: tuple["Section", ...] = ()
    folded: bool = False

    @property
    def anchor(self) -> str:
        """Name of the section in links."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")
