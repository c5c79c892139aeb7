"""Which language takes over where answers are not in the expected one."""

from collections import Counter
from collections.abc import Iterable

from clients.evaluation import Evaluation, Substitution
from clients.reporting.figures import NOTHING
from crane_serve.common.reports.content import Cell, Section, Table
from crane_serve.common.reports.numbers import percent_text

ABOUT = (
    "failing: answers that are not in the expected language line by line. Of these, the share in which each language "
    "is what most of the text is in that is not in the expected one."
)


def substitution_section(evaluation: Evaluation) -> Section | None:
    """A table for each task and language with failing answers; None if there are none."""
    parts = tuple(
        Section(task.name, tables=tables)
        for task in evaluation.tasks
        if (tables := substitution_tables(of for of in evaluation.substitutions if of.task == task.name))
    )
    return Section("Which language takes over", (ABOUT,), parts=parts) if parts else None


def substitution_tables(substitutions: Iterable[Substitution], of: str = "") -> tuple[Table, ...]:
    """Masks by languages that take over, a table for each expected language with failing answers. of: whose answers."""
    by_language: dict[str, list[Substitution]] = {}
    for substitution in substitutions:
        by_language.setdefault(substitution.language, []).append(substitution)
    return tuple(
        _table(entries, f"Expected: {language}{of}")
        for language, entries in by_language.items()
        if any(entry.failing for entry in entries)
    )


def _table(entries: list[Substitution], title: str) -> Table:
    counts: Counter[str] = Counter()
    for entry in entries:
        counts.update(entry.languages)
    languages = sorted(counts, key=lambda code: (-counts[code], code))
    rows = tuple(
        (
            Cell(entry.mask),
            Cell(f"{entry.failing:,} of {entry.answers:,}"),
            *(
                Cell(percent_text(entry.languages[code] / entry.failing) if code in entry.languages else NOTHING)
                for code in languages
            ),
        )
        for entry in entries
    )
    return Table(("mask", "failing", *languages), rows, title)
