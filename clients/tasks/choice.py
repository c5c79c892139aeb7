"""choice: multiple-choice questions, answered with the choice that the model finds most probable."""

from collections.abc import Sequence
from statistics import fmean
from typing import Annotated, Any, ClassVar

from pydantic import Field, JsonValue

from clients.errors import EvaluationError
from clients.row_task import RowTask, scores_of
from clients.sources import Row
from clients.task import Generated, Item, Metric, ScoreContinuations, Scored, ScoreOf, Value
from clients.templates import Template
from crane_serve.common.models.prefix import Join

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_METRICS = (
    Metric(name="accuracy", title="Accuracy", unit="share right", higher_is_better=True, score=ScoreOf.LEVEL),
    Metric(
        name="accuracy_norm",
        title="Accuracy, by log-probability per character",
        unit="share right",
        higher_is_better=True,
        score=ScoreOf.LEVEL,
    ),
    Metric(name="margin", title="Margin of the right choice", unit="nats", higher_is_better=True),
)


class Choice(RowTask):
    """Multiple choice by log-likelihood, as lm-evaluation-harness's `output_type: multiple_choice` without a chat
    template: the context is description + examples + question, and each continuation is delimiter + choice.

    question is the harness's `doc_to_text`, choices `doc_to_choice`, answer `doc_to_target`, delimiter
    `target_delimiter`, shot_separator `fewshot_delimiter`, accuracy `acc` and accuracy_norm `acc_norm`. Both move white
    space from the end of a context into its continuations. A token that spans context and choice is scored with the
    choice; `join: length` treats it as the harness does, which does not score it.

    question: a template; choices: a template that gives a list, or a list of templates; their number may differ from
    row to row, and is at least two. answer: a template that gives the index of the right choice from 0, or its text;
    with `letters`, its letter: A for the first.
    """

    kind: ClassVar[str] = "choice"

    question: Template
    choices: Template | Annotated[tuple[Template, ...], Field(min_length=2)]
    answer: Template
    letters: bool = False
    delimiter: str = " "
    join: Join = "shared"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """accuracy, accuracy_norm and margin.

        accuracy: whether the right choice has the highest summed log-probability (the first choice wins a tie);
        accuracy_norm: the same with log-probabilities divided by the choice's number of characters (without the
        delimiter); margin: log-probability of the right choice minus that of the best wrong one.
        """
        return _METRICS

    def item(self, row: Row, language: str, shots: str) -> Item:
        """A context with the choices as its continuations."""
        choices = self._choices(row)
        context, continuations = shots + self.question.render(row), tuple(self.delimiter + choice for choice in choices)
        request = ScoreContinuations(context, continuations, self.add_bos, self.join)
        return Item(str(row["id"]), language, request, {"choices": list(choices), "answer": self._right(row, choices)})

    def example(self, row: Row) -> str:
        """Question, delimiter and right choice."""
        choices = self._choices(row)
        return self.question.render(row) + self.delimiter + choices[self._right(row, choices)]

    def measure(self, item: Item, answer: Scored | Generated) -> dict[str, Value]:
        """0 or 1 for the accuracies, nats for the margin."""
        choices, right = _reference(item)
        logprobs = [score.logprob for score in scores_of(item, answer, len(choices))]
        per_character = [logprob / len(choice) for logprob, choice in zip(logprobs, choices, strict=True)]
        best_wrong = max(logprob for index, logprob in enumerate(logprobs) if index != right)
        return {
            "accuracy": Value(float(_first_best(logprobs) == right)),
            "accuracy_norm": Value(float(_first_best(per_character) == right)),
            "margin": Value(logprobs[right] - best_wrong),
        }

    def shown(self, item: Item, answer: Scored | Generated) -> str:
        """The selected choice, by summed log-probability."""
        choices, _ = _reference(item)
        return choices[_first_best([score.logprob for score in scores_of(item, answer, len(choices))])]

    def expected(self, item: Item) -> str:
        """The right choice."""
        choices, right = _reference(item)
        return choices[right]

    def chance(self, items: Sequence[Item]) -> dict[str, float]:
        """The accuracies of guessing: the mean of 1 / number of choices."""
        if not items:
            return {}
        guessing = fmean(1 / len(_reference(item)[0]) for item in items)
        return {"accuracy": guessing, "accuracy_norm": guessing}

    def _choices(self, row: Row) -> tuple[str, ...]:
        if isinstance(self.choices, tuple):
            choices: JsonValue = [choice.render(row) for choice in self.choices]
        else:
            choices = self.choices.value(row)
        if not isinstance(choices, list) or len(choices) < 2:
            raise EvaluationError(f"choices are {choices!r}; expected a list of two at least")
        for choice in choices:
            if isinstance(choice, bool) or not isinstance(choice, str | int | float) or not str(choice):
                raise EvaluationError(f"one of the choices is {choice!r}; expected text")
        return tuple(str(choice) for choice in choices)

    def _right(self, row: Row, choices: tuple[str, ...]) -> int:
        answer = self.answer.value(row)
        if isinstance(answer, str):
            index = self._of_letter(answer) if self.letters else _of_text(answer, choices)
        elif isinstance(answer, bool) or not isinstance(answer, int | float) or answer != int(answer):
            index = None
        else:
            index = int(answer)
        if index is None or not 0 <= index < len(choices):
            letters = f"a letter from A to {_LETTERS[len(choices) - 1]}" if self.letters else "a choice's text"
            raise EvaluationError(f"answer is {answer!r}; expected {letters} or an index from 0 to {len(choices) - 1}")
        return index

    @staticmethod
    def _of_letter(answer: str) -> int | None:
        letter = answer.strip().upper()
        return _LETTERS.index(letter) if len(letter) == 1 and letter in _LETTERS else None


def _of_text(answer: str, choices: tuple[str, ...]) -> int | None:
    """The index for an answer that is a choice's text, or a number in digits (as in CSV files)."""
    by_text = choices.index(answer) if answer in choices else None
    by_number = int(answer) if answer.isdecimal() else None
    if by_text is not None and by_number is not None and by_text != by_number:
        raise EvaluationError(
            f"answer {answer!r} is the text of choice {by_text} and may be an index; for an index, write a template "
            "that gives a number, such as {{ answer | int }}, for the text {{ choices.index(answer) }}"
        )
    return by_number if by_text is None else by_text


def _reference(item: Item) -> tuple[list[str], int]:
    reference: Any = item.reference
    return reference["choices"], reference["answer"]


def _first_best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
