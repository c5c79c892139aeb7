"""BoundedBody: middleware that reads a body whole, within bounds of size and time, before the application runs."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crane_serve.service.api.context import has_body
from crane_serve.service.api.errors import ApiError, TooBusy, error_response

_PAUSE_S = 2.0  # a refused client that sends nothing for so long is assumed to have seen the answer
DRAINED_BYTES = 16 * 2**20
"""How much of a refused body is read and thrown away."""


@dataclass
class _Held:
    """How many bytes of one body are buffered, and whether all of it has arrived."""

    size: int = 0
    is_over: bool = False


class BoundedBody:
    """Gives the application the whole body in one message, or answers with an error.

    max_bytes: of one body. max_buffered_bytes: of all bodies together, each from its arrival to the end of its request;
    not less than max_bytes. timeout_s: for a whole body.

    A refused request is answered at once. Then the rest of its body is read and thrown away, within timeout_s and
    DRAINED_BYTES, and the connection is closed. Many clients send the whole body before they look at the answer;
    without this they would see a connection reset instead.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, max_buffered_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_buffered_bytes = max_buffered_bytes
        self._timeout_s = timeout_s
        self.buffered_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held = _Held()
        try:
            try:
                _require_plain(scope)
                self._require_short(scope)
                message = await self._read(receive, held)
                if message is None:
                    return
                receive = replayed(message, receive)
                del message  # so that the application decides how long the body stays in memory
            except ApiError as error:
                error.headers["Connection"] = "close"
                if not held.is_over:
                    send = _Draining(receive, send, self._timeout_s)
                await error_response(error)(scope, receive, send)
                return
            await self._app(scope, receive, send)
        finally:
            self.buffered_bytes -= held.size

    def _require_short(self, scope: Scope) -> None:
        """Raises ApiError if Content-Length says that the body is too long."""
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > self._max_bytes):
            raise self._too_large()

    async def _read(self, receive: Receive, held: _Held) -> Message | None:
        """The body in one message, None if the client goes before its end. Raises ApiError."""
        try:
            async with asyncio.timeout(self._timeout_s):
                message = await receive()
                if message["type"] != "http.request":
                    return None
                more = self._hold(held, message)
                if not more:
                    return message
                # Not a list of pieces: with pieces of a few bytes, each list entry would cost more memory than its
                # content.
                content = bytearray(message.get("body", b""))
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        return None
                    more = self._hold(held, message)
                    content += message.get("body", b"")
                return {"type": "http.request", "body": bytes(content), "more_body": False}
        except TimeoutError:
            raise ApiError(408, "body_too_slow", f"the body did not arrive within {self._timeout_s:g} s") from None

    def _hold(self, held: _Held, message: Message) -> bool:
        """Count a piece; returns whether more pieces follow. Raises ApiError."""
        size = len(message.get("body", b""))
        held.is_over = not message.get("more_body", False)
        if held.size + size > self._max_bytes:
            raise self._too_large()
        if self.buffered_bytes + size > self._max_buffered_bytes:
            raise TooBusy(
                "too_much_data", f"the server holds {self.buffered_bytes} bytes of requests; no room for more"
            )
        held.size += size
        self.buffered_bytes += size
        return not held.is_over

    def _too_large(self) -> ApiError:
        return ApiError(413, "body_too_large", f"the body is longer than {self._max_bytes} bytes")


class _Draining:
    """`send` for an answer that begins before the end of the body: it reads the rest of the body before the answer
    ends."""

    def __init__(self, receive: Receive, send: Send, timeout_s: float) -> None:
        self._receive = receive
        self._send = send
        self._timeout_s = timeout_s

    async def __call__(self, message: Message) -> None:
        if message["type"] != "http.response.body" or message.get("more_body", False):
            await self._send(message)
            return
        await self._send({**message, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(self._timeout_s):
                await self._drain()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _drain(self) -> None:
        more, drained = True, 0
        while more and drained < DRAINED_BYTES:
            async with asyncio.timeout(_PAUSE_S):
                message = await self._receive()
            more = message.get("more_body", False)
            drained += len(message.get("body", b""))


def _require_plain(scope: Scope) -> None:
    """Raises ApiError for a body that is compressed: how long it would become is unknown."""
    codings = ",".join(Headers(scope=scope).getlist("content-encoding")).split(",")
    if any(coding.strip().lower() not in ("", "identity") for coding in codings) and has_body(scope):
        raise ApiError(
            415,
            "unsupported_encoding",
            "Content-Encoding: expected none, or identity",
            headers={"Accept-Encoding": "identity"},
        )


def replayed(message: Message, receive: Receive) -> Receive:
    """`receive` that gives `message` first."""
    messages = [message]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
