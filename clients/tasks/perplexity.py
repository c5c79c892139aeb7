"""perplexity: the model's negative log-likelihood of texts."""

import math
from typing import ClassVar, Self

from pydantic import model_validator

from clients.row_task import RowTask, scores_of
from clients.sources import Row
from clients.task import Generated, Item, Metric, Scored, ScoreOf, ScoreText, Value
from clients.templates import Template

_METRICS = (
    Metric(
        name="nats_per_token",
        title="Negative log-likelihood",
        unit="nats per token",
        higher_is_better=False,
        score=ScoreOf.EXP_NEGATIVE,
    ),
    Metric(name="bits_per_byte", title="Bits per byte", unit="bits per byte of UTF-8", higher_is_better=False),
)


class Perplexity(RowTask):
    """Negative log-likelihood of whole texts, every token after BOS (or after EOS, for a tokenizer without BOS);
    exp(nats_per_token) is the perplexity. With `add_bos: false` the first token has nothing before it and is left out.

    Both figures are corpus totals, so that each token (or byte) counts the same. Bits per byte compares models with
    different tokenizers (lm-evaluation-harness's `bits_per_byte`). It has no LangSpec-F1 score, since exp(-bits) is not
    a probability. text: a template. A text is scored from its start, so there are no examples.
    """

    kind: ClassVar[str] = "perplexity"

    text: Template = Template("{{ text }}")

    @model_validator(mode="after")
    def _no_shots(self) -> Self:
        if self.shots or self.shots_source or self.description:
            raise ValueError("shots and description do not fit perplexity; whole texts are scored")
        return self

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """nats_per_token and bits_per_byte."""
        return _METRICS

    def item(self, row: Row, language: str, shots: str) -> Item:
        """A text to be scored."""
        return Item(str(row["id"]), language, ScoreText(self.text.render(row), self.add_bos))

    def example(self, row: Row) -> str:
        """The text."""
        return self.text.render(row)

    def measure(self, item: Item, answer: Scored | Generated) -> dict[str, Value]:
        """Totals in nats and bits, weighted by tokens and bytes; a text without tokens has no weight."""
        (score,) = scores_of(item, answer, 1)
        nats = -score.logprob
        return {
            "nats_per_token": Value(nats, score.tokens),
            "bits_per_byte": Value(nats / math.log(2), score.bytes if score.tokens else 0),
        }
