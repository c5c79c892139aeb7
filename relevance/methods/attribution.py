"""Activation times gradient: the base class of the methods that differ only in their pass."""

import torch
from torch import Tensor

from relevance.accumulators import RunningMean
from relevance.method import Gradients, OfGradients, Site, Units


class Attribution(OfGradients):
    """R(l, i) = mean over documents of sum over tokens of activation * gradient of the document's target."""

    sites = frozenset({Site.NEURONS})
    contrast = "margin"

    def __init__(self, units: Units, device: torch.device | None = None) -> None:
        super().__init__(units, device)
        self.relevance = RunningMean(units.layers, units.widest, self.device)  # over documents

    def accumulate(self, gradients: Gradients) -> None:
        wide = torch.promote_types(gradients.value.dtype, torch.float32)
        relevance = gradients.value.to(wide).mul(gradients.gradient)  # [documents, tokens, neurons]
        counted = gradients.batch.counted.to(wide).flatten()  # [documents * tokens]
        sums = counted @ relevance.flatten(0, 1)  # [neurons]
        self.relevance.add(gradients.layer, sums.double(), observations=gradients.batch.documents)

    def finalise(self) -> Tensor:
        """Means over documents, [layers, widest]."""
        return self.relevance.mean()
