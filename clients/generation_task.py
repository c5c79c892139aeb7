"""GenerationTask: a task over rows whose answers are generated texts."""

from abc import abstractmethod
from typing import Annotated

from pydantic import Field, JsonValue

from clients.errors import EvaluationError
from clients.row_task import RowTask
from clients.sources import Row
from clients.task import Generate, Generated, Item, Scored
from clients.templates import Template

Tokens = Annotated[int, Field(ge=1)]
Stops = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=16)]
Penalty = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]


class GenerationTask(RowTask):
    """Greedy generation from a prompt.

    prompt: a template; the examples stand before it. max_tokens, stop, repetition_penalty: as of the server's
    /generate; a stop text is not part of the answer.
    """

    prompt: Template
    max_tokens: Tokens
    stop: Stops = ()
    repetition_penalty: Penalty = 1.0

    @abstractmethod
    def reference(self, row: Row, language: str) -> dict[str, JsonValue]:
        """The reference that the answer to a row is compared with. Raises EvaluationError saying what was expected."""

    def item(self, row: Row, language: str, shots: str) -> Item:
        """The examples and the prompt, to be continued. Raises EvaluationError if they are empty."""
        prompt = shots + self.prompt.render(row)
        if not prompt:
            raise EvaluationError("the prompt is empty; expected a text")
        request = Generate(prompt, self.max_tokens, self.stop, self.repetition_penalty, self.add_bos)
        return Item(str(row["id"]), language, request, self.reference(row, language))

    def shown(self, item: Item, answer: Scored | Generated) -> str:
        """The text."""
        return generated(item, answer).text


def generated(item: Item, answer: Scored | Generated) -> Generated:
    """An answer that must be a generated text. Raises EvaluationError if it has scores instead."""
    if not isinstance(answer, Generated):
        raise EvaluationError(f"item {item.id!r} in {item.language}: the answer is scores; expected a generated text")
    return answer
