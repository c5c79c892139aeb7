"""How often tokens have a neuron at all: in a mixture of experts, how often the router chooses its expert."""

import torch
from torch import Tensor

from relevance.accumulators import RunningMean
from relevance.method import Activations, OfActivations, Units


class Routing(OfActivations):
    """Share of tokens at which the neuron is not exactly 0: those that have its expert. No publication.

    All neurons of an expert have the same score but for those that an activation function makes 0.
    """

    name = "routing"
    contrast = "margin"
    of_experts = True

    def __init__(self, units: Units, device: torch.device | None = None) -> None:
        super().__init__(units, device)
        self.routed = RunningMean(units.layers, units.widest, self.device)  # over tokens

    def accumulate(self, activations: Activations) -> None:
        is_there = (activations.neurons != 0).to(torch.float32)  # [documents, tokens, neurons]
        sums = activations.batch.sum_of(is_there).sum(dim=0)  # [neurons]
        self.routed.add(activations.layer, sums, observations=activations.batch.tokens)

    def finalise(self) -> Tensor:
        """Shares of tokens, [layers, widest]."""
        return self.routed.mean()
