"""Streaming statistics per language and neuron."""

import torch
from torch import Tensor

from relevance.method import Shape


class NonFiniteError(ValueError):
    """Activations or relevances overflowed; the message names the layer."""


class RunningMean:
    """Mean over observations (tokens, documents) for every language and neuron, in one tensor of float64 sums.

    total: [languages, layers, widest] sums; count: [languages, layers] observations.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        self.total = torch.zeros(shape.tensor, dtype=torch.float64, device=device)
        self.count = torch.zeros(shape.tensor[:2], dtype=torch.int64)

    def add(self, language: int, layer: int, sums: Tensor, observations: int) -> None:
        """Add the `sums` [neurons] over so many `observations` of one layer.

        Raises NonFiniteError when a sum is not finite.
        """
        if not bool(torch.isfinite(sums).all()):
            raise NonFiniteError(
                f"layer {layer} gives values that are not finite for {self.shape.languages[language]}; "
                "a wider dtype such as float32 may help"
            )
        self.total[language, layer, : sums.numel()] += sums
        self.count[language, layer] += observations

    def merge(self, other: "RunningMean") -> None:
        """Add the observations of `other`, which must have the same shape (ValueError)."""
        if other.shape != self.shape:
            raise ValueError(f"cannot merge statistics of {other.shape} into those of {self.shape}")
        self.total += other.total.to(self.total.device)
        self.count += other.count

    def mean(self) -> Tensor:
        """float64 [languages, layers, widest] on the CPU; 0 where nothing was observed."""
        return self.total.cpu() / self.count.clamp_min(1).unsqueeze(-1)
