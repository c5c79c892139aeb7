"""Compare two evaluations: their settings, and their results."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from clients.analysis.samples import Sample, grouped
from clients.errors import EvaluationError
from clients.evaluation import UNMASKED, Cell, Evaluation, Substitution, TaskInfo
from clients.task import Answers, Metric
from crane_serve.common.numbers.bootstrap import Estimate, Values, estimate, resampled_sums
from crane_serve.common.reports.settings import brief, flat

_NAMED = 5  # at most so many names of a long list are shown


class ComparedCell(BaseModel):
    """One metric of one task in one language under one mask, in two evaluations.

    mask, second_mask: its name in each; first, second: the change (masked minus unmasked) that each reports;
    difference: second minus first, over the same items if paired; items: how many those are, None if not paired.
    """

    model_config = ConfigDict(frozen=True)

    task: str
    metric: str
    language: str
    mask: str
    second_mask: str
    first: Estimate
    second: Estimate
    difference: Estimate
    paired: bool
    items: int | None = None

    @property
    def mask_name(self) -> str:
        """The mask's name, both if they differ."""
        return self.mask if self.mask == self.second_mask else f"{self.mask} = {self.second_mask}"


@dataclass(frozen=True)
class Comparison:
    """Two evaluations side by side.

    first, second: their names; metrics: by task, those compared, the headline first; differences: between their
    settings, a phrase each; only_first, only_second: tasks and metrics that only one of them has; substitutions: of the
    first and of the second, under the masks compared and without one.
    """

    first: str
    second: str
    metrics: Mapping[str, tuple[Metric, ...]]
    cells: tuple[ComparedCell, ...]
    differences: tuple[str, ...] = ()
    only_first: tuple[str, ...] = ()
    only_second: tuple[str, ...] = ()
    substitutions: tuple[tuple[Substitution, ...], tuple[Substitution, ...]] = ((), ())


def compare(
    first: Evaluation,
    second: Evaluation,
    first_answers: Answers | None = None,
    second_answers: Answers | None = None,
    *,
    seed: int = 0,
) -> Comparison:
    """The results of two evaluations, for every task, metric, language and mask that both have.

    Tasks and metrics are matched by name; masks by name, or if they share none, by method, language, budget and seed.
    seed: of the joint bootstrap of paired differences. Differences are paired if both evaluations have the answers, and
    the items of a task and language have the same digest in both.

    Raises EvaluationError, saying why, if nothing can be compared.
    """
    masks = _matched_masks(first, second)
    tasks = _common_tasks(first, second)
    pairs = [
        (cell, other)
        for task in tasks
        for metric in task.metrics
        for mask, second_mask in masks.items()
        for language in task.languages
        if (cell := _changed(first, task.name, metric.name, language, mask)) is not None
        and (other := _changed(second, task.name, metric.name, language, second_mask)) is not None
    ]
    if not pairs:
        raise EvaluationError(
            f"{first.name} and {second.name} have tasks and masks in common, but no change of a metric in the same "
            "language; expected one at least"
        )
    paired = dict(_paired_differences(first, second, first_answers, second_answers, tasks, masks, seed))
    cells = tuple(_compared(cell, other, paired.get(_place(cell))) for cell, other in pairs)
    present = {(cell.task, cell.metric) for cell in cells}
    metrics = {task.name: tuple(m for m in task.metrics if (task.name, m.name) in present) for task in tasks}
    return Comparison(
        first.name,
        second.name,
        {task: of_task for task, of_task in metrics.items() if of_task},
        cells,
        tuple(_differences(first, second, tasks, masks)),
        tuple(_only(first, second, set(masks))),
        tuple(_only(second, first, set(masks.values()))),
        (_substitutions(first, metrics, masks), _substitutions(second, metrics, masks.values())),
    )


def independent_difference(first: Estimate, second: Estimate) -> Estimate:
    """second - first of independent samples, computed from their intervals only.

    MOVER, the method of variance estimates recovery (Zou and Donner, Statistics in Medicine 27, 2008): the lower end is
    d - sqrt((second - second.low)^2 + (first.high - first)^2), the upper one likewise. No interval if one of the two
    has none.
    """
    mean = second.mean - first.mean
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return Estimate(mean=mean, low=None, high=None)
    below = math.hypot(second.mean - second.low, first.high - first.mean)
    above = math.hypot(second.high - second.mean, first.mean - first.low)
    return Estimate(mean=mean, low=mean - below, high=mean + above)


