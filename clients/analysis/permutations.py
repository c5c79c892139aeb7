"""Permutation tests of no change."""

from collections.abc import Callable

import numpy as np

from clients.analysis.samples import Sample
from clients.evaluation import UNMASKED
from crane_serve.common.numbers.bootstrap import Values

PERMUTATIONS = 9_999  # so that no p-value of more than 13 items is below 2 / 10,000
_BATCH_VALUES = 1 << 22
_CELLS_AT_ONCE = 1024


def p_values(sample: Sample, *, seed: int = 0) -> dict[str, Values]:
    """Two-sided p-values of no change of each metric, by mask: [metrics], NaN where fewer than two items have weight.

    Under the null hypothesis, which of an item's two answers came with the mask does not matter. So the answers of each
    item are swapped or not, and the change of level is computed anew. If both have the same weight, this is the
    sign-flip test of the differences of totals; if weights differ, they are swapped with the totals. A swap that leaves
    one side without any weight counts as extreme. All masks and metrics share the swaps: all possible swaps if there
    are at most `PERMUTATIONS`, and so many random ones otherwise.
    """
    plain, items = sample.row(UNMASKED), sample.answered.shape[1]
    if plain is None or items < 2:
        return {}
    by_mask: dict[str, Values] = {}
    metrics = len(sample.task.metrics)
    rows = [row for row in range(len(sample.masks)) if row != plain]
    at_once = max(1, _CELLS_AT_ONCE // metrics)
    for start in range(0, len(rows), at_once):
        some = rows[start : start + at_once]
        both = (sample.answered[some] & sample.answered[plain])[:, None, :]  # [masks, 1, items]
        masked = [(values[some] * both).reshape(-1, items) for values in (sample.totals, sample.weights)]
        unmasked = [(values[plain] * both).reshape(-1, items) for values in (sample.totals, sample.weights)]
        tested = _tested(masked, unmasked, seed).reshape(-1, metrics)
        by_mask.update(zip((sample.masks[row] for row in some), tested, strict=True))
    return by_mask


def _tested(masked: list[Values], unmasked: list[Values], seed: int) -> Values:
    """Totals and weights, [cells, items] each, with a mask and without -> [cells] p-values."""
    from scipy.stats import permutation_test

    items = masked[0].shape[1]
    test = permutation_test(
        (np.ones(items),),
        _change_when_swapped(masked, unmasked),
        permutation_type="samples",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        batch=max(1, _BATCH_VALUES // items),
        rng=np.random.default_rng([seed, items]),
    )
    has_weight = (masked[1] > 0) | (unmasked[1] > 0)
    usable = (has_weight.sum(axis=1) >= 2) & masked[1].any(axis=1) & unmasked[1].any(axis=1)
    return np.where(usable, test.pvalue, np.nan)


def _change_when_swapped(masked: list[Values], unmasked: list[Values]) -> Callable[..., Values]:
    """The change of level as a function of signs: [..., items] -> [..., cells], where -1 swaps an item's answers.

    With T + x, W + y the masked totals and weights after swapping and T - x, W - y the unmasked ones, the change is
    2 (x W - y T) / (W^2 - y^2).
    """
    total, weight = ((one + other).sum(axis=1) / 2 for one, other in zip(masked, unmasked, strict=True))
    half_total, half_weight = ((one - other).T / 2 for one, other in zip(masked, unmasked, strict=True))
    weights_differ = bool(half_weight.any())

    def change(signs: Values, axis: int = -1) -> Values:
        x = signs @ half_total
        y = signs @ half_weight if weights_differ else np.zeros_like(x)
        sides = weight**2 - y**2
        has_both = sides > 1e-12 * weight**2
        changes: Values = np.full_like(x, np.nan)
        np.divide(2 * (x * weight - y * total), sides, out=changes, where=has_both)
        return changes

    observed = change(np.ones(half_total.shape[0]))

    def defined_change(signs: Values, axis: int = -1) -> Values:
        changes = change(signs)
        return np.where(np.isnan(changes), observed, changes)

    return defined_change
