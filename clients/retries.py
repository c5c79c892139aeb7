"""RetryPolicy: which failures are retried, how often, and after how long."""

import random
from dataclasses import dataclass
from typing import Any

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
)

from clients.errors import CraneError


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential back-off with full jitter for transient errors; a Retry-After is added to the wait.

    attempts: in total, the first one included. An error whose Retry-After is above `longest_wait_s` is not retried.
    """

    attempts: int = 6
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts is {self.attempts}, expected at least 1")

    def blocking(self) -> Retrying:
        """A fresh controller for functions."""
        return Retrying(stop=stop_after_attempt(self.attempts), **self._rules())

    def awaiting(self) -> AsyncRetrying:
        """A fresh controller for coroutine functions."""
        return AsyncRetrying(stop=stop_after_attempt(self.attempts), **self._rules())

    def _wait_s(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked_s = error.retry_after_s if isinstance(error, CraneError) else None
        return (asked_s or 0.0) + random.uniform(0.0, self._back_off_s(state.attempt_number))

    def _back_off_s(self, attempt: int) -> float:
        try:
            return min(self.longest_wait_s, self.first_wait_s * 2.0 ** (attempt - 1))
        except OverflowError:
            return self.longest_wait_s

    def _rules(self) -> dict[str, Any]:
        return {"wait": self._wait_s, "retry": retry_if_exception(self._is_worth_retrying), "reraise": True}

    def _is_worth_retrying(self, error: BaseException) -> bool:
        """Whether an attempt that ended with `error` is retried, if an attempt is left."""
        return isinstance(error, CraneError) and error.transient and (error.retry_after_s or 0.0) <= self.longest_wait_s


@dataclass(frozen=True)
class Patience(RetryPolicy):
    """Retries while a server starts: for `total_s` seconds, also after read timeouts."""

    total_s: float = 60.0
    first_wait_s: float = 0.1
    longest_wait_s: float = 2.0

    def blocking(self) -> Retrying:
        return Retrying(stop=stop_after_delay(self.total_s), **self._rules())

    def awaiting(self) -> AsyncRetrying:
        return AsyncRetrying(stop=stop_after_delay(self.total_s), **self._rules())

    def _is_worth_retrying(self, error: BaseException) -> bool:
        return isinstance(error, CraneError) and (error.transient or error.status is None)
