"""Client half: ask a crane server and turn its answers into the matrix mask x language -> degradation."""

from clients.answers import (
    Delta,
    Generation,
    GenerationResult,
    MaskListing,
    MaskNeurons,
    MaskSummary,
    Output,
    Readiness,
    Score,
    Scores,
    ScoresResult,
    Usage,
)
from clients.batch import GenerateItem, ScoreItem
from clients.client import AsyncCraneClient, CraneClient
from clients.errors import CraneError, EvaluationError
from clients.retries import RetryPolicy

__all__ = [
    "AsyncCraneClient",
    "CraneClient",
    "CraneError",
    "Delta",
    "EvaluationError",
    "GenerateItem",
    "Generation",
    "GenerationResult",
    "MaskListing",
    "MaskNeurons",
    "MaskSummary",
    "Output",
    "Readiness",
    "RetryPolicy",
    "Score",
    "ScoreItem",
    "Scores",
    "ScoresResult",
    "Usage",
]
