"""Client half: ask a crane server, and evaluate what each mask does to each language and task."""

from clients.answers import (
    Delta,
    Generation,
    MaskListing,
    MaskNeurons,
    MaskSummary,
    Output,
    Readiness,
    Score,
    Scores,
    Usage,
)
from clients.blocking import iterate_answers, run_evaluation
from clients.client import AsyncCraneClient, CraneClient
from clients.errors import CraneError, EvaluationError
from clients.evaluation import Evaluation
from clients.plan import Plan
from clients.record import Record
from clients.results import ItemResult
from clients.retries import RetryPolicy
from clients.run import Progress, Run, evaluate

__all__ = [
    "AsyncCraneClient",
    "CraneClient",
    "CraneError",
    "Delta",
    "Evaluation",
    "EvaluationError",
    "Generation",
    "ItemResult",
    "MaskListing",
    "MaskNeurons",
    "MaskSummary",
    "Output",
    "Plan",
    "Progress",
    "Readiness",
    "Record",
    "RetryPolicy",
    "Run",
    "Score",
    "Scores",
    "Usage",
    "evaluate",
    "iterate_answers",
    "run_evaluation",
]
