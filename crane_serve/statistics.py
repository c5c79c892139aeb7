"""Estimate: a ratio of sums over documents with a bootstrap interval."""

import warnings

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

RESAMPLES = 4000
CONFIDENCE = 0.95
_BATCH_VALUES = 1 << 22

Values = NDArray[np.float64]


class Estimate(BaseModel):
    """A value and the ends of its 95 % interval, which are None where there is only one document."""

    model_config = ConfigDict(frozen=True)

    mean: float
    low: float | None
    high: float | None


def change_per_token(nll: Values, baseline_nll: Values, tokens: Values, *, seed: int = 0) -> Estimate:
    """Change in nats per token between two runs over the same documents, with a paired bootstrap over documents.

    nll, baseline_nll, tokens: [documents], per document the negative log-likelihood in nats with and without a mask
    and the number of tokens. The estimate is sum(nll - baseline_nll) / sum(tokens). A resample draws documents, each
    with both of its likelihoods and its length; the interval is the percentile interval of `RESAMPLES` resamples.
    The same seed and number of documents give the same draws, so that masks are compared on the same resamples.

    Raises ValueError for no documents, differing lengths, or documents without tokens.
    """
    if not len(nll) == len(baseline_nll) == len(tokens):
        raise ValueError(f"{len(nll)}, {len(baseline_nll)} and {len(tokens)} documents, expected the same of each")
    if not len(tokens) or tokens.min() <= 0:
        raise ValueError("expected at least one document, and at least one token in each")
    change = nll - baseline_nll  # [documents]
    mean = float(change.sum() / tokens.sum())
    if len(tokens) == 1:
        return Estimate(mean=mean, low=None, high=None)
    from scipy.stats import bootstrap

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all documents alike: the interval is a point, which is right
        interval = bootstrap(
            (change, tokens),
            _ratio,
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=max(1, _BATCH_VALUES // len(tokens)),
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return Estimate(mean=mean, low=float(interval.low), high=float(interval.high))


def _ratio(change: Values, tokens: Values, axis: int = -1) -> Values:
    """[resamples, documents] twice -> [resamples]."""
    return np.asarray(change.sum(axis=axis) / tokens.sum(axis=axis))
