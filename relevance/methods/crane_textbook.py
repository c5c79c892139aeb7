"""CRANE (arXiv:2601.04664) with the relevance of textbook LRP in place of row sums of gradients."""

import torch
from torch import Tensor

from relevance.method import Gradients
from relevance.methods.crane import Crane


class CraneTextbook(Crane):
    """As `crane`, with r_o(d) = sum over inputs of W[o, in] * grad(W)[o, in], z_{t,o} * g_{t,o} summed over tokens.

    z is the projection's output; the bias of a projection that has one is counted with it. The published code leaves
    the weight factor out.
    """

    name = "crane-textbook"

    @staticmethod
    def rows(gradients: Gradients) -> Tensor:
        wide = torch.promote_types(gradients.value.dtype, torch.float32)
        relevance = gradients.value.to(wide).mul(gradients.gradient)  # [documents, tokens, units]
        return (gradients.batch.real.to(wide).unsqueeze(1) @ relevance).squeeze(1)
