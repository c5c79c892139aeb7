"""Playground: the page as an ASGI application, Gradio behind a gate that lets through only what the page needs.

Gradio has routes for uploads, files, proxies, component servers and more, reads files and addresses that a request
names, and prints what it was given when a request is malformed. So the paths are listed (`paths.py`), queries are
dropped, and the one body that is taken is read here and written anew.
"""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crane_serve.service.api.body import replayed
from crane_serve.service.api.errors import ApiError, TooBusy
from crane_serve.service.playground.paths import JOIN, ROUTE, STREAM, is_of_page

# What Gradio reads when it is imported or mounted. Else it calls home, and computes statistics of its events with
# pandas after each of them.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"
os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(2**62)

import gradio

from crane_serve.service.playground.evaluation import EvaluationFile
from crane_serve.service.playground.layout import head, lay_out, theme
from crane_serve.service.playground.service import Service
from crane_serve.service.playground.visits import Visits

MAX_BODY_BYTES = 256 * 2**10
MAX_STREAMS = 256
"""Streams of events that are open at once, over all visitors."""

_MAX_WAITING = 256  # events that wait for their turn
_MAX_SESSIONS = 256  # whose last values Gradio keeps; the page does not need them
_POLL_S = 0.02  # of Gradio's queue, whose own choice is 1 ms, from an idle server too
_PROGRESS_S = 1.0  # of Gradio's progress bars, which the page has none of

# Gradio's templates are functions made of strings, its styles stand in elements.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'"
)
_SAFE = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_CACHED = {"assets": "public, max-age=31536000, immutable", "static": "public, max-age=3600"}
"""By the first part of the path; names of assets change with their content."""

_Value = str | int | float | bool | None


class _Join(BaseModel):
    """What the page sends when something is clicked; values are texts, numbers and lists of texts, and never objects.

    data: the values of the event's inputs, of which the first is the API key.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    data: list[_Value | list[str]] = Field(min_length=1, max_length=32)
    fn_index: int
    session_hash: str = Field(pattern=r"^[A-Za-z0-9]{1,64}$")
    trigger_id: int | None = None
    event_data: None = None


class Playground:
    """Answers the requests of `is_of_page`; for others it raises a 404.

    app: the service, which the page's callbacks call; evaluation: directory or file of an evaluation to show, None for
    none. Use `lifespan` while the service runs.
    """

    def __init__(self, app: ASGIApp, evaluation: Path | None) -> None:
        self._visits = Visits()
        blocks = lay_out(Service(app, self._visits), EvaluationFile(evaluation))
        blocks.queue(max_size=_MAX_WAITING, default_concurrency_limit=None)
        self._holder = FastAPI(openapi_url=None)
        gradio.mount_gradio_app(
            self._holder,
            blocks,
            path="/",
            theme=theme(),
            head=head(),
            footer_links=[],
            run_history=False,  # which would keep what is typed in the browser's storage
            show_error=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            pwa=False,
        )
        self._gradio = self._holder.routes[-1].app  # type: ignore[attr-defined]
        # Of the two middlewares one lets any origin read the answers. The other packs assets anew for each request.
        self._gradio.user_middleware.clear()
        for app in (self._holder, self._gradio):
            for kind in (HTTPException, RequestValidationError, Exception):
                app.add_exception_handler(kind, _pass_on)
        self._gradio.state_holder.capacity = _MAX_SESSIONS
        self._queue = blocks._queue
        self._queue.sleep_when_free = _POLL_S
        self._queue.progress_update_sleep_when_free = _PROGRESS_S
        self._inputs = {number: len(function.inputs) for number, function in blocks.fns.items()}
        self._streams = 0

    @asynccontextmanager
    async def lifespan(self) -> AsyncGenerator[None]:
        """Runs Gradio's queue."""
        async with self._holder.router.lifespan_context(self._holder):
            try:
                yield
            finally:
                self._queue.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = str(scope["path"])
        if scope["type"] != "http" or not is_of_page(scope["method"], path):
            raise HTTPException(404)
        scope["crane_route"] = ROUTE
        inner: Scope = {**scope, "state": {}, "query_string": b"", "root_path": ""}
        inner.pop("router", None)
        answer = _Answer(path, send)
        if path == STREAM:
            await self._stream(_session(scope), inner, receive, answer)
        elif path == JOIN:
            join, receive = await _read(inner, receive)
            self._require_known(join)
            await self._holder(inner, receive, answer)
        else:
            await self._holder(inner, receive, answer)

    def _require_known(self, join: _Join) -> None:
        """Raises ApiError for an event that the page does not have."""
        inputs = self._inputs.get(join.fn_index)
        if inputs != len(join.data):
            message = f"event {join.fn_index} with {len(join.data)} values; the page has no such event"
            raise ApiError(422, "malformed_body", message, "fn_index")
        waiting = self._queue.pending_event_ids_session
        if len(waiting) >= _MAX_WAITING and join.session_hash not in waiting:
            self._forget_finished()
        if len(waiting) >= _MAX_WAITING and join.session_hash not in waiting:
            raise TooBusy("queue_full", f"{len(waiting)} visitors wait for answers, as many as the playground serves")

    def _forget_finished(self) -> None:
        """Drop answers that nobody has come for."""
        waiting = self._queue.pending_event_ids_session
        for session in [session for session, events in waiting.items() if not self._is_running(events)]:
            del waiting[session]
            self._queue.pending_messages_per_session.pop(session, None)

    def _is_running(self, events: set[str]) -> bool:
        return not events.isdisjoint(self._queue.event_ids_to_events)

    async def _stream(self, session: str, scope: Scope, receive: Receive, send: Send) -> None:
        """What happens to the events of a session; when its visitor leaves, they end."""
        if not self._queue.pending_event_ids_session.get(session):
            raise ApiError(404, "not_found", "no event of this session is under way")
        if self._streams >= MAX_STREAMS:
            raise TooBusy("too_many_requests", f"{self._streams} streams are open, as many as the playground has")
        scope["query_string"] = b"session_hash=" + session.encode()
        self._streams += 1
        try:
            await self._holder(scope, receive, send)
        finally:
            self._streams -= 1
            self._visits.leave(session)


