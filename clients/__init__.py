"""Client half: ask a crane server and turn its answers into the matrix mask x language -> degradation."""

from clients.answers import Delta, Generation, MaskListing, MaskSummary, Output, Readiness, Score, Scores, Usage
from clients.client import AsyncCraneClient, CraneClient
from clients.errors import CraneError, EvaluationError
from clients.retries import RetryPolicy

__all__ = [
    "AsyncCraneClient",
    "CraneClient",
    "CraneError",
    "Delta",
    "EvaluationError",
    "Generation",
    "MaskListing",
    "MaskSummary",
    "Output",
    "Readiness",
    "RetryPolicy",
    "Score",
    "Scores",
    "Usage",
]
