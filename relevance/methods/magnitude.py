"""Mean magnitude: how strongly a neuron fires, whatever the model does with it."""

import torch
from torch import Tensor

from relevance.accumulators import RunningMean
from relevance.method import Activations, OfActivations, Reduced, Units


class Magnitude(OfActivations):
    """Mean over tokens of |activation|. No publication: the simplest baseline."""

    name = "magnitude"
    contrast = "margin"

    def __init__(self, units: Units, device: torch.device | None = None) -> None:
        super().__init__(units, device)
        self.magnitude = RunningMean(units.layers, units.widest, self.device)  # over tokens

    def accumulate(self, activations: Activations) -> None:
        sums = activations.batch.sum_of(activations.neurons.abs()).sum(dim=0)  # [neurons]
        self.magnitude.add(activations.layer, sums, observations=activations.batch.tokens)

    def take(self, reduced: Reduced) -> None:
        self.magnitude.add(reduced.layer, reduced.mean_abs * reduced.tokens, observations=reduced.tokens)

    def finalise(self) -> Tensor:
        """Means over tokens, [layers, widest]."""
        return self.magnitude.mean()
