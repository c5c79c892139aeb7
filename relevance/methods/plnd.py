"""PLND: neurons that are among the strongest of their layer in every document (Zhao et al., NeurIPS 2024)."""

import torch
from torch import Tensor

from relevance.accumulators import RunningMean
from relevance.contrast import find_contrast
from relevance.method import Activations, OfActivations, Reduced, Shape, Units

TOP_SHARE = 0.1


class Plnd(OfActivations):
    """The score is the share of documents in which the neuron is among the strongest of its layer (arXiv:2402.18815).

    A neuron's strength in a document is the sum over tokens of |up|, the raw output of the up projection (of the first
    linear layer where the MLP is not gated); a layer's strongest are the TOP_SHARE of its neurons, at least one. The
    publication takes a fixed number per layer; a fraction suits models of any size.
    Ties: neurons present in equally many documents differ by less than one document's share, in proportion to their
    mean share of their layer's strength; a score of 1 or more means all documents.
    Published rule: present in all documents of the language, and not in all documents of every language. The ranking
    is this with degrees: the score less the smallest score among the other languages.
    """

    name = "plnd"
    reads = frozenset({"up"})

    def __init__(self, units: Units, device: torch.device | None = None) -> None:
        super().__init__(units, device)
        self.present = RunningMean(units.layers, units.widest, self.device)  # over documents
        self.strength = RunningMean(units.layers, units.widest, self.device)  # over documents; shares of the layer's

    def accumulate(self, activations: Activations) -> None:
        assert activations.up is not None, "it reads up"
        self._add(activations.layer, activations.batch.sum_of(activations.up.abs()))

    def take(self, reduced: Reduced) -> None:
        assert reduced.up_mean_abs is not None, "it reads up"
        self._add(reduced.layer, reduced.up_mean_abs.unsqueeze(0) * reduced.tokens)

    def _add(self, layer: int, strengths: Tensor) -> None:
        """strengths: [documents, neurons]."""
        strongest = strengths.topk(max(1, round(TOP_SHARE * strengths.shape[1])), dim=1).indices
        present = torch.zeros_like(strengths).scatter_(1, strongest, 1.0)
        shares = strengths / strengths.sum(dim=1, keepdim=True).clamp_min(torch.finfo(strengths.dtype).tiny)
        self.present.add(layer, present.sum(dim=0, dtype=torch.float64), observations=len(strengths))
        self.strength.add(layer, shares.sum(dim=0, dtype=torch.float64), observations=len(strengths))

    def finalise(self) -> Tensor:
        """Shares of documents with ties broken, [layers, widest]."""
        strength = self.strength.mean()
        documents = self.present.count.clamp_min(1).unsqueeze(1)
        tie = 0.5 / documents * strength / strength.max().clamp_min(torch.finfo(strength.dtype).tiny)
        return self.present.mean() + tie

    @classmethod
    def ranking(cls, scores: Tensor, shape: Shape, seed: int, contrast: str | None = None) -> Tensor:
        if contrast is not None:
            return find_contrast(contrast)(scores)
        smallest, index = scores.kthvalue(1, dim=0)  # [layers, widest]
        second = scores.kthvalue(2, dim=0).values
        mine = torch.arange(len(scores)).view(-1, 1, 1) == index  # [languages, layers, widest]
        return scores - torch.where(mine, second, smallest)

    @classmethod
    def published(cls, scores: Tensor, shape: Shape) -> Tensor:
        everywhere = (scores >= 1) & shape.exists
        return everywhere & ~everywhere.all(dim=0)
