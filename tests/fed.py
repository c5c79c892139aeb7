"""A task that is fed its values, and answers made of arrays of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from clients.task import Answers, Generate, Generated, Item, Metric, Question, Scored, ScoreOf, Task, Value

NATS = Metric(name="nats_per_token", title="Loss", unit="nats", higher_is_better=False, score=ScoreOf.EXP_NEGATIVE)
ACCURACY = Metric(name="accuracy", title="Accuracy", unit="", higher_is_better=True, score=ScoreOf.LEVEL)
Fed = dict[tuple[str, str], Any]  # (language, mask) -> totals [items], or [items, 2] with weights


class FedTask(Task):
    """An answer's text holds its total and its weight."""

    kind: ClassVar[str] = "fed"

    metric: Metric = NATS

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (self.metric,)

    def load(self, language: str, base: Path) -> tuple[Item, ...]:
        return ()

    def measure(self, item: Item, answer: Scored | Generated) -> dict[str, Value]:
        assert isinstance(answer, Generated)
        return {self.metric.name: Value(*json.loads(answer.text))}


def fed_answers(
    values: Fed, metric: Metric = NATS, missing: Sequence[tuple[str, str, int]] = (), name: str = "fed"
) -> Answers:
    """Answers of one task. missing: (language, mask, place of the item) without an answer."""
    items: dict[str, tuple[Item, ...]] = {}
    answers: dict[Question, Scored | Generated] = {}
    for (language, mask), given in values.items():
        rows = np.asarray(given, dtype=np.float64)
        rows = rows if rows.ndim == 2 else np.stack([rows, np.ones(len(rows))], axis=1)
        items[language] = tuple(Item(f"i{place:04}", language, Generate("?", 1)) for place in range(len(rows)))
        for place, (item, row) in enumerate(zip(items[language], rows.tolist(), strict=True)):
            if (language, mask, place) not in missing:
                text = json.dumps(row)
                answers[Question(name, language, item.id, mask)] = Generated(text=text, tokens=1, finish_reason="stop")
    return Answers({name: FedTask(name=name, metric=metric)}, {name: items}, answers)
