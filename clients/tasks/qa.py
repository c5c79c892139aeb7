"""qa: questions answered by generation, compared with the answers that are accepted."""

from typing import ClassVar, Literal, cast

from pydantic import JsonValue

from clients.errors import EvaluationError
from clients.generation_task import GenerationTask, Stops, Tokens, generated
from clients.normalise import exact_match, f1, last_number
from clients.sources import Row
from clients.task import Generated, Item, Metric, Scored, ScoreOf, Value
from clients.templates import Template

_F1 = Metric(name="f1", title="F1 of words", unit="F1", higher_is_better=True, score=ScoreOf.LEVEL)
_EXACT_MATCH = Metric(
    name="exact_match", title="Exact match", unit="share right", higher_is_better=True, score=ScoreOf.LEVEL
)
_UNANSWERED = Metric(name="unanswered", title="Unanswered", unit="share of answers", higher_is_better=False)


class QuestionAnswering(GenerationTask):
    """Extractive questions as in XQuAD (Artetxe et al., arXiv:1910.11856), or questions with a number as answer as in
    MGSM (Shi et al., arXiv:2210.03057).

    answers: a template that gives the accepted answers as a list, or the only one. An example is its prompt, a space
    and the first of them. match: `text` compares words as clients.normalise finds them; `number` the last number of
    the generated text. Accepted numbers are written as in JSON or English: 1234.5 or 1,234.5.
    """

    kind: ClassVar[str] = "qa"

    answers: Template
    max_tokens: Tokens = 32
    stop: Stops = ("\n",)
    match: Literal["text", "number"] = "text"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """f1 (not of numbers), exact_match and unanswered: whether nothing was generated, or no number."""
        return (_EXACT_MATCH, _UNANSWERED) if self.match == "number" else (_F1, _EXACT_MATCH, _UNANSWERED)

    def reference(self, row: Row, language: str) -> dict[str, JsonValue]:
        """The accepted answers."""
        return {"answers": cast(list[JsonValue], self._accepted(row))}

    def example(self, row: Row) -> str:
        """Prompt, space and first accepted answer."""
        return f"{self.prompt.render(row)} {self._accepted(row)[0]}"

    def expected(self, item: Item) -> str:
        """The accepted answers."""
        return " / ".join(cast(list[str], item.reference["answers"]))

    def measure(self, item: Item, answer: Scored | Generated) -> dict[str, Value]:
        """0 or 1 for exact_match and unanswered, 0 to 1 for f1."""
        text = generated(item, answer).text
        accepted = cast(list[str], item.reference["answers"])
        if self.match == "number":
            number = last_number(text, item.language)
            right = number is not None and number in [last_number(one, "en") for one in accepted]
            return {"exact_match": Value(float(right)), "unanswered": Value(float(number is None))}
        return {
            "f1": Value(f1(text, accepted, item.language)),
            "exact_match": Value(exact_match(text, accepted, item.language)),
            "unanswered": Value(float(not text.strip())),
        }

    def shown(self, item: Item, answer: Scored | Generated) -> str:
        """The text without white space around it."""
        return generated(item, answer).text.strip()

    def _accepted(self, row: Row) -> list[str]:
        value = self.answers.value(row)
        answers = [_text(one) for one in (value if isinstance(value, list) else [value])]
        if not answers or not all(answers):
            raise EvaluationError(f"`answers` gives {value!r}; expected a text or number, or a list of such")
        if self.match == "number" and any(last_number(one, "en") is None for one in answers):
            raise EvaluationError(f"`answers` gives {value!r}; expected numbers, as `match` says")
        return answers


def _text(value: JsonValue) -> str:
    """An answer as text; empty for values that cannot be an answer."""
    return "" if value is None or isinstance(value, bool | list | dict) else str(value).strip()
