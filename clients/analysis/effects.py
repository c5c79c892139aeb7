"""Effects: what a mask does to the language it was made for, against the others."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from clients.analysis.levels import Pair
from clients.evaluation import Effect, PlannedMask
from clients.task import Metric, ScoreOf
from crane_serve.common.numbers.bootstrap import CONFIDENCE, Estimate, Values, estimate
from crane_serve.common.numbers.langspec import Form, langspec_f1_of_arrays

_SCORES = {ScoreOf.LEVEL: lambda level: level, ScoreOf.EXP_NEGATIVE: lambda level: np.exp(-level)}
_RATIO_NEEDS = (1 + CONFIDENCE) / 2


@dataclass(frozen=True)
class Damage:
    """The damage of one mask by one metric. own, others, f1: [1 + resamples], the items themselves first."""

    task: str
    metric: str
    mask: PlannedMask
    language: str
    own: Values
    others: Values
    f1: dict[Form, Values] = field(default_factory=dict)
    beta: float = 1.0

    @property
    def selectivity(self) -> Values:
        """own - others: [1 + resamples], in the unit of the metric."""
        return self.own - self.others

    @property
    def index(self) -> Values:
        """(own - others) / (|own| + |others|), 0 where both are 0."""
        size = np.abs(self.own) + np.abs(self.others)
        return np.where(size == 0, 0.0, self.selectivity / np.where(size == 0, 1.0, size))

    @property
    def collateral(self) -> Values:
        """others / own, infinite where own is not above 0, since then there was damage without any effect."""
        ratio = self.others / np.where(self.own > 0, self.own, np.nan)
        return np.where(self.own <= 0, np.inf, ratio)

    @property
    def measures(self) -> dict[str, Values]:
        """The measures by which methods are ranked, under the names of MethodRank."""
        f1 = {f"f1 {form}": values for form, values in self.f1.items()}
        return {"selectivity": self.selectivity, "index": self.index, "collateral": self.collateral, **f1}

    def effect(self) -> Effect:
        """The damage with intervals."""
        f1 = {form: estimate(values) for form, values in self.f1.items()}
        return Effect(
            task=self.task,
            metric=self.metric,
            mask=self.mask.name,
            language=self.language,
            own=_certain(self.own),
            others=_certain(self.others),
            selectivity=_certain(self.selectivity),
            index=_certain(self.index),
            collateral=estimate_collateral(self.collateral),
            f1={form: interval for form, interval in f1.items() if interval is not None},
            beta=self.beta,
        )


def estimate_collateral(collateral: Values) -> Estimate | None:
    """Others over own, with an interval only if the whole 95 % interval of own is above 0; the ratio has no bounds
    otherwise (Fieller, 1954)."""
    return estimate(collateral, least=_RATIO_NEEDS)


def damages(
    task: str, metric: Metric, pairs: Mapping[str, Mapping[str, Pair]], masks: Iterable[PlannedMask], beta: float
) -> list[Damage]:
    """The damages of masks whose own language was evaluated, together with at least one other language.

    pairs: language -> mask -> levels with and without it.
    """
    results: list[Damage] = []
    for mask in masks:
        pairs_of_mask = {language: by_mask[mask.name] for language, by_mask in pairs.items() if mask.name in by_mask}
        if mask.language not in pairs_of_mask or len(pairs_of_mask) < 2:
            continue
        own = pairs_of_mask.pop(mask.language)
        others = list(pairs_of_mask.values())
        sign = metric.damage(1.0)
        results.append(
            Damage(
                task,
                metric.name,
                mask,
                mask.language,
                own=sign * own.change,
                others=sign * np.mean([pair.change for pair in others], axis=0),
                f1=_f1(metric.score, [own, *others], beta),
                beta=beta,
            )
        )
    return results


def _f1(score: ScoreOf | None, pairs: list[Pair], beta: float) -> dict[Form, Values]:
    """LangSpec-F1 of the first pair against the others, by form; empty without a score or with a baseline of 0."""
    if score is None:
        return {}
    baseline = _SCORES[score](np.stack([pair.unmasked for pair in pairs]))  # [languages, 1 + resamples]
    masked = _SCORES[score](np.stack([pair.masked for pair in pairs]))
    scores = {form: langspec_f1_of_arrays(baseline, masked, form, beta) for form in Form}
    return {form: values for form, values in scores.items() if np.isfinite(values[0])}


def _certain(replicates: Values) -> Estimate:
    interval = estimate(replicates)
    if interval is None:
        raise ValueError("a damage is not finite; expected those of pairs that have a change")
    return interval
