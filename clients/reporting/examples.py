"""Drill-down: items whose answer, as shown to readers, changes under a mask."""

from collections.abc import Iterator
from dataclasses import dataclass

from clients.evaluation import UNMASKED, Evaluation, TaskInfo
from clients.reporting.figures import NOTHING, masks_by_method, metric_title
from clients.task import Answers, Generated, Item, Question, Scored, Task
from crane_serve.common.reports.content import Cell, Section, Table
from crane_serve.common.reports.render import cut


@dataclass(frozen=True)
class Extent:
    """How much is shown. items: per mask and language; characters: of each text; own: only a mask's own language."""

    items: int
    characters: int
    own: bool = False


FULL = Extent(12, 800)
FEW = Extent(2, 200, own=True)
_MOST_ROWS = 3000  # of a page; with more masks each shows fewer items, but at least two
_FEWEST = 2


@dataclass(frozen=True)
class Changed:
    """An item that is answered differently under a mask. Answers are in the form shown to readers."""

    item: Item
    expected: str
    before: str
    after: str
    score: str


def examples_section(evaluation: Evaluation, answers: Answers, extent: Extent) -> Section:
    """A part for each task with readable answers, with a folded part for each mask."""
    places = sum(len(task.masks) * len(task.languages) for task in evaluation.tasks)
    items = extent.items if places * extent.items <= _MOST_ROWS else max(_FEWEST, _MOST_ROWS // places)
    limits = Extent(min(items, extent.items), extent.characters, extent.own)
    parts = [
        part
        for task in evaluation.tasks
        if task.name in answers.tasks and (part := _task_part(evaluation, answers, task, limits)) is not None
    ]
    if not parts:
        return Section("Answers that changed", ("No answer with something to read changed under a mask.",))
    where = "each mask and its own language" if extent.own else "each mask and language"
    about = (
        f"Items whose shown answer under a mask is not that of the unmasked model, in the order asked, at most "
        f"{limits.items} for {where}; long texts are cut. items.parquet has all answers in full.",
    )
    return Section("Answers that changed", about, parts=tuple(parts))


def changed(answers: Answers, task: str, language: str, mask: str) -> Iterator[Changed]:
    """Items of a task and language whose shown answer differs between `none` and a mask, in the order asked."""
    definition = answers.tasks[task]
    for item in answers.items.get(task, {}).get(language, ()):
        before = answers.answers.get(Question(task, language, item.id, UNMASKED))
        after = answers.answers.get(Question(task, language, item.id, mask))
        if before is None or after is None:
            continue
        texts = definition.shown(item, before), definition.shown(item, after)
        if texts[0] != texts[1]:
            scores = f"{_score(definition, item, before)} → {_score(definition, item, after)}"
            yield Changed(item, definition.expected(item), *texts, scores)


def _task_part(evaluation: Evaluation, answers: Answers, task: TaskInfo, extent: Extent) -> Section | None:
    parts = [
        Section(mask, tables=tables, folded=True)
        for group in masks_by_method(evaluation, task.masks)
        for mask in group
        if (tables := tuple(_mask_tables(evaluation, answers, task, mask, extent)))
    ]
    if not parts:
        return None
    about = f"score: {metric_title(task.metrics[0])} of the item, unmasked → masked."
    return Section(task.name, (about,), parts=tuple(parts))


def _mask_tables(
    evaluation: Evaluation, answers: Answers, task: TaskInfo, mask: str, extent: Extent
) -> Iterator[Table]:
    own = evaluation.masks[mask].language
    for language in task.languages:
        if extent.own and language != own:
            continue
        changes = list(changed(answers, task.name, language, mask))
        if changes:
            yield _table(changes, language, own == language, extent)


def _table(changes: list[Changed], language: str, own: bool, extent: Extent) -> Table:
    rows_shown = changes[: extent.items]
    made_for = ", the mask's own language" if own else ""
    title = f"{language}{made_for}: {len(rows_shown):,} of {len(changes):,} changed answers"
    if len(changes) > len(rows_shown):
        title += f"; {len(changes) - len(rows_shown):,} more are in items.parquet"
    rows = tuple(
        (
            Cell(cut(example.item.id, 40)),
            *(
                Cell(cut(text, extent.characters) or NOTHING, language=language)
                for text in (
                    example.item.prompt,
                    example.expected,
                    example.before,
                    example.after,
                )
            ),
            Cell(example.score),
        )
        for example in rows_shown
    )
    columns = ("item", "prompt", "right answer", "unmasked answer", "masked answer", "score")
    return Table(columns, rows, title, prose=True)


def _score(task: Task, item: Item, answer: Scored | Generated) -> str:
    value = task.measure(item, answer).get(task.metrics[0].name)
    if value is None or value.weight == 0:
        return NOTHING
    return f"{value.total / value.weight:.4g}"
