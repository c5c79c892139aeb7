"""open_generation: free continuations of prompts: their language, their repetitiveness, and a judge's mark.

Whether a text keeps to its language is measured as in Marchisio et al. (arXiv:2406.20052): see
`clients.language_confusion`.
"""

from typing import ClassVar, Self, cast

from pydantic import JsonValue, model_validator

from clients.errors import EvaluationError
from clients.generation_task import GenerationTask, Penalty, Tokens, generated
from clients.judge import Judge
from clients.language_confusion import UNIDENTIFIED, Confusion
from clients.normalise import words
from clients.sources import Row
from clients.task import Generated, Item, Metric, Scored, ScoreOf, Value
from clients.templates import Template
from crane_serve.common.text.languages import code_of, identify, known_languages, same_language

_RUN = 4  # words

_METRICS = (
    Metric(
        name="in_language",
        title="In the prompt's language",
        unit="share of texts",
        higher_is_better=True,
        score=ScoreOf.LEVEL,
    ),
    Metric(name="unidentified", title="Language unidentified", unit="share of texts", higher_is_better=False),
    Metric(name="repetition", title="Repeated runs of four words", unit="share of runs", higher_is_better=False),
    Metric(name="length", title="Length", unit="tokens", higher_is_better=True),
    Metric(name="empty", title="Empty", unit="share of texts", higher_is_better=False),
    Metric(name="line_pass", title="Every line in the prompt's language", unit="share of texts", higher_is_better=True),
    Metric(
        name="word_pass",
        title="No word in another script",
        unit="share of texts that pass by line",
        higher_is_better=True,
    ),
    Metric(name="substituted", title="A line in another language", unit="share of texts", higher_is_better=False),
)
_UNPARSEABLE = Metric(
    name="unparseable", title="Replies without a mark", unit="share of replies", higher_is_better=False
)


class OpenGeneration(GenerationTask):
    """Free continuations of prompts. The repetition penalty is that of CRANE's published evaluation.

    judge: marks every text, empty ones too; question: a template for the question in the judge's prompt, None for the
    prompt without the description. There are no examples, as no row has a right answer.
    """

    kind: ClassVar[str] = "open_generation"
    tells_languages: ClassVar[bool] = True

    prompt: Template = Template("{{ text }}")
    max_tokens: Tokens = 64
    repetition_penalty: Penalty = 1.1
    question: Template | None = None
    judge: Judge | None = None

    @model_validator(mode="after")
    def _without_shots(self) -> Self:
        if self.shots:
            raise ValueError("open_generation has no examples; expected no `shots`")
        return self

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """in_language, unidentified, repetition, length, empty, line_pass, word_pass and substituted; with a judge
        judged and unparseable.

        in_language: whether the text is identified as of the item's language, or of one so close that identification
        confuses them. unidentified: whether it is too short or too mixed to tell; such a text is not in the language.
        repetition: the share of its runs of four words (characters in scripts without spaces) that occurred before in
        it; 0 with fewer words. length: in tokens; neither direction is better in itself, but shorter is shown as worse,
        since broken models tend to stop early. line_pass: whether a line is in the language and none in another;
        word_pass: whether a text that passes by line has no word in a script that the language is not written in (other
        texts do not count); substituted: whether a line is in another language, and `substitute` says in which. judged:
        the mean mark of the texts that have one. unparseable: the share of the judge's replies without exactly one mark
        in range; they do not count for other metrics.
        """
        if self.judge is None:
            return _METRICS
        unit = f"marks from {self.judge.lowest:g} to {self.judge.highest:g}"
        judged = Metric(name="judged", title="Judge's mark", unit=unit, higher_is_better=True, score=ScoreOf.LEVEL)
        return (*_METRICS, judged, _UNPARSEABLE)

    def reference(self, row: Row, language: str) -> dict[str, JsonValue]:
        """The question for the judge, and the judge's digest.

        Raises EvaluationError for a language that cannot be identified.
        """
        if code_of(language) not in known_languages():
            known = ", ".join(sorted(known_languages()))
            raise EvaluationError(f"language {language!r} cannot be identified; expected one that begins with {known}")
        if self.judge is None:
            return {}
        question = self.question or self.prompt
        return {"question": question.render(row), "judge": self.judge.digest}

    def example(self, row: Row) -> str:
        """Raises EvaluationError, since no row has a right answer."""
        raise EvaluationError("open_generation has no examples")

    async def finish(self, item: Item, answer: Scored | Generated) -> Scored | Generated:
        """The answer with the judge's reply, if there is a judge. Raises what Judge.ask does."""
        if self.judge is None:
            return answer
        text = generated(item, answer).text
        reply = await self.judge.ask(cast(str, item.reference["question"]), text, item.language)
        return answer.model_copy(update={"judgement": reply})

    def measure(self, item: Item, answer: Scored | Generated) -> dict[str, Value]:
        """0 or 1 for shares of texts and replies, 0 to 1 for repetition, tokens for length, marks for judged."""
        answer = generated(item, answer)
        language, confusion = identify(answer.text), Confusion.of(answer.text, item.language)
        values = {
            "in_language": Value(float(language is not None and same_language(code_of(item.language), language))),
            "unidentified": Value(float(language is None)),
            "repetition": Value(_repetition(words(answer.text))),
            "length": Value(float(answer.tokens)),
            "empty": Value(float(not answer.text.strip())),
            "line_pass": Value(float(confusion.by_line)),
            "word_pass": Value(0.0, 0.0) if confusion.by_word is None else Value(float(confusion.by_word)),
            "substituted": Value(float(confusion.substitute not in (None, UNIDENTIFIED))),
        }
        return values if self.judge is None else values | _judged(self.judge, answer.judgement)

    def substitute(self, item: Item, answer: Scored | Generated) -> str | None:
        """The language that a text is in instead of the item's, by its lines; `unidentified` if that cannot be told."""
        return Confusion.of(generated(item, answer).text, item.language).substitute


def _judged(judge: Judge, reply: str | None) -> dict[str, Value]:
    """The values for a judge's reply. A reply without a mark has no weight in `judged`; without a reply both have no
    weight."""
    if reply is None:
        return {"judged": Value(0.0, 0.0), "unparseable": Value(0.0, 0.0)}
    mark = judge.score(reply)
    judged = Value(0.0, 0.0) if mark is None else Value(mark)
    return {"judged": judged, "unparseable": Value(float(mark is None))}


def _repetition(word_list: list[str]) -> float:
    """Share of the runs of four words that occurred before: 1 - different runs / runs; 0 without runs."""
    runs = [tuple(word_list[start : start + _RUN]) for start in range(len(word_list) - _RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
