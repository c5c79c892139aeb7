"""Findings: all statistics of a run, from its answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from clients.analysis.cells import cells_of, with_q_values
from clients.analysis.effects import damages
from clients.analysis.levels import Levels
from clients.analysis.matched import matched_of
from clients.analysis.ranks import ranks_of
from clients.analysis.samples import Sample, grouped
from clients.errors import EvaluationError
from clients.evaluation import Cell, Effect, Intervals, MatchedEffect, MethodRank, PlannedMask
from clients.task import Answers

MATCHED_EFFECTS: Mapping[str, float] = MappingProxyType({"nats_per_token": 1.0})


@dataclass(frozen=True)
class Findings:
    """The results of `analyse`, in the order of tasks, languages, metrics and masks."""

    cells: tuple[Cell, ...]
    effects: tuple[Effect, ...]
    ranks: tuple[MethodRank, ...]
    matched: tuple[MatchedEffect, ...]
    intervals: Intervals


def analyse(
    answers: Answers,
    masks: Mapping[str, PlannedMask],
    *,
    seed: int = 0,
    beta: float = 1.0,
    matched_effects: Mapping[str, float] = MATCHED_EFFECTS,
) -> Findings:
    """All statistics of a run.

    masks: by name; answers under others are left out. seed: of resamples and permutations. beta: of LangSpec-F1.
    matched_effects: metric -> damage in its unit that budgets are matched at.

    Items are resampled once for each task and language, for all masks and metrics together, and all figures are
    computed on these draws. So figures made of several cells (effects, ranks, matched effects) have joint intervals.
    Languages with equally many items have the same draws, as parallel texts need. An item without an answer under a
    mask is left out of comparisons with that mask.

    Raises EvaluationError for a beta or an effect that is not above 0, or a task's value that is not finite.
    """
    if not beta > 0:
        raise EvaluationError(f"beta is {beta}; expected a number above 0")
    for name, effect in matched_effects.items():
        if not effect > 0:
            raise EvaluationError(f"the matched effect of {name} is {effect}; expected a number above 0")
    cells: list[Cell] = []
    effects: list[Effect] = []
    ranks: list[MethodRank] = []
    matched: list[MatchedEffect] = []
    groups = grouped(answers)
    for name, task in answers.tasks.items():
        levels = {
            language: Levels.of(sample, seed)
            for language, items in answers.items.get(name, {}).items()
            if (sample := Sample.of(task, language, items, groups.get((name, language), {}), tuple(masks))).masks
        }
        for of_language in levels.values():
            cells += cells_of(of_language, masks, seed=seed)
        for place, metric in enumerate(task.metrics):
            pairs = {language: dict(of_language.of_metric(place)) for language, of_language in levels.items()}
            metric_damages = damages(name, metric, pairs, masks.values(), beta)
            effects += [damage.effect() for damage in metric_damages]
            ranks += ranks_of(metric_damages)
            if metric.name in matched_effects:
                matched += matched_of(metric_damages, matched_effects[metric.name])
    return Findings(with_q_values(cells, masks), tuple(effects), tuple(ranks), tuple(matched), Intervals(seed=seed))