async def _pass_on(request: Request, error: Exception) -> Response:
    """Leaves an error to the service, which answers all of them in one shape."""
    raise error


class _Answer:
    """`send` with the headers of the page's answers."""

    def __init__(self, path: str, send: Send) -> None:
        self._path = path
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update(_SAFE)
            if message["status"] == 200:
                headers["Cache-Control"] = _CACHED.get(self._path.split("/")[1], "no-store")
        await self._send(message)


def _session(scope: Scope) -> str:
    given = dict(parse_qsl(str(scope["query_string"], "latin-1")))
    return given.get("session_hash", "")


async def _read(scope: Scope, receive: Receive) -> tuple[_Join, Receive]:
    """The event that a body asks for, and `receive` that gives it without the API key, which goes into the headers.

    A value of an input would be kept by Gradio, and printed if it is malformed. Raises ApiError.
    """
    headers = Headers(scope=scope)
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # Pages of other origins can send anything else without asking.
        raise ApiError(415, "unsupported_media_type", "expected Content-Type: application/json")
    content = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "malformed_body", "the body ends early")
        content += message.get("body", b"")
        more = message.get("more_body", False)
        if len(content) > MAX_BODY_BYTES:
            raise ApiError(413, "body_too_large", f"the playground takes texts of at most {MAX_BODY_BYTES} bytes")
    try:
        join = _Join.model_validate_json(bytes(content))
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"][:1])) or "body"
        raise ApiError(422, "malformed_body", f"{where}: expected what the page sends", where) from None
    key, join.data[0] = join.data[0], ""
    scope["headers"] = _with_key(scope, key)
    body = join.model_dump_json().encode()
    return join, replayed({"type": "http.request", "body": body, "more_body": False}, receive)


def _with_key(scope: Scope, key: Any) -> list[tuple[bytes, bytes]]:
    """The headers, with `key` and no other in x-api-key, and the length of the body left out."""
    dropped = (b"authorization", b"x-api-key", b"content-length")
    kept = [(name, value) for name, value in scope["headers"] if name not in dropped]
    text = key.strip() if isinstance(key, str) else ""
    return [*kept, (b"x-api-key", text.encode("latin-1", errors="replace"))] if text else kept
