"""What neurons typically are: the mean and median of their activation in each language, which masks can put in the
place of a value."""

import torch
from torch import Tensor

from relevance.accumulators import Histogram, RunningMean
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


class MedianActivation(OfActivations):
    """Median over tokens of the activation, of a neuron of an expert over the tokens that have it."""

    name = "median activation"

    def __init__(self, units: Units, device: torch.device | None = None) -> None:
        super().__init__(units, device)
        self.values = Histogram(units.layers, units.widest, self.device)  # over tokens

    def accumulate(self, activations: Activations) -> None:
        counted = activations.batch.counted
        present = has_neuron(activations, self.units)
        of_tokens = None if present is None else present[counted]
        self.values.add(activations.layer, activations.neurons[counted], of_tokens)

    def finalise(self) -> Tensor:
        """[layers, widest]."""
        return self.values.median()


class TokenShare(OfActivations):
    """Share of tokens that have a neuron: those that have its expert, and all for a neuron outside of experts."""

    name = "share of tokens"

    def __init__(self, units: Units, device: torch.device | None = None) -> None:
        super().__init__(units, device)
        self.values = RunningMean(units.layers, units.widest, self.device)  # over tokens

    def accumulate(self, activations: Activations) -> None:
        present = has_neuron(activations, self.units)
        if present is None:
            present = torch.ones_like(activations.neurons, dtype=torch.bool)
        sums = activations.batch.sum_of(present.float()).sum(dim=0)  # [neurons]
        self.values.add(activations.layer, sums, observations=activations.batch.tokens)

    def finalise(self) -> Tensor:
        """[layers, widest]."""
        return self.values.mean()


def has_neuron(activations: Activations, units: Units) -> Tensor | None:
    """bool [documents, tokens, neurons]: whether the token has the neuron's expert, or it is in none; None if all do.

    A token has an expert if not all of its neurons are 0.
    """
    experts, layer = units.experts, activations.layer
    if experts is None or layer not in experts.layers:
        return None
    columns = experts.columns(layer, units.sizes)
    of_layer = activations.neurons
    by_expert = of_layer[..., columns].reshape(*of_layer.shape[:-1], experts.count, experts.size)
    present = torch.ones_like(of_layer, dtype=torch.bool)
    present[..., columns] = (by_expert != 0).any(dim=-1).repeat_interleave(experts.size, dim=-1)
    return present
