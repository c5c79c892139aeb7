"""Ranks: how methods compare at one budget."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from clients.analysis.effects import Damage, estimate_collateral
from clients.evaluation import MethodRank
from crane_serve.common.numbers.bootstrap import Values, estimate

COLLATERAL = "collateral"  # the only measure where less is better
ByMethod = dict[str, list[Damage]]


def ranks_of(damages: Sequence[Damage]) -> list[MethodRank]:
    """Ranks of the methods of one task and metric, by every measure, where at least two have masks of the same budget
    for the same languages."""
    ranks: list[MethodRank] = []
    for (budget, languages), methods in _comparable(damages).items():
        if len(methods) < 2:
            continue
        for measure in _measures(methods):
            ranks += _ranked(measure, budget, languages, methods)
    return ranks


def _comparable(damages: Iterable[Damage]) -> dict[tuple[float | None, tuple[str, ...]], ByMethod]:
    """(budget, languages) -> method -> damages."""
    by_method: dict[tuple[str, float | None], list[Damage]] = defaultdict(list)
    for damage in damages:
        if damage.mask.method is not None:
            by_method[damage.mask.method, damage.mask.budget].append(damage)
    compared: dict[tuple[float | None, tuple[str, ...]], ByMethod] = defaultdict(dict)
    for (method, budget), of_method in by_method.items():
        languages = tuple(sorted({damage.language for damage in of_method}))
        compared[budget, languages][method] = of_method
    return compared


def _measures(methods: ByMethod) -> list[str]:
    """The measures that all masks have."""
    each = [damage.measures for of_method in methods.values() for damage in of_method]
    return [measure for measure in each[0] if all(measure in measures for measures in each)]


def _ranked(measure: str, budget: float | None, languages: tuple[str, ...], methods: ByMethod) -> list[MethodRank]:
    from scipy.stats import rankdata

    values = np.stack([_mean(of_method, measure) for of_method in methods.values()])  # [methods, 1 + resamples]
    if not np.isfinite(values[:, 0]).any():
        return []
    ranks = rankdata(values if measure == COLLATERAL else -values, axis=0, nan_policy="propagate")
    method_ranks: list[MethodRank] = []
    for (method, of_method), of_values, of_ranks in zip(methods.items(), values, ranks, strict=True):
        rank = estimate(of_ranks)
        if rank is not None:
            method_ranks.append(
                MethodRank(
                    task=of_method[0].task,
                    metric=of_method[0].metric,
                    measure=measure,
                    budget=budget,
                    method=method,
                    languages=languages,
                    value=estimate_collateral(of_values) if measure == COLLATERAL else estimate(of_values),
                    rank=rank,
                )
            )
    return method_ranks


def _mean(damages: Iterable[Damage], measure: str) -> Values:
    """[1 + resamples]: mean over languages of the mean over draws. A mean collateral is infinite if any collateral in
    it is."""
    by_language: dict[str, list[Values]] = defaultdict(list)
    for damage in damages:
        by_language[damage.language].append(damage.measures[measure])
    return np.asarray(np.mean([np.mean(drawn, axis=0) for drawn in by_language.values()], axis=0))
