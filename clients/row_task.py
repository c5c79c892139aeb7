"""RowTask: a task whose items are the rows of a source, with examples (few-shot) before each."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, JsonValue, StrictBool

from clients.answers import Score
from clients.errors import EvaluationError
from clients.sources import Row, RowSource
from clients.task import Generated, Item, Scored, Task
from clients.templates import Template

MAX_SHOTS = 32

_T = TypeVar("_T")


class RowTask(Task):
    """A task over rows. Its templates see a row's fields, `lang` (the language) and `words` (wording in the language).

    source: of the rows; where: a template whose value is true for the rows to keep (items and examples), None for all;
    limit: at most how many items; pick: `spread` takes them at even distances, so from the same places in parallel
    languages, `first` the first ones; words: language -> name -> wording; add_bos: what stands before a text, a context
    or a prompt that does not begin with it: true the start token that the model was trained with, false nothing, `auto`
    what lm-evaluation-harness puts there.

    Few-shot: shots: how many solved examples stand before each item; shots_source: where they come from, None for the
    rows themselves; shots_by: a field that examples share with the item, such as the subject; shot_separator: put after
    each example; description: a template, put before the examples, with its own separator. The examples are the first
    fitting rows that are not the item itself, so they are the same in every run.
    """

    source: RowSource
    where: Template | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    pick: Literal["spread", "first"] = "spread"
    words: dict[str, dict[str, JsonValue]] = Field(default={})
    add_bos: StrictBool | Literal["auto"] = "auto"
    shots: Annotated[int, Field(ge=0, le=MAX_SHOTS)] = 0
    shots_source: RowSource | None = None
    shots_by: str | None = None
    shot_separator: str = "\n\n"
    description: Template = Template("")

    @abstractmethod
    def item(self, row: Row, language: str, shots: str) -> Item:
        """The item that a row makes. row: with `lang` and `words`; shots: the beginning of its prompt: the description
        and the examples, each with a separator. Raises EvaluationError, to which the row's place is added."""

    @abstractmethod
    def example(self, row: Row) -> str:
        """A row as a solved example: its prompt and right answer, without the separator."""

    def shared(self, rows: Sequence[Row]) -> dict[str, JsonValue]:
        """Further fields for all rows and examples of a language, computed from all of its rows."""
        return {}

    def load(self, language: str, base: Path) -> tuple[Item, ...]:
        """Its items in a language; see Task.load."""
        rows = self._rows(self.source, language, base)
        pool = self._rows(self.shots_source, language, base) if self.shots and self.shots_source else rows
        shared = self.shared(rows)
        rows, pool = ([{**row, **shared} for row in of] for of in (rows, pool))
        return tuple(self._item(row, pool, language) for row in self._picked(rows))

    def _rows(self, source: RowSource, language: str, base: Path) -> list[Row]:
        if self.words and language not in self.words:
            raise EvaluationError(f"words: none for {language!r}; there are words for {', '.join(self.words)}")
        wording: Row = {"lang": language, "words": self.words.get(language, {})}
        rows: list[Row] = [{**row, **wording} for row in source.rows(language, base)]
        where = self.where
        if where is not None:
            rows = [row for row in rows if at_row(where.value, row, source, language)]
            if not rows:
                raise EvaluationError(f"{source.describe(language)}: `where` keeps no row; expected one at least")
        return rows

    def _picked(self, rows: list[Row]) -> list[Row]:
        if self.limit is None or len(rows) <= self.limit:
            return rows
        if self.pick == "first":
            return rows[: self.limit]
        return [rows[index * len(rows) // self.limit] for index in range(self.limit)]

    def _item(self, row: Row, pool: Sequence[Row], language: str) -> Item:
        source = self.shots_source or self.source
        examples = "".join(
            at_row(self.example, example, source, language) + self.shot_separator
            for example in self._examples(row, pool, language)
        )
        shots = at_row(self.description.render, row, self.source, language) + examples
        return at_row(lambda row: self.item(row, language, shots), row, self.source, language)

    def _examples(self, row: Row, pool: Sequence[Row], language: str) -> list[Row]:
        if not self.shots:
            return []
        fitting = (
            example
            for example in pool
            if example != row and (self.shots_by is None or example.get(self.shots_by) == row.get(self.shots_by))
        )
        examples = list(islice(fitting, self.shots))
        if len(examples) < self.shots:
            place = (self.shots_source or self.source).describe(language)
            alike = f" with {self.shots_by} {row.get(self.shots_by)!r}" if self.shots_by else ""
            raise EvaluationError(
                f"{place}: {len(examples)} examples{alike} for row {row['id']!r}; "
                f"expected {self.shots}, as `shots` says"
            )
        return examples


def scores_of(item: Item, answer: Scored | Generated, expected: int) -> tuple[Score, ...]:
    """The scores in an answer. Raises EvaluationError unless there are as many as expected."""
    if not isinstance(answer, Scored) or len(answer.scores) != expected:
        actual = f"{len(answer.scores)} scores" if isinstance(answer, Scored) else "a generated text"
        raise EvaluationError(
            f"item {item.id!r} in {item.language}: the answer is {actual}; expected {expected} scores"
        )
    return answer.scores


def at_row(work: Callable[[Row], _T], row: Row, source: RowSource, language: str) -> _T:
    """The result of `work` for a row; the row's place is added to an EvaluationError."""
    try:
        return work(row)
    except EvaluationError as error:
        raise EvaluationError(f"{source.describe(language)}, row {row['id']!r}: {error}") from error
