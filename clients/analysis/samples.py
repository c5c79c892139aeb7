"""Sample: the answers of one task in one language as numbers."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clients.errors import EvaluationError
from clients.task import Answers, Generated, Item, Scored, Task
from crane_serve.common.numbers.bootstrap import Values

Flags = NDArray[np.bool_]
ByMask = Mapping[str, Mapping[str, Scored | Generated]]  # mask -> item -> answer


@dataclass(frozen=True)
class Sample:
    """The contribution of each item to each metric under each mask.

    masks: those with any answers, in the order of the evaluation; totals, weights: [masks, metrics, items], 0 where
    there is no answer or the weight is 0; answered: [masks, items]. Items are ordered by their id, so that parallel
    languages have the same order.
    """

    task: Task
    language: str
    masks: tuple[str, ...]
    totals: Values
    weights: Values
    answered: Flags

    @classmethod
    def of(cls, task: Task, language: str, items: Sequence[Item], answers: ByMask, masks: Sequence[str]) -> "Sample":
        """Measure the answers to `items` under `masks`; answers to anything else are left out.

        Raises EvaluationError for a value that is not finite or a weight below 0.
        """
        ordered = sorted(items, key=lambda item: item.id)
        ids = {item.id for item in ordered}
        present = tuple(mask for mask in masks if ids & answers.get(mask, {}).keys())
        names = [metric.name for metric in task.metrics]
        values = np.zeros((2, len(present), len(names), len(ordered)))
        answered = np.zeros((len(present), len(ordered)), dtype=np.bool_)
        for row, mask in enumerate(present):
            by_item = answers[mask]
            for place, item in enumerate(ordered):
                answer = by_item.get(item.id)
                if answer is not None:
                    answered[row, place] = True
                    values[:, row, :, place] = _measured(task, item, answer, names, mask)
        return cls(task, language, present, values[0], values[1], answered)

    def row(self, mask: str) -> int | None:
        """Where a mask is on the first axis, None if it has no answers."""
        return self.masks.index(mask) if mask in self.masks else None


def grouped(answers: Answers) -> dict[tuple[str, str], dict[str, dict[str, Scored | Generated]]]:
    """(task, language) -> mask -> item -> answer."""
    groups: dict[tuple[str, str], dict[str, dict[str, Scored | Generated]]] = defaultdict(lambda: defaultdict(dict))
    for question, answer in answers.answers.items():
        groups[question.task, question.language][question.mask][question.item] = answer
    return groups


def _measured(task: Task, item: Item, answer: Scored | Generated, names: Sequence[str], mask: str) -> list[list[float]]:
    """[2, metrics]: totals and weights."""
    measured = task.measure(item, answer)
    totals, weights = [0.0] * len(names), [0.0] * len(names)
    for place, name in enumerate(names):
        value = measured.get(name)
        if value is None or value.weight == 0:
            continue
        if not (math.isfinite(value.total) and math.isfinite(value.weight) and value.weight > 0):
            raise EvaluationError(
                f"{task.name} in {item.language}: {name} of item {item.id!r} under mask {mask!r} is {value.total} with "
                f"weight {value.weight}; expected finite numbers and a weight of at least 0"
            )
        totals[place], weights[place] = value.total, value.weight
    return [totals, weights]
