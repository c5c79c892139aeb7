"""Client half: ask a crane server, and evaluate what each mask does to each language and task.

Each name is imported when it is first used, so that `crane --help` waits for none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from clients.permissions import Permissions
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
    "Permissions",
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

_MODULES = {
    "answers": "Delta Generation MaskListing MaskNeurons MaskSummary Output Readiness Score Scores Usage",
    "blocking": "iterate_answers run_evaluation",
    "client": "AsyncCraneClient CraneClient",
    "errors": "CraneError EvaluationError",
    "evaluation": "Evaluation",
    "permissions": "Permissions",
    "plan": "Plan",
    "record": "Record",
    "results": "ItemResult",
    "retries": "RetryPolicy",
    "run": "Progress Run evaluate",
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
