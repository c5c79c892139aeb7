"""Relevance patching: attribution patching with the backward rules of LRP (arXiv:2508.21258)."""

from relevance.method import AttributionTarget, Pass
from relevance.methods.attribution import Attribution
from relevance.rules import RELP


class RelP(Attribution):
    """Predicted loss of log-probability, in nats per token of a document, when the neuron is set to 0.

    The estimate of `gradient` with gradients that RELP has modified, which makes it far less noisy.
    """

    name = "relp"
    source = Pass(RELP, AttributionTarget.LOG_PROBABILITY)
