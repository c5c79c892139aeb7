"""What neurons typically are: their mean activation in each language, which masks can put in the place of a value."""

import torch
from torch import Tensor

from relevance.accumulators import RunningMean
from relevance.method import Activations, OfActivations, Reduced, Units


class MeanActivation(OfActivations):
    """Mean over tokens of the activation, with its sign. It is measured beside all methods; it ranks nothing itself."""

    name = "mean activation"

    def __init__(self, units: Units, device: torch.device | None = None) -> None:
        super().__init__(units, device)
        self.values = RunningMean(units.layers, units.widest, self.device)  # over tokens

    def accumulate(self, activations: Activations) -> None:
        sums = activations.batch.sum_of(activations.neurons).sum(dim=0)  # [neurons]
        self.values.add(activations.layer, sums, observations=activations.batch.tokens)

    def take(self, reduced: Reduced) -> None:
        self.values.add(reduced.layer, reduced.mean * reduced.tokens, observations=reduced.tokens)

    def finalise(self) -> Tensor:
        """[layers, widest]."""
        return self.values.mean()