_Place = tuple[str, str, str, str]  # task, metric, language, first mask


def _place(cell: Cell) -> _Place:
    return cell.task, cell.metric, cell.language, cell.mask


def _changed(evaluation: Evaluation, task: str, metric: str, language: str, mask: str) -> Cell | None:
    cell = evaluation.cell(task, metric, language, mask)
    return None if cell is None or cell.change is None else cell


def _compared(cell: Cell, other: Cell, paired: tuple[Estimate, int] | None) -> ComparedCell:
    if cell.change is None or other.change is None:
        raise ValueError("expected cells with changes")
    difference, items = paired or (independent_difference(cell.change, other.change), None)
    return ComparedCell(
        task=cell.task,
        metric=cell.metric,
        language=cell.language,
        mask=cell.mask,
        second_mask=other.mask,
        first=cell.change,
        second=other.change,
        difference=difference,
        paired=paired is not None,
        items=items,
    )


def _matched_masks(first: Evaluation, second: Evaluation) -> dict[str, str]:
    """Mask names of the second evaluation by those of the first."""
    names = [name for name in first.masks if name != UNMASKED]
    if common := {name: name for name in names if name in second.masks}:
        return common
    theirs = _by_origin(second)
    matched = {name: theirs[origin] for origin, name in _by_origin(first).items() if origin in theirs}
    if not matched:
        raise EvaluationError(
            f"{first.name} ({_some(names)}) and {second.name} ({_some(n for n in second.masks if n != UNMASKED)}) have "
            "no mask in common, neither by name nor by method, language, budget and seed; expected one at least"
        )
    return matched


def _by_origin(evaluation: Evaluation) -> dict[tuple[object, ...], str]:
    """Names of masks by their origin, without masks that share an origin."""
    names_by_origin: dict[tuple[object, ...], list[str]] = {}
    for name, mask in evaluation.masks.items():
        if mask.method is not None:
            names_by_origin.setdefault((mask.method, mask.language, mask.budget, mask.seed), []).append(name)
    return {origin: names[0] for origin, names in names_by_origin.items() if len(names) == 1}


def _common_tasks(first: Evaluation, second: Evaluation) -> list[TaskInfo]:
    theirs = {task.name for task in second.tasks}
    common = [task for task in first.tasks if task.name in theirs]
    if not common:
        raise EvaluationError(
            f"{first.name} ({_some(task.name for task in first.tasks)}) and {second.name} ({_some(sorted(theirs))}) "
            "have no task in common; expected one at least"
        )
    return common


def _paired_differences(
    first: Evaluation,
    second: Evaluation,
    first_answers: Answers | None,
    second_answers: Answers | None,
    tasks: Sequence[TaskInfo],
    masks: Mapping[str, str],
    seed: int,
) -> Iterator[tuple[_Place, tuple[Estimate, int]]]:
    """Differences with the number of items answered by both models with and without the mask."""
    if first_answers is None or second_answers is None:
        return
    first_groups, second_groups = grouped(first_answers), grouped(second_answers)
    for task in tasks:
        for language in _same_items(task, second.task(task.name)):
            place = (task.name, language)
            ours = _sample(first_answers, place, first_groups.get(place, {}), first.masks)
            theirs = _sample(second_answers, place, second_groups.get(place, {}), second.masks)
            if ours is not None and theirs is not None:
                yield from _sample_differences(ours, theirs, masks, seed)


def _same_items(task: TaskInfo, other: TaskInfo) -> list[str]:
    """Languages in which both evaluations have the same items."""
    theirs = other.digests
    return [language for language in task.languages if task.digests.get(language, "") == theirs.get(language)]


def _sample(
    answers: Answers, place: tuple[str, str], by_mask: Mapping[str, Mapping[str, Any]], masks: Iterable[str]
) -> Sample | None:
    task, items = answers.tasks.get(place[0]), answers.items.get(place[0], {}).get(place[1], ())
    return None if task is None or not items else Sample.of(task, place[1], items, by_mask, tuple(masks))


