"""A case: something that ill will can try, what came of it, and whether that is within its bound."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """measured: what came of it, in words and figures; holds: whether it is as promised."""

    measured: str
    holds: bool


@dataclass(frozen=True)
class Case:
    """number: the one in the table; tried: what is tried; promised: what should come of it."""

    number: int
    tried: str
    promised: str
    measure: Callable[[], Outcome]
