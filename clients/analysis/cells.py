"""Cells: level and change of every metric in every language under every mask."""

from collections.abc import Mapping, Sequence

import numpy as np

from clients.analysis.levels import Levels
from clients.analysis.permutations import p_values
from clients.evaluation import RANDOM, UNMASKED, Band, Cell, PlannedMask
from crane_serve.common.numbers.bootstrap import estimate

_BAND_TOLERANCE = 0.1  # of a mask's number of neurons


def cells_of(levels: Levels, masks: Mapping[str, PlannedMask], *, seed: int = 0) -> list[Cell]:
    """All cells of one task in one language, without q-values."""
    tested = p_values(levels.sample, seed=seed)
    cells: list[Cell] = []
    for place, metric in enumerate(levels.sample.task.metrics):
        changes = {mask: float(pair.change[0]) for mask, pair in levels.of_metric(place)}
        for mask in levels.sample.masks:
            p_value = tested[mask][place] if mask in changes and mask in tested else np.nan
            band = _band(masks[mask], changes, masks) if mask in changes else None
            cells.append(_cell(levels, mask, metric.name, place, float(p_value), band))
    return cells


def with_q_values(cells: Sequence[Cell], masks: Mapping[str, PlannedMask]) -> tuple[Cell, ...]:
    """The cells with p-values adjusted by Benjamini and Hochberg (1995) over all of them but those of random masks."""
    from scipy.stats import false_discovery_control

    tested = [
        place
        for place, cell in enumerate(cells)
        if cell.p_value is not None and masks[cell.mask].method != RANDOM and cell.mask != UNMASKED
    ]
    adjusted = list(cells)
    if tested:
        for place, q_value in zip(tested, false_discovery_control([cells[i].p_value for i in tested]), strict=True):
            adjusted[place] = cells[place].model_copy(update={"q_value": float(q_value)})
    return tuple(adjusted)


def _cell(levels: Levels, mask: str, metric: str, place: int, p_value: float, band: Band | None) -> Cell:
    sample, pair = levels.sample, levels.pair(mask, place)
    answered, plain = sample.answered[sample.masks.index(mask)], sample.row(UNMASKED)
    both = answered & sample.answered[plain] if plain is not None else np.zeros_like(answered)
    change = None if pair is None else estimate(pair.change)
    return Cell(
        task=sample.task.name,
        metric=metric,
        language=sample.language,
        mask=mask,
        items=int(np.count_nonzero(both)),
        level=estimate(levels.level(mask, place)),
        change=change,
        relative=None if pair is None else estimate(pair.relative),
        p_value=None if np.isnan(p_value) else p_value,
        band=band,
        beyond_band=None if band is None or change is None else not band.low <= change.mean <= band.high,
    )


def _band(mask: PlannedMask, changes: Mapping[str, float], masks: Mapping[str, PlannedMask]) -> Band | None:
    """Of random masks for the same language whose number of neurons is within 10 % of the mask's."""
    if mask.method == RANDOM or mask.language is None:
        return None
    drawn = [changes[control] for control in changes if _matches(masks[control], mask)]
    return Band(mean=float(np.mean(drawn)), low=min(drawn), high=max(drawn), draws=len(drawn)) if drawn else None


def _matches(control: PlannedMask, mask: PlannedMask) -> bool:
    similar = abs(control.neurons - mask.neurons) <= _BAND_TOLERANCE * mask.neurons
    return control.method == RANDOM and control.language == mask.language and similar