def _sample_differences(
    first: Sample, second: Sample, masks: Mapping[str, str], seed: int
) -> Iterator[tuple[_Place, tuple[Estimate, int]]]:
    names = [metric.name for metric in first.task.metrics]
    theirs = {metric.name: place for place, metric in enumerate(second.task.metrics)}
    columns: list[Values] = []
    places: list[tuple[_Place, int, bool]] = []
    for mask, second_mask in masks.items():
        rows = (first.row(mask), first.row(UNMASKED), second.row(second_mask), second.row(UNMASKED))
        if any(row is None for row in rows):
            continue
        masked, plain, second_masked, second_plain = (row for row in rows if row is not None)
        both = first.answered[[masked, plain]].all(axis=0) & second.answered[[second_masked, second_plain]].all(axis=0)
        for metric, name in enumerate(names):
            if name not in theirs:
                continue
            four = (
                (first, masked, metric),
                (first, plain, metric),
                (second, second_masked, theirs[name]),
                (second, second_plain, theirs[name]),
            )
            of_metric = [values[row, place] * both for of, row, place in four for values in (of.totals, of.weights)]
            columns += of_metric
            few = any(np.count_nonzero(weights) < 2 for weights in of_metric[1::2])
            places.append(((first.task.name, name, first.language, mask), int(np.count_nonzero(both)), few))
    if not places:
        return
    sums = resampled_sums(np.stack(columns, axis=1), seed=seed).reshape(-1, len(places), 4, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        levels = sums[..., 0] / sums[..., 1]  # [1 + resamples, places, 4]
    differences = levels[..., 2] - levels[..., 3] - (levels[..., 0] - levels[..., 1])
    for number, (place, items, few) in enumerate(places):
        interval = estimate(differences[:, number])
        if interval is not None:
            yield place, (interval.model_copy(update={"low": None, "high": None}) if few else interval, items)


def _differences(
    first: Evaluation, second: Evaluation, tasks: Sequence[TaskInfo], masks: Mapping[str, str]
) -> Iterator[str]:
    yield from _unlike("model", dict(flat(first.model)), dict(flat(second.model)))
    fields = ("server_version", "created_by")
    yield from _unlike("", *({name: getattr(of, name) for name in fields} for of in (first, second)))
    yield from _unlike("version of", first.versions, second.versions)
    yield from _unlike("intervals", first.intervals.model_dump(), second.intervals.model_dump())
    if any(name != other for name, other in masks.items()):
        yield "masks have other names; they are matched by method, language, budget and seed"
    other_masks = [name for name, other in masks.items() if first.masks[name].digest != second.masks[other].digest]
    if other_masks:
        yield f"{len(other_masks)} of {len(masks)} masks have other neurons or scales (digests): {_some(other_masks)}"
    for task in tasks:
        other_task = second.task(task.name)
        yield from _unlike(f"task {task.name}", task.settings, other_task.settings)
        shared = [language for language in task.languages if language in other_task.languages]
        same = _same_items(task, other_task)
        if other_items := [language for language in shared if language not in same]:
            yield f"task {task.name} asked other items in {', '.join(other_items)}, compared as independent samples"


def _unlike(what: str, first: Mapping[str, object], second: Mapping[str, object]) -> Iterator[str]:
    """A phrase for each entry that differs."""
    for name in dict.fromkeys((*first, *second)):
        ours, theirs = first.get(name), second.get(name)
        if ours != theirs:
            phrase = f"{what} {name}".strip().replace("_", " ")
            yield f"{phrase}: {_value(ours)} against {_value(theirs)}"


def _value(value: object) -> str:
    return "not recorded" if value is None else brief(value)


def _only(evaluation: Evaluation, other: Evaluation, matched: set[str]) -> Iterator[str]:
    """Tasks, languages and metrics that only one of the evaluations has."""
    theirs = {task.name: task for task in other.tasks}
    for task in evaluation.tasks:
        if (known := theirs.get(task.name)) is None:
            yield f"task {task.name}"
            continue
        if languages := [language for language in task.languages if language not in known.languages]:
            yield f"task {task.name} in {', '.join(languages)}"
        metrics = {metric.name for metric in known.metrics}
        if missing := [metric.name for metric in task.metrics if metric.name not in metrics]:
            yield f"metric {', '.join(missing)} of task {task.name}"
    for name in evaluation.masks:
        if name != UNMASKED and name not in matched:
            yield f"mask {name}"


def _substitutions(evaluation: Evaluation, tasks: Iterable[str], masks: Iterable[str]) -> tuple[Substitution, ...]:
    names, compared = set(tasks), {UNMASKED, *masks}
    return tuple(of for of in evaluation.substitutions if of.task in names and of.mask in compared)


def _some(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - _NAMED} more" if len(every) > _NAMED else ""
    return (", ".join(every[:_NAMED]) or "none") + more
