"""Agreement: what several runs of a search, which differ in their seed, say together, and how far they agree."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from relevance.selection import best_first
from relevance.validation.overlap import jaccard, members


@dataclass(frozen=True)
class Agreed:
    """scores: by language, [layers, widest] as of one run, or the mean over the runs; spread: the standard deviation
    between the runs (n - 1 in the denominator), None for one run.

    Before, each run's scores of a language are divided by their root mean square, since runs stop after different
    numbers of steps. jaccard: by language, |intersection| / |union| of the chosen sets of two runs; rank_correlation:
    Spearman's, over all neurons, 0 where a run ranks nothing; both means over all pairs of runs, and empty for one run.
    """

    scores: Mapping[str, Tensor]
    spread: Mapping[str, Tensor] | None
    jaccard: Mapping[str, float]
    rank_correlation: Mapping[str, float]


def agreed(runs: Sequence[Mapping[str, Tensor]], exists: Tensor, count: int) -> Agreed:
    """`runs`: of at least one seed, scores by language, float32 [layers, widest], 0 in padding. exists: bool of that
    shape. count: how many of the highest are chosen."""
    if len(runs) == 1:
        return Agreed(runs[0], None, {}, {})
    scores, spread, overlap, correlation = {}, {}, {}, {}
    for language in runs[0]:
        of_runs = torch.stack([run[language] for run in runs])  # [runs, layers, widest]
        sizes = of_runs[:, exists].square().mean(dim=1).sqrt().clamp_min(torch.finfo(of_runs.dtype).tiny)
        of_runs = of_runs / sizes.view(-1, 1, 1)
        scores[language], spread[language] = of_runs.mean(dim=0), of_runs.std(dim=0)
        chosen = [members(best_first(run, exists)[:count], exists.shape) for run in of_runs]
        overlap[language] = _mean([jaccard(*pair) for pair in combinations(chosen, 2)])
        ranks = [run[exists].numpy() for run in of_runs]
        correlation[language] = _mean([_rank_correlation(*pair) for pair in combinations(ranks, 2)])
    return Agreed(scores, spread, overlap, correlation)


def _rank_correlation(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Spearman's; 0 where one of the two ranks nothing."""
    constant = first.min() == first.max() or second.min() == second.max()
    return 0.0 if constant else float(spearmanr(first, second).statistic)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
