"""Levels: metrics under each mask, on the items and on each resample of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from clients.analysis.samples import Flags, Sample
from clients.evaluation import UNMASKED
from crane_serve.common.numbers.bootstrap import Values, resampled_sums


class Pair(NamedTuple):
    """Levels with a mask and without it, over the items that have both answers. Each is [1 + resamples], the items
    themselves first; NaN where the items have no weight."""

    masked: Values
    unmasked: Values

    @property
    def change(self) -> Values:
        """masked - unmasked: [1 + resamples], in the unit of the metric."""
        return self.masked - self.unmasked

    @property
    def relative(self) -> Values:
        """Change as a share of the unmasked level, NaN where that is 0."""
        relative: Values = self.change / np.where(self.unmasked == 0, np.nan, self.unmasked)
        return relative


@dataclass(frozen=True)
class Levels:
    """Levels of all metrics of a sample.

    own: mask -> column of the level over its own answers; pairs: mask -> columns with and without it over the items
    that have both; values: [columns, metrics, 1 + resamples].
    """

    sample: Sample
    own: dict[str, int]
    pairs: dict[str, tuple[int, int]]
    values: Values

    @classmethod
    def of(cls, sample: Sample, seed: int) -> "Levels":
        """Resample the items once for all masks and metrics.

        All samples with equally many items have the same draws, so that parallel texts of several languages are drawn
        together. If fewer than two items have weight, resamples have no meaning and are NaN.
        """
        columns = _Columns(sample)
        own = {mask: columns.add(row, sample.answered[row]) for row, mask in enumerate(sample.masks)}
        plain = sample.row(UNMASKED)
        pairs: dict[str, tuple[int, int]] = {}
        for row, mask in enumerate(sample.masks):
            if plain is not None and row != plain and (both := sample.answered[row] & sample.answered[plain]).any():
                pairs[mask] = columns.add(row, both), columns.add(plain, both)
        return cls(sample, own, pairs, columns.levels(seed))

    def level(self, mask: str, metric: int) -> Values:
        """[1 + resamples] of the metric at this place, over a mask's own answers."""
        level: Values = self.values[self.own[mask], metric]
        return level

    def pair(self, mask: str, metric: int) -> Pair | None:
        """The metric at this place with and without a mask; None for no mask, or no item that has both."""
        columns = self.pairs.get(mask)
        return None if columns is None else Pair(self.values[columns[0], metric], self.values[columns[1], metric])

    def of_metric(self, metric: int) -> Iterator[tuple[str, Pair]]:
        """Masks with both levels of the metric at this place, on the items themselves at least."""
        for mask in self.pairs:
            pair = self.pair(mask, metric)
            if pair is not None and np.isfinite(pair.change[0]):
                yield mask, pair


class _Columns:
    """The columns to sum: pairs of a mask and a set of items, each once."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.places: dict[tuple[int, bytes], int] = {}
        self.chosen: list[tuple[int, Flags]] = []

    def add(self, row: int, items: Flags) -> int:
        """The column of a mask over these items."""
        key = row, items.tobytes()
        if key not in self.places:
            self.places[key] = len(self.chosen)
            self.chosen.append((row, items))
        return self.places[key]

    def levels(self, seed: int) -> Values:
        """[columns, metrics, 1 + resamples]."""
        totals, weights = (
            np.stack([values[row] * items for row, items in self.chosen])
            for values in (self.sample.totals, self.sample.weights)
        )  # [columns, metrics, items]
        shape = totals.shape[:2]
        flat = np.concatenate([totals, weights]).reshape(-1, totals.shape[2])
        sums = resampled_sums(flat.T, seed=seed).T.reshape(2, *shape, -1)
        weight = sums[1]
        levels = np.full(weight.shape, np.nan)
        np.divide(sums[0], weight, out=levels, where=weight > 0)
        levels[:, :, 1:][np.count_nonzero(weights, axis=2) < 2] = np.nan
        return levels
