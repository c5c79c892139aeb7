"""Observation: the outermost middleware. Each request gets an id, a line in the log, and is counted in the metrics."""

import logging
import re
import time
import uuid
from http import HTTPStatus

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crane_serve.service.api.context import RequestContext, context_of
from crane_serve.service.api.errors import ApiError, error_response
from crane_serve.service.api.metrics import UNMATCHED, Metrics
from crane_serve.service.playground import ROUTE as PLAYGROUND

REQUEST_ID = "X-Request-Id"
CLIENT_LEFT = 499
"""Status, in log and metrics, of a request whose client left before the end of the answer."""

_log = logging.getLogger("crane.access")
_errors = logging.getLogger("crane.api")
_REQUEST_ID_HEADER = REQUEST_ID.lower().encode()
_SAFE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_QUIET = frozenset({"/health", "/ready", "/metrics", PLAYGROUND})
_LONGEST_PATH = 200


class Observation:
    """ASGI middleware.

    The app behind it sees exactly one X-Request-Id, the request's own if it is one word of at most 64 letters, digits,
    '.', '_' and '-', else a new one. The answer carries it, and the name and digest of the mask that the request ran
    under. An error that the app has not answered is answered here. An error in the middle of an answer is raised again,
    so that the server logs it and cuts the connection.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Request(scope, send)
        self._metrics.enter()
        try:
            await self._app(scope, receive, request.send)
        except Exception as error:
            if request.status is not None and not request.complete:
                request.broken = error.status if isinstance(error, ApiError) else HTTPStatus.INTERNAL_SERVER_ERROR
                raise
            await request.fail(error, receive)
        finally:
            self._metrics.leave()
            self._note(request)

    def _note(self, request: "_Request") -> None:
        seconds = time.perf_counter() - request.began
        context, route, status = request.context, request.route, request.final_status
        mask = context.mask.name if context.mask is not None else None
        self._metrics.on_request(route, mask, status, seconds)
        scope = request.scope
        client = scope.get("client")
        fields = {
            "request_id": context.request_id,
            "method": scope["method"],
            "route": route,
            "path": scope["path"][:_LONGEST_PATH],
            "status": status,
            "seconds": round(seconds, 6),
            "mask": mask,
            "key": context.key.name if context.key is not None else None,
            "client": client[0] if client else None,
            "sequences": request.sequences,
        }
        _log.log(logging.DEBUG if route in _QUIET else logging.INFO, "request", extra=fields)


class _Request:
    """One request and the state of its answer."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.began = time.perf_counter()
        self.scope = scope
        self.context: RequestContext = context_of(scope)
        self.context.request_id = _take_id(scope)
        self.status: int | None = None
        self.complete = False
        self.broken: int | None = None
        self.sequences = 0
        self._send = send

    @property
    def route(self) -> str:
        """The template of its path."""
        route = self.scope.get("crane_route") or getattr(self.scope.get("route"), "path", None)
        return UNMATCHED if route is None else str(route)

    @property
    def final_status(self) -> int:
        """The status of the answer, or of the error that broke it off; CLIENT_LEFT if the answer has no end."""
        if self.broken is not None:
            return self.broken
        return CLIENT_LEFT if self.status is None or not self.complete else self.status

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start(message)
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True

    def _start(self, message: Message) -> None:
        self.status = message["status"]
        self.sequences = self.context.sequences  # the gate sets them to 0 at the end of the request
        headers = MutableHeaders(scope=message)
        headers[REQUEST_ID] = self.context.request_id
        if self.context.mask is not None:
            headers["X-Crane-Mask"] = self.context.mask.name
            headers["X-Crane-Mask-Digest"] = self.context.mask.mask.digest

    async def fail(self, error: Exception, receive: Receive) -> None:
        """Answer an error if nothing is answered yet; it is logged once, here or where it became an answer."""
        if self.status is None:
            await error_response(error)(self.scope, receive, self.send)
        elif self.status != HTTPStatus.INTERNAL_SERVER_ERROR:
            _errors.error("error after the answer", exc_info=error)


def _take_id(scope: Scope) -> str:
    """The id of a request; makes sure that its headers have it exactly once."""
    values = [value for name, value in scope["headers"] if name == _REQUEST_ID_HEADER]
    safe = len(values) == 1 and _SAFE_ID.fullmatch(values[0])
    request_id = values[0].decode("ascii") if safe else uuid.uuid4().hex
    others = [(name, value) for name, value in scope["headers"] if name != _REQUEST_ID_HEADER]
    scope["headers"] = [*others, (_REQUEST_ID_HEADER, request_id.encode())]
    return request_id
