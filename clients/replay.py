"""Replay: run the plan of an evaluation again, on the same model, masks and items, and compare the results."""

from collections.abc import Mapping
from dataclasses import dataclass

from clients.errors import EvaluationError
from clients.evaluation import Evaluation
from clients.plan import Plan
from clients.record import Items, digests_of
from clients.results import Settings, changed_keys, short


@dataclass(frozen=True)
class Agreement:
    """The agreement of a replay. cells: number of changes that both have; identical: of those, how many are exactly
    equal; largest: the largest difference between two changes, with the name of its cell."""

    cells: int
    identical: int
    largest: float
    where: str

    def __str__(self) -> str:
        agreement = f"{self.identical} of {self.cells} changes are identical to those replayed"
        return (
            agreement
            if self.identical == self.cells
            else f"{agreement}; the largest difference is {self.largest:.3g} ({self.where})"
        )


class Replay:
    """An evaluation to be repeated. Raises EvaluationError if its plan is not valid."""

    def __init__(self, evaluation: Evaluation, where: str) -> None:
        self.plan = Plan.parse(evaluation.plan, where)
        self._before = evaluation

    def expect(self, settings: Settings, items: Items) -> None:
        """Raise EvaluationError unless model, masks and items are those of the evaluation."""
        before = self._before
        fingerprint = {key: value for key, value in before.model.items() if key != "name"}
        if changed := changed_keys(fingerprint, settings.fingerprint):
            raise EvaluationError(
                f"the server serves another model ({settings.model}) than the evaluation to replay "
                f"({before.model.get('name')}): its {', '.join(changed)} differ"
            )
        for name, mask in before.masks.items():
            now = settings.masks.get(name)
            if now is None or now.digest != mask.digest:
                theirs = "missing" if now is None else short(now.digest)
                raise EvaluationError(
                    f"mask {name!r} of the evaluation to replay has digest {short(mask.digest)}; "
                    f"the server's is {theirs}"
                )
        for task in before.tasks:
            digests = digests_of(items[task.name])
            for language, digest in task.digests.items():
                if digests.get(language) != digest:
                    raise EvaluationError(
                        f"task {task.name!r} has other items in {language!r} than the evaluation to replay (digest "
                        f"{short(digests.get(language))}, expected {short(digest)})"
                    )

    def agreement(self, evaluation: Evaluation) -> Agreement:
        """Compare the changes of the evaluation with those of its repetition."""
        before, now = _changes(self._before), _changes(evaluation)
        common = [place for place in before if place in now]
        differences = {place: abs(before[place] - now[place]) for place in common}
        where = max(differences, key=differences.__getitem__, default=())
        return Agreement(
            cells=len(common),
            identical=sum(difference == 0 for difference in differences.values()),
            largest=differences.get(where, 0.0),
            where=", ".join(where),
        )


def _changes(evaluation: Evaluation) -> Mapping[tuple[str, ...], float]:
    return {
        (cell.task, cell.metric, cell.language, cell.mask): cell.change.mean
        for cell in evaluation.cells
        if cell.change is not None and cell.mask != "none"
    }
