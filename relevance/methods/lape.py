"""LAPE: language activation probability entropy (Tang et al., ACL 2024, arXiv:2402.16438)."""

import math

import torch
from torch import Tensor

from relevance.method import Capture, Method, Needs, Shape
from relevance.statistics import RunningMean

PERCENTILE = 0.95
SELECTED = 0.01


class Lape(Method):
    """Scores of LAPE for rankings of any size, in the spirit of `published_selection`.

    p_g = share of tokens of language g at which act(gate) > 0. A neuron with p_g above the 95th percentile of all p
    scores log(number of languages) - entropy(p / sum of p) >= 0 for g. Every other neuron scores below 0, by how far
    p_g falls short of the percentile.
    """

    name = "lape"
    needs = Needs.FORWARD

    def __init__(self, shape: Shape, device: torch.device | None = None) -> None:
        super().__init__(shape, device)
        self.active = RunningMean(shape, self.device)  # over tokens

    def accumulate(self, capture: Capture) -> None:
        active = (capture.gate > 0) & capture.counted.unsqueeze(-1)  # [documents, tokens, neurons]
        tokens = int(capture.counted.sum())
        self.active.add(capture.language, capture.layer, active.sum(dim=(0, 1)), observations=tokens)

    def scores(self) -> Tensor:
        return ranked_selection(self.active.mean(), self.shape.exists)


def entropy(p: Tensor) -> Tensor:
    """Entropy in nats of p / (sum of p over languages). p: [languages, ...] -> [...]; 0 where all p are 0."""
    q = p / p.sum(dim=0).clamp_min(torch.finfo(p.dtype).tiny)
    terms: Tensor = torch.special.entr(q)
    return terms.sum(dim=0)


def percentile(values: Tensor, share: float) -> Tensor:
    """The smallest of `values` that at least `share` of them do not exceed."""
    flat = values.flatten()
    return flat.kthvalue(max(1, round(share * flat.numel()))).values


def published_selection(p: Tensor, exists: Tensor, selected: float = SELECTED, share: float = PERCENTILE) -> Tensor:
    """The published rule: bool [languages, layers, neurons], the neurons that belong to each language.

    p: [languages, layers, neurons] activation probabilities; exists: bool [layers, neurons].
    A neuron is eligible if its p in some language exceeds the percentile `share` of p over all neurons and languages.
    Of the eligible, those with the lowest entropies are taken, a fraction `selected` of all neurons; each is assigned
    to every language in which its p exceeds the percentile.
    """
    above = (p > percentile(p[:, exists], share)) & exists
    eligible = above.any(dim=0)  # [layers, neurons]
    entropies = entropy(p).masked_fill(~eligible, math.inf).flatten()
    count = min(round(selected * int(exists.sum())), int(eligible.sum()))
    taken = torch.zeros_like(entropies, dtype=torch.bool)
    taken[torch.sort(entropies, stable=True).indices[:count]] = True
    return above & taken.view_as(eligible)


def ranked_selection(p: Tensor, exists: Tensor, share: float = PERCENTILE) -> Tensor:
    """The ranking described at Lape. p: [languages, layers, neurons]; exists: bool [layers, neurons]."""
    threshold = percentile(p[:, exists], share)
    specificity = (math.log(len(p)) - entropy(p)).clamp_min(0)  # [layers, neurons]
    scores = torch.where(p > threshold, specificity, p - threshold - 1)
    return scores.where(exists, 0)
