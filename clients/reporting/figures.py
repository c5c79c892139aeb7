"""Table cells for the figures of an evaluation."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from clients.evaluation import UNMASKED, Cell, Evaluation
from clients.task import Metric
from crane_serve.common.numbers.bootstrap import Estimate
from crane_serve.common.reports import content
from crane_serve.common.reports.numbers import interval_text, number_text

NOTHING = "-"
SIGNIFICANT = 0.05  # q-values below are marked
BEYOND, WITHIN = "●", "○"  # marks of significant changes: outside the random band, and within it (or without a band)


@dataclass(frozen=True)
class Scale:
    """The format of values of one kind. digits: after the point; full: the value with the deepest colour."""

    digits: int
    full: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Scale":
        """Two digits where a value is 1 or more, else three; the largest value gets the deepest colour."""
        largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
        return cls(2 if largest >= 1 else 3, largest or 1.0)


def masks_by_method(evaluation: Evaluation, names: Iterable[str]) -> list[list[str]]:
    """Names of masks grouped by method, in the order given; `none` is left out."""
    groups: dict[str | None, list[str]] = {}
    for name in names:
        if name != UNMASKED:
            groups.setdefault(evaluation.masks[name].method, []).append(name)
    return list(groups.values())


def estimate_cell(
    estimate: Estimate | None,
    digits: int,
    *,
    signed: bool = False,
    strong: bool = False,
    change: float | None = None,
    full: float = 1.0,
    mark: str = "",
) -> content.Cell:
    """A value, a mark and [its interval]; a dash where it does not exist."""
    if estimate is None:
        return content.Cell(NOTHING, strong=strong)
    text = " ".join(filter(None, (number_text(estimate.mean, digits, signed=signed), mark)))
    return content.Cell(text, interval_text(estimate, digits, signed=signed), strong, change, full)


def percent_cell(estimate: Estimate | None, *, strong: bool, change: float | None, full: float) -> content.Cell:
    """A signed fraction in percent with [its interval]."""
    if estimate is None:
        return content.Cell(NOTHING, strong=strong)
    ends = (None if end is None else 100 * end for end in (estimate.low, estimate.high))
    low, high = ends
    percent = Estimate(mean=100 * estimate.mean, low=low, high=high)
    text = f"{number_text(percent.mean, 1, signed=True)} %"
    return content.Cell(text, interval_text(percent, 1, signed=True), strong, change, full)


def mark(cell: Cell) -> str:
    """The mark of a significant change; empty for others."""
    if cell.q_value is None or cell.q_value >= SIGNIFICANT:
        return ""
    return BEYOND if cell.beyond_band else WITHIN


def metric_title(metric: Metric) -> str:
    """Name, unit and direction of a metric."""
    direction = "higher is better" if metric.higher_is_better else "lower is better"
    return f"{metric.title} ({metric.unit}, {direction})"


def budget_text(budget: float | None) -> str:
    """A budget in percent of all neurons."""
    return NOTHING if budget is None else f"{100 * budget:.3g} %"
