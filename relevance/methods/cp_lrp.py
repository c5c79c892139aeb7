"""CP-LRP: relevance with constant attention weights and constant gates (Ali et al. 2022, arXiv:2202.07304)."""

from relevance.method import AttributionTarget, Pass
from relevance.methods.attribution import Attribution
from relevance.rules import CP_LRP


class CpLRP(Attribution):
    """As AttnLRP, in logits, with all relevance of a product given to one factor: values and the up projection."""

    name = "cp-lrp"
    source = Pass(CP_LRP, AttributionTarget.TARGET_LOGIT)
