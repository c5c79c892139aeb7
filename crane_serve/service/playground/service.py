"""Service: the API as a visitor of the page calls it, with the visitor's own key."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

import gradio
from starlette.types import ASGIApp

from clients import AsyncCraneClient, CraneError
from clients.retries import RetryPolicy
from crane_serve.service.playground.transport import InProcessTransport
from crane_serve.service.playground.visits import Visits

MAX_MASKS = 16
"""Of one comparison."""

_log = logging.getLogger("crane.api")
_T = TypeVar("_T")


class Service:
    """The service in this process. app: all of it; visits: what runs for whom."""

    def __init__(self, app: ASGIApp, visits: Visits) -> None:
        self._app = app
        self._visits = visits

    def client(self, request: gradio.Request) -> AsyncCraneClient:
        """A client with the key of the visitor who makes `request`. Raises ValueError for what cannot be a key."""
        host = None if request.client is None else (request.client.host, request.client.port)
        return AsyncCraneClient(
            api_key=request.headers.get("x-api-key", ""),  # never None, which would mean this process's own
            concurrency=MAX_MASKS,
            retries=RetryPolicy(attempts=1),
            transport=InProcessTransport(self._app, host),
        )

    def start(self, request: gradio.Request, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """A task for `work`, which is cancelled when the visitor leaves."""
        return self._visits.run(request.session_hash, work)

    def leave(self, request: gradio.Request) -> None:
        """End everything that runs for the visitor."""
        self._visits.leave(request.session_hash)


def explained(error: Exception) -> str:
    """What the visitor is told of an error; anything unforeseen is logged and told without details."""
    if isinstance(error, CraneError):
        return error.message
    if isinstance(error, ValueError):
        return str(error)
    _log.error("the playground failed", exc_info=error)
    return "unexpected error; see the server's log"
