"""Matched effects: the loss of the other languages where the own language loses a given amount."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from clients.analysis.effects import Damage
from clients.evaluation import MatchedEffect
from crane_serve.common.numbers.bootstrap import Values, estimate


def matched_of(damages: Iterable[Damage], effect: float) -> list[MatchedEffect]:
    """Matched effects of methods with masks of at least two budgets for a language. Each draw of a random method counts
    alone.

    damages: of one task and metric; effect: damage in the metric's unit, above 0.
    """
    series: dict[tuple[str, str, int | None], dict[float, list[Damage]]] = defaultdict(lambda: defaultdict(list))
    for damage in damages:
        mask = damage.mask
        if mask.method is not None and mask.budget is not None and mask.budget > 0:
            series[mask.method, damage.language, mask.seed][mask.budget].append(damage)
    return [
        _matched(sorted(by_budget.items()), seed, effect)
        for (_, _, seed), by_budget in series.items()
        if len(by_budget) > 1
    ]


def crossing(budgets: Values, own: Values, others: Values, effect: float) -> tuple[Values, Values]:
    """The first budget, in rising order, where the damage to the own language reaches `effect` from below.

    budgets: [budgets], rising; own, others: [budgets, ...]. Between two budgets both damages are interpolated, linearly
    in the logarithm of the budget. Returns the budget and the damage to the others there, [...] each; NaN if no budget
    reaches the effect, or if the smallest already exceeds it.
    """
    reached = own >= effect
    upper = reached.argmax(axis=0)[None]  # [1, ...]
    lower = np.maximum(upper - 1, 0)

    def at(values: Values, place: NDArray[np.intp]) -> Values:
        return np.asarray(np.take_along_axis(values, place, axis=0)[0])

    before, after = at(own, lower), at(own, upper)
    bracketed = reached.any(axis=0) & ((upper[0] > 0) | (after == effect))
    step = after - before
    share = np.where(upper[0] > 0, (effect - before) / np.where(step == 0, 1.0, step), 0.0)
    logs = np.broadcast_to(np.log(budgets).reshape(-1, *[1] * (own.ndim - 1)), own.shape)
    budget, lost = (at(v, lower) + share * (at(v, upper) - at(v, lower)) for v in (logs, others))
    return np.where(bracketed, np.exp(budget), np.nan), np.where(bracketed, lost, np.nan)


def _matched(series: Sequence[tuple[float, list[Damage]]], seed: int | None, effect: float) -> MatchedEffect:
    own, others = (
        np.stack([np.mean([getattr(damage, part) for damage in at_budget], axis=0) for _, at_budget in series])
        for part in ("own", "others")
    )
    budget, lost = crossing(np.array([budget for budget, _ in series]), own, others, effect)
    first = series[0][1][0]
    return MatchedEffect(
        task=first.task,
        metric=first.metric,
        method=str(first.mask.method),
        language=first.language,
        effect=effect,
        seed=seed,
        budget=estimate(budget),
        collateral=estimate(lost / effect),
    )
