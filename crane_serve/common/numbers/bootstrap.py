"""Estimate: a figure with a bootstrap interval. The one bootstrap of the project, over documents or other items."""

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

RESAMPLES = 4000
CONFIDENCE = 0.95
_BATCH_VALUES = 1 << 21

Values = NDArray[np.float64]


class Estimate(BaseModel):
    """A value and the ends of its 95 % interval, which are None where there is only one item, or too few resamples
    have the figure."""

    model_config = ConfigDict(frozen=True)

    mean: float
    low: float | None
    high: float | None


def resampled_sums(values: Values, *, seed: int = 0) -> Values:
    """Sums over the items, and over each of `RESAMPLES` draws of as many items with replacement.

    values: [items, columns]. Returns [1 + RESAMPLES, columns], the sums over the items themselves first. Figures that
    are computed row by row from the result have a joint bootstrap distribution. A draw is stored as the number of times
    that each item is drawn, and all columns are summed by one matrix product. The same seed and number of items give
    the same draws, so that figures of several calls are paired. Raises ValueError for no items.
    """
    items = len(values)
    if not items:
        raise ValueError("there are no items to draw; expected at least one")
    sums = np.empty((1 + RESAMPLES, values.shape[1]))
    sums[0] = values.sum(axis=0)
    generator = np.random.default_rng([seed, items])
    chances = np.full(items, 1 / items)
    rows = max(1, _BATCH_VALUES // items)
    for start in range(1, len(sums), rows):
        draws = min(rows, len(sums) - start)
        counts = generator.multinomial(items, chances, size=draws).astype(np.float64)  # [draws, items]
        sums[start : start + draws] = counts @ values
    return sums


def estimate(replicates: Values, least: float = 0.5) -> Estimate | None:
    """A figure with its percentile interval.

    replicates: [1 + resamples], the figure on the items themselves and then on each resample. Resamples whose figure is
    not finite are left out; if fewer than a share `least` remain, there is no interval. None if the figure of the items
    themselves is not finite.
    """
    mean, resampled = float(replicates[0]), replicates[1:]
    if not np.isfinite(mean):
        return None
    finite = resampled[np.isfinite(resampled)]
    if not len(finite) or len(finite) < least * len(resampled):
        return Estimate(mean=mean, low=None, high=None)
    low, high = np.quantile(finite, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(mean=mean, low=float(low), high=float(high))


def change_per_token(nll: Values, baseline_nll: Values, tokens: Values, *, seed: int = 0) -> Estimate:
    """Change in nats per token between two runs over the same documents, with a paired bootstrap over documents.

    nll, baseline_nll, tokens: [documents], per document the negative log-likelihood in nats with and without a mask
    and the number of tokens. The estimate is sum(nll - baseline_nll) / sum(tokens). A resample draws documents, each
    with both of its likelihoods and its length; the interval is the percentile interval of `RESAMPLES` resamples.
    The same seed and number of documents give the same draws, so that masks are compared on the same resamples.

    Raises ValueError for no documents, differing lengths, documents without tokens, or likelihoods that are not finite.
    """
    if not len(nll) == len(baseline_nll) == len(tokens):
        raise ValueError(f"{len(nll)}, {len(baseline_nll)} and {len(tokens)} documents, expected the same of each")
    if not len(tokens) or tokens.min() <= 0:
        raise ValueError("expected at least one document, and at least one token in each")
    sums = resampled_sums(np.stack([nll - baseline_nll, tokens], axis=1), seed=seed)
    interval = estimate(sums[:, 0] / sums[:, 1])
    if interval is None:
        raise ValueError("a likelihood is not finite; expected nats of every document")
    return interval if len(tokens) > 1 else interval.model_copy(update={"low": None, "high": None})
