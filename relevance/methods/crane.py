"""CRANE: heavy tails, across documents, of the gradients of an MLP's weights (arXiv:2601.04664)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from relevance.accumulators import Moments
from relevance.method import AttributionTarget, Gradients, OfGradients, Pass, Shape, Site, Units
from relevance.rules import ATTNLRP

THRESHOLD = 1.0


class Crane(OfGradients):
    """As in the first author's published code (github.com/weizaiff/LRP).

    For an output row o of a projection with weight W, r_o(d) = sum over inputs of grad(W)[o, in]
    = sum over tokens of g_{t,o} * sum over inputs of x_{t,in}, where g is the AttnLRP gradient of document d's mean
    target logit at the projection's output; all tokens of the document count, the start token too.
    A row's kurtosis is the unbiased excess kurtosis of r_o(d) across documents, z-scored over all rows of all layers:
    of gate and up projections, and of down_proj where output dimensions are wanted. A neuron scores the higher z of
    its gate row and its up row; an output dimension the z of its down_proj row. A row whose r_o does not vary has no
    kurtosis: it is left out of the z-scoring and scores 0. Published rule: z > 1. There is no contrast.
    """

    name = "crane"
    source = Pass(ATTNLRP, AttributionTarget.TARGET_LOGIT)
    languages_needed = 1
    documents_needed = 4

    def __init__(self, units: Units, device: torch.device | None = None) -> None:
        super().__init__(units, device)
        self.gate = Moments(units.layers, units.widest, self.device)
        if units.gated:
            self.up = Moments(units.layers, units.widest, self.device)
        if units.outputs:
            self.output = Moments(units.layers, units.hidden, self.device)

    @property
    def wanted(self) -> frozenset[Site]:
        return frozenset(site for site in (Site.GATE, Site.UP, Site.OUTPUT) if site.value in self.statistics)

    def accumulate(self, gradients: Gradients) -> None:
        moments = self.statistics[gradients.site.value]
        assert isinstance(moments, Moments)
        moments.add(gradients.layer, self.rows(gradients))

    @staticmethod
    def rows(gradients: Gradients) -> Tensor:
        """r_o(d): [documents, units]."""
        assert gradients.input_sum is not None
        inputs = (gradients.input_sum * gradients.batch.real).unsqueeze(1)  # [documents, 1, tokens]
        return (inputs @ gradients.gradient.to(inputs.dtype)).squeeze(1)

    def finalise(self) -> Tensor:
        """z of every neuron, followed by z of every output dimension where wanted: [layers, widest (+ hidden)]."""
        exists = self.units.exists
        rows = [self.gate.kurtosis().where(exists, torch.nan)]
        if self.units.gated:
            rows.append(self.up.kurtosis().where(exists, torch.nan))
        if self.units.outputs:
            rows.append(self.output.kurtosis())
        z = z_scores(torch.cat(rows, dim=1))
        gate, *others = torch.split(z, [part.shape[1] for part in rows], dim=1)
        neurons = torch.maximum(gate, others[0]) if self.units.gated else gate
        return torch.cat((neurons, others[-1]), dim=1) if self.units.outputs else neurons

    @classmethod
    def score(cls, finalised: Sequence[Tensor], shape: Shape) -> Tensor:
        return super().score([of_language[:, : max(shape.sizes)] for of_language in finalised], shape)

    @classmethod
    def outputs(cls, finalised: Sequence[Tensor], shape: Shape) -> Tensor | None:
        outputs = torch.stack([of_language[:, max(shape.sizes) :] for of_language in finalised])
        return outputs if outputs.shape[2] else None

    @classmethod
    def published(cls, scores: Tensor, shape: Shape) -> Tensor:
        return (scores > THRESHOLD) & shape.exists


def z_scores(values: Tensor) -> Tensor:
    """`values`, of any shape, minus their mean, in (population) standard deviations; NaN counts as missing, z = 0."""
    present = values[~values.isnan()]
    deviation = present.std(correction=0) if present.numel() else present.new_zeros(())
    if not deviation > 0:
        return torch.zeros_like(values)
    return ((values - present.mean()) / deviation).nan_to_num(nan=0.0)
