"""LAPE: language activation probability entropy (Tang et al., ACL 2024, arXiv:2402.16438)."""

import math

import torch
from torch import Tensor

from relevance.accumulators import RunningMean
from relevance.contrast import find_contrast
from relevance.method import Activations, OfActivations, Reduced, Shape, Units

PERCENTILE = 0.95
SELECTED = 0.01


class Lape(OfActivations):
    """The score is p, the share of tokens at which act(gate) > 0; `ranking` and `published` compare languages.

    The ranking gives selections of any size in the spirit of the published rule: a neuron with p above the 95th
    percentile of all p has log(number of languages) - entropy(p / sum of p) >= 0. Every other neuron has less than 0,
    by how far its p falls short of the percentile.
    """

    name = "lape"
    reads = frozenset({"act"})

    def __init__(self, units: Units, device: torch.device | None = None) -> None:
        super().__init__(units, device)
        self.active = RunningMean(units.layers, units.widest, self.device)  # over tokens

    def accumulate(self, activations: Activations) -> None:
        assert activations.act is not None, "it reads act"
        active = (activations.act > 0).to(torch.float32)  # [documents, tokens, neurons]
        self.active.add(
            activations.layer, activations.batch.sum_of(active).sum(dim=0), observations=activations.batch.tokens
        )

    def take(self, reduced: Reduced) -> None:
        assert reduced.act_positive is not None, "it reads act"
        self.active.add(reduced.layer, reduced.act_positive * reduced.tokens, observations=reduced.tokens)

    def finalise(self) -> Tensor:
        """p, [layers, widest]."""
        return self.active.mean()

    @classmethod
    def ranking(cls, scores: Tensor, shape: Shape, seed: int, contrast: str | None = None) -> Tensor:
        if contrast is not None:
            return find_contrast(contrast)(scores)
        return ranked_selection(scores.double(), shape.exists)

    @classmethod
    def published(cls, scores: Tensor, shape: Shape) -> Tensor:
        return published_selection(scores.double(), shape.exists)


def entropy(p: Tensor) -> Tensor:
    """Entropy in nats of p / (sum of p over languages). p: [languages, ...] -> [...]; 0 where all p are 0."""
    q = p / p.sum(dim=0).clamp_min(torch.finfo(p.dtype).tiny)
    terms: Tensor = torch.special.entr(q)
    return terms.sum(dim=0)


def percentile(values: Tensor, share: float) -> Tensor:
    """The smallest of `values`, of any shape, that at least `share` of them do not exceed; a scalar."""
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
