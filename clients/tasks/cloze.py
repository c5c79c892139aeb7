"""cloze: knowledge probes: which of many candidates completes a prompt."""

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain
from math import comb
from statistics import fmean
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, JsonValue

from clients.errors import EvaluationError
from clients.row_task import RowTask, at_row, scores_of
from clients.sources import Row
from clients.task import Generated, Item, Metric, ScoreContinuations, Scored, ScoreOf, Value
from clients.templates import Template
from crane_serve.common.models.prefix import Join

MAX_CANDIDATES = 1024  # what /score takes in one request
ALL_ANSWERS = "answers"

_METRICS = (
    Metric(name="hits_at_1", title="Hits@1", unit="share right", higher_is_better=True, score=ScoreOf.LEVEL),
    Metric(name="mrr", title="Mean reciprocal rank", unit="1 / rank", higher_is_better=True, score=ScoreOf.LEVEL),
    Metric(
        name="answer_nats",
        title="Negative log-probability of the answer",
        unit="nats",
        higher_is_better=False,
        score=ScoreOf.EXP_NEGATIVE,
    ),
    Metric(name="margin", title="Margin of the answer", unit="nats", higher_is_better=True),
)


class Cloze(RowTask):
    """Knowledge probes in the manner of LAMA (Petroni et al., 2019): candidates are ranked as continuations of a
    prompt, by the summed log-probability of delimiter + candidate.

    prompt: a template; candidates: a list, a template that gives one, or the word `answers` for all answers of the rows
    in the language; 2 to 1024 different ones, at least one right and one wrong. answer: a template that gives a text,
    or a list of texts, all of which are right. join: as of a `choice`.
    """

    kind: ClassVar[str] = "cloze"

    prompt: Template
    candidates: Literal["answers"] | Template | Annotated[tuple[str, ...], Field(min_length=2)] = "answers"
    answer: Template = Template("{{ answer }}")
    delimiter: str = " "
    join: Join = "shared"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """hits_at_1, mrr, answer_nats and margin, for the most probable right candidate.

        Its rank is 1 plus the number of wrong candidates that are at least as probable: ties count against it, and
        other right ones do not. margin: its log-probability minus that of the best wrong candidate.
        """
        return _METRICS

    def shared(self, rows: Sequence[Row]) -> dict[str, JsonValue]:
        """`all_answers`, if the candidates are all answers."""
        if self.candidates != ALL_ANSWERS:
            return {}
        of_rows = (at_row(self._answers, row, self.source, str(row["lang"])) for row in rows)
        return {"all_answers": list(_distinct(chain.from_iterable(of_rows)))}

    def item(self, row: Row, language: str, shots: str) -> Item:
        """A prompt with the candidates as its continuations.

        Raises EvaluationError unless some candidate is right and some is wrong.
        """
        candidates, answers = self._candidates(row), self._answers(row)
        right = [index for index, candidate in enumerate(candidates) if candidate in answers]
        if not 2 <= len(candidates) <= MAX_CANDIDATES:
            raise EvaluationError(f"{len(candidates)} different candidates; expected 2 to {MAX_CANDIDATES}")
        if not right:
            raise EvaluationError(f"the answer {' or '.join(map(repr, answers))} is not one of the candidates")
        if len(right) == len(candidates):
            raise EvaluationError("all candidates are right; expected a wrong one at least")
        continuations = tuple(self.delimiter + candidate for candidate in candidates)
        request = ScoreContinuations(shots + self.prompt.render(row), continuations, self.add_bos, self.join)
        return Item(str(row["id"]), language, request, {"candidates": list(candidates), "right": list(right)})

    def example(self, row: Row) -> str:
        """Prompt, delimiter and the first right answer."""
        return self.prompt.render(row) + self.delimiter + self._answers(row)[0]

    def measure(self, item: Item, answer: Scored | Generated) -> dict[str, Value]:
        """The values for the best right candidate; see `metrics`."""
        candidates, right = _reference(item)
        logprobs = [score.logprob for score in scores_of(item, answer, len(candidates))]
        best = max(logprobs[index] for index in right)
        wrong = [logprob for index, logprob in enumerate(logprobs) if index not in right]
        rank = 1 + sum(logprob >= best for logprob in wrong)
        return {
            "hits_at_1": Value(float(rank == 1)),
            "mrr": Value(1 / rank),
            "answer_nats": Value(-best),
            "margin": Value(best - max(wrong)),
        }

    def shown(self, item: Item, answer: Scored | Generated) -> str:
        """The candidate of rank 1."""
        candidates, right = _reference(item)
        scores = scores_of(item, answer, len(candidates))
        return candidates[max(range(len(candidates)), key=lambda index: (scores[index].logprob, index not in right))]

    def expected(self, item: Item) -> str:
        """The right candidates."""
        candidates, right = _reference(item)
        return " / ".join(candidates[index] for index in sorted(right))

    def chance(self, items: Sequence[Item]) -> dict[str, float]:
        """Hits@1 and mean reciprocal rank of a random order of each item's candidates."""
        if not items:
            return {}
        counts = [(len(candidates), len(right)) for candidates, right in map(_reference, items)]
        return {
            "hits_at_1": fmean(right / of for of, right in counts),
            "mrr": fmean(_random_reciprocal_rank(of, right) for of, right in counts),
        }

    def _candidates(self, row: Row) -> tuple[str, ...]:
        if isinstance(self.candidates, tuple):
            return _distinct(self.candidates)
        candidates = self.candidates.value(row) if isinstance(self.candidates, Template) else row["all_answers"]
        return _distinct(_texts(candidates, "candidates"))

    def _answers(self, row: Row) -> tuple[str, ...]:
        value = self.answer.value(row)
        return _distinct(_texts(value if isinstance(value, list) else [value], "answer"))


def _texts(value: JsonValue, name: str) -> list[str]:
    if not isinstance(value, list) or not value:
        raise EvaluationError(f"{name}: found {value!r}; expected a list of texts")
    for text in value:
        if isinstance(text, bool) or not isinstance(text, str | int | float) or not str(text).strip():
            raise EvaluationError(f"{name}: found {text!r}; expected text")
    return [str(text) for text in value]


def _distinct(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


def _reference(item: Item) -> tuple[list[str], frozenset[int]]:
    reference: Any = item.reference
    return reference["candidates"], frozenset(reference["right"])


@cache
def _random_reciprocal_rank(of: int, right: int) -> float:
    """Expected 1 / rank of the best of `right` right candidates among `of` in random order; other right ones do not
    count.

    P(rank = r) is the share of orders whose first right candidate has place r: C(of - r, right - 1) / C(of, right).
    """
    return sum(comb(of - rank, right - 1) / rank for rank in range(1, of - right + 2)) / comb(of, right)
