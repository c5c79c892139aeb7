"""Attribution patching: the first-order effect of switching a neuron off (Nanda 2023; arXiv:2310.10348)."""

from relevance.method import AttributionTarget, Pass
from relevance.methods.attribution import Attribution
from relevance.rules import PLAIN


class Gradient(Attribution):
    """Predicted loss of log-probability, in nats per token of a document, when the neuron is set to 0.

    To first order zeroing a changes log p by -a * d(log p)/da; the score is the loss, a * d(log p)/da, of a
    document's mean log p, so that what a language needs is positive.
    """

    name = "gradient"
    source = Pass(PLAIN, AttributionTarget.LOG_PROBABILITY)
