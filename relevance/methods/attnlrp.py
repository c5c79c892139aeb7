"""Signed AttnLRP relevance of each neuron to the model's predictions in a language (arXiv:2402.05602)."""

from relevance.method import AttributionTarget, Pass
from relevance.methods.attribution import Attribution
from relevance.rules import ATTNLRP


class AttnLRP(Attribution):
    """In logits: this neuron's average contribution to the logit of the true next token."""

    name = "attnlrp"
    source = Pass(ATTNLRP, AttributionTarget.TARGET_LOGIT)
