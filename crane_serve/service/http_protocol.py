"""HTTP on a connection: uvicorn's protocol, with bounds on the head of a request, which uvicorn and httptools lack.

Written for uvicorn 0.54: `data_received` gets every byte, `on_headers_complete` and `on_message_complete` are called by
the parser meanwhile, and every request goes through `_start_asgi_task`.
"""

import asyncio
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import service_unavailable
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from crane_serve.service.api.errors import ApiError, error_response

MAX_HEAD_BYTES = 64 * 2**10
"""Longest head of a request; one that has not ended may come to this and one read of the socket."""

_CLOSE = {"Connection": "close"}


class BoundedHeadProtocol(HttpToolsProtocol):
    """HTTP/1.1 on one connection.

    header_timeout_s: from the connection, or from the first byte of its next request, to the end of that request's
    head. After it the connection is closed, with a 408 if a head was begun. A head that is too long is a 431, a
    connection too many a 503, what is no HTTP a 400.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        header_timeout_s: float,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._header_timeout_s = header_timeout_s
        self._in_head = True  # or between two requests
        self._heads_ended = 0
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The clock of the first head starts."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The clock stops."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the bytes of a head; too many are refused with 431."""
        if self._in_head and self._head_timer is None:
            self._expect_head()
        before = self._heads_ended if self._in_head else None
        super().data_received(data)
        if not self._in_head or self.transport.is_closing():
            return
        self._head_bytes = self._head_bytes + len(data) if before == self._heads_ended else 0
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(_head_too_long())

    def on_message_begin(self) -> None:
        """The clock of a later head on the same connection starts."""
        super().on_message_begin()
        if self._head_timer is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        """The head has come in time; what follows is the body's affair."""
        self._in_head = False
        self._heads_ended += 1
        self._head_bytes = 0
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """What follows is the next head."""
        self._in_head = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP in our own shape."""
        self._refuse(ApiError(400, "malformed_request", "the request is not HTTP/1.1"))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:  # type: ignore[override]
        if app is service_unavailable:
            app = _Refusal(ApiError(503, "too_many_connections", "too many connections at once", headers=_CLOSE))
        elif _head_bytes(cycle.scope) > MAX_HEAD_BYTES:
            app = _Refusal(_head_too_long())
        super()._start_asgi_task(cycle, app)  # type: ignore[arg-type]

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self._header_timeout_s, self._head_too_slow)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_too_slow(self) -> None:
        if self._is_answering:
            self._expect_head()
        elif self._head_bytes:
            self._refuse(
                ApiError(408, "head_too_slow", f"the head took longer than {self._header_timeout_s:g} s to arrive")
            )
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answer beside the application, and close; only close while another request is being answered."""
        self._stop_timer()
        if self.transport.is_closing():
            return
        if not self._is_answering:
            response = error_response(error)
            headers = [*self.server_state.default_headers, *response.raw_headers, (b"connection", b"close")]
            lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
            self.transport.write(STATUS_LINE[error.status] + lines + b"\r\n" + bytes(response.body))
        self.transport.close()


class _Refusal:
    """The application for a request that is not given to ours."""

    def __init__(self, error: ApiError) -> None:
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await error_response(self._error)(scope, receive, send)


def _head_too_long() -> ApiError:
    return ApiError(431, "head_too_long", f"the head is longer than {MAX_HEAD_BYTES} bytes", headers=_CLOSE)


def _head_bytes(scope: Any) -> int:
    fields = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    return fields + len(scope["raw_path"]) + len(scope["query_string"])
