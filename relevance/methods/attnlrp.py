"""Signed AttnLRP relevance of each neuron to the model's predictions in a language (arXiv:2402.05602)."""

import torch
from torch import Tensor

from relevance.method import Capture, Method, Needs, Shape
from relevance.statistics import RunningMean


class AttnLRP(Method):
    """R(l, i) = mean over documents of sum over tokens of activation * gradient of the document's mean target logit.

    In logits: by how much, on average, the logit of the true next token is owed to this neuron.
    """

    name = "attnlrp"
    needs = Needs.BACKWARD
    contrast = "share-margin"

    def __init__(self, shape: Shape, device: torch.device | None = None) -> None:
        super().__init__(shape, device)
        self.relevance = RunningMean(shape, self.device)  # over documents

    def accumulate(self, capture: Capture) -> None:
        assert capture.gradient is not None
        counted = capture.counted.unsqueeze(-1)  # [documents, tokens, 1]
        relevance = (capture.activation * capture.gradient).where(counted, 0)  # [documents, tokens, neurons]
        sums = relevance.sum(dim=(0, 1), dtype=torch.float64)
        self.relevance.add(capture.language, capture.layer, sums, observations=len(relevance))

    def scores(self) -> Tensor:
        return self.relevance.mean()
