"""Average precision of a neuron as a detector of the language (Kojima et al., NAACL 2024, arXiv:2404.02431)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from relevance.accumulators import DocumentSample
from relevance.method import Activations, OfActivations, Reduced, Shape, Units

DOCUMENTS = 512
SELECTED = 1000


class AveragePrecision(OfActivations):
    """Average precision with which the neuron's mean activation in a document tells the language from the others.

    The documents are a sample of at most 512 per language, those with the smallest hashes of their tokens, so that it
    is exact while there are no more and does not depend on how they were dealt out.
    Published rule: the 1000 neurons with the highest average precision (the language switches them on) and the 1000
    with the lowest (it switches them off), whatever the size of the model; half of the neurons each where it has
    fewer than 2000.
    """

    name = "average-precision"
    of_one_language = False

    def __init__(self, units: Units, device: torch.device | None = None) -> None:
        super().__init__(units, device)
        self.responses = DocumentSample(units.layers, units.widest, DOCUMENTS)

    def accumulate(self, activations: Activations) -> None:
        batch = activations.batch
        means = batch.sum_of(activations.neurons) / batch.predicted.unsqueeze(1)  # [documents, neurons]
        self.responses.add(activations.layer, batch.keys, means)

    def take(self, reduced: Reduced) -> None:
        self.responses.add(reduced.layer, torch.tensor([reduced.key]), reduced.mean.unsqueeze(0))

    def finalise(self) -> Tensor:
        """Mean activations of the sampled documents, float32 [documents, layers, widest]."""
        return self.responses.rows

    @classmethod
    def score(cls, finalised: Sequence[Tensor], shape: Shape) -> Tensor:
        languages = torch.cat([torch.full((len(rows),), index) for index, rows in enumerate(finalised)])
        scores = torch.zeros(shape.tensor, dtype=torch.float64)
        for layer, size in enumerate(shape.sizes):
            responses = torch.cat([rows[:, layer, :size] for rows in finalised])  # [documents, neurons]
            scores[:, layer, :size] = average_precisions(responses, languages, len(finalised))
        return scores

    @classmethod
    def published(cls, scores: Tensor, shape: Shape) -> Tensor:
        count = min(SELECTED, shape.neurons // 2)
        places = shape.exists.flatten().nonzero().flatten()
        chosen = torch.zeros(scores.shape[0], shape.exists.numel(), dtype=torch.bool)
        for language, of_language in enumerate(scores):
            order = places[of_language[shape.exists].argsort(descending=True, stable=True)]
            chosen[language, order[:count]] = True
            chosen[language, order[len(order) - count :]] = True
        return chosen.view_as(scores)


def average_precisions(responses: Tensor, languages: Tensor, count: int) -> Tensor:
    """Average precision of every neuron as a detector of each language: float64 [languages, neurons].

    responses: [documents, neurons]; languages: [documents], indices below `count`. The mean, over the documents of the
    language, of the share of the language among all documents that respond at least as strongly.
    """
    documents = len(responses)
    values, order = responses.sort(dim=0, descending=True)  # [documents, neurons]
    # Equal responses share the last of their ranks, so that the order among them does not matter.
    ranks = torch.arange(documents).unsqueeze(1).expand_as(values)
    ends = torch.ones_like(values, dtype=torch.bool)
    ends[:-1] = values[:-1] != values[1:]
    last = ranks.masked_fill(~ends, documents).flip(0).cummin(dim=0).values.flip(0)  # [documents, neurons]
    averages = torch.empty(count, values.shape[1], dtype=torch.float64)
    for language in range(count):
        positive = (languages == language)[order]  # [documents, neurons]
        at_least = positive.cumsum(dim=0).gather(0, last)
        precision = at_least.double() / (last + 1)
        averages[language] = (precision * positive).sum(dim=0) / positive.sum(dim=0).clamp_min(1)
    return averages
