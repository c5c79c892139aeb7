"""BoundedBody: middleware that reads a body whole, within bounds of size, shape and time, before the app runs."""

import asyncio
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crane_serve.service.api.context import context_of, has_body
from crane_serve.service.api.errors import ApiError, TooBusy, error_response
from crane_serve.service.api.json_shape import check_shape
from crane_serve.service.api.turns import Turns

_PAUSE_S = 2.0  # a refused client that sends nothing for so long is assumed to have seen the answer
DRAINED_BYTES = 16 * 2**20
"""How much of a refused body is read and thrown away."""

MAX_QUERY_BYTES = 16 * 2**10
"""Longest query of a request, as it is sent: a mask expression of 4,096 characters, each written as %XX, and more."""

MAX_PARAMETERS = 64
"""Most parameters in a query."""

_UPLOADING = "PUT"
_WITHOUT_BODY = frozenset({"GET", "HEAD"})
_LARGE_BYTES = 4096


@dataclass(eq=False)
class _Held:
    """How many bytes of one body are buffered, for which key, and whether all of it has arrived."""

    key: str | None
    began: float
    deadline: asyncio.Timeout | None = None
    size: int = 0
    is_over: bool = False
    is_cut: bool = False


class BoundedBody:
    """Gives the application the whole body in one message, or answers with an error.

    max_bytes: of one body, an uploaded mask; max_json_bytes: of any other. GET and HEAD take none. max_buffered_bytes:
    of all bodies together, each from its arrival to the end of its request, not less than max_bytes; a key has half of
    it, or max_bytes. If room is short, bodies that are still arriving are cut, the one first that has taken the most
    room for the longest. timeout_s: for a whole body. The body of a POST passes `check_shape`, in one
    of `turns` if it is large.

    A refused request is answered at once. Then the rest of its body is read and thrown away, within timeout_s and
    DRAINED_BYTES, and the connection is closed. Many clients send the whole body before they look at the answer;
    without this they would see a connection reset instead.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_bytes: int,
        max_buffered_bytes: int,
        timeout_s: float,
        max_json_bytes: int | None = None,
        turns: Turns | None = None,
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_json_bytes = max_bytes if max_json_bytes is None else min(max_bytes, max_json_bytes)
        self._max_buffered_bytes = max_buffered_bytes
        self._max_bytes_per_key = max(max_buffered_bytes // 2, max_bytes)
        self._timeout_s = timeout_s
        self._turns = turns or Turns()
        self._arriving: set[_Held] = set()
        self._bytes_per_key: Counter[str | None] = Counter()

    @property
    def buffered_bytes(self) -> int:
        """Of all bodies together."""
        return self._bytes_per_key.total()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        key = context_of(scope).key
        held = _Held(None if key is None else key.name, asyncio.get_running_loop().time())
        limit = self._max_bytes if scope["method"] == _UPLOADING else self._max_json_bytes
        try:
            try:
                _require_short_query(scope)
                _require_wanted(scope)
                _require_plain(scope)
                _require_short(scope, limit)
                message = await self._read(receive, held, limit)
                if message is None:
                    return
                if scope["method"] == "POST":
                    await self._check(message.get("body", b""))
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
            self._release(held)

    async def _read(self, receive: Receive, held: _Held, limit: int) -> Message | None:
        """The body in one message, None if the client goes before its end. Raises ApiError."""
        self._arriving.add(held)
        try:
            async with asyncio.timeout(self._timeout_s) as held.deadline:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                more = self._hold(held, message, limit)
                if not more:
                    return message
                # Not a list of pieces: with pieces of a few bytes, each list entry would cost more memory than its
                # content.
                content = bytearray(message.get("body", b""))
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        return None
                    more = self._hold(held, message, limit)
                    content += message.get("body", b"")
                return {"type": "http.request", "body": bytes(content), "more_body": False}
        except TimeoutError:
            reason = f"did not arrive within {self._timeout_s:g} s"
            if held.is_cut:
                reason = "was still arriving when others needed the room that it took"
            raise ApiError(408, "body_too_slow", f"the body {reason}") from None
        finally:
            self._arriving.discard(held)

    def _hold(self, held: _Held, message: Message, limit: int) -> bool:
        """Count a piece; returns whether more pieces follow. Raises ApiError."""
        size = len(message.get("body", b""))
        held.is_over = not message.get("more_body", False)
        if held.size + size > limit:
            raise _too_large(limit)
        if held.key is not None:
            self._make_room(self._bytes_per_key[held.key] + size - self._max_bytes_per_key, held, of_its_key=True)
        self._make_room(self.buffered_bytes + size - self._max_buffered_bytes, held, of_its_key=False)
        held.size += size
        self._bytes_per_key[held.key] += size
        return not held.is_over

    def _make_room(self, missing: int, held: _Held, *, of_its_key: bool) -> None:
        """Cut bodies that are arriving, but not `held`, until `missing` bytes more are free. Raises TooBusy."""
        if missing <= 0:
            return
        arriving = [other for other in self._arriving if not of_its_key or other.key == held.key]
        now = asyncio.get_running_loop().time()
        cut = []
        for other in sorted(arriving, key=lambda other: other.size * (now - other.began), reverse=True):
            if missing <= 0 or other is held:
                break
            missing -= other.size
            cut.append(other)
        if missing > 0:
            of_key = " with this key" if of_its_key else ""
            size = self._bytes_per_key[held.key] if of_its_key else self.buffered_bytes
            raise TooBusy("too_much_data", f"the server holds {size} bytes of requests{of_key}; no room for more")
        for other in cut:
            self._release(other)
            other.is_cut = True
            if other.deadline is not None:
                other.deadline.reschedule(now)

    def _release(self, held: _Held) -> None:
        self._bytes_per_key[held.key] -= held.size
        held.size = 0
        if not self._bytes_per_key[held.key]:
            del self._bytes_per_key[held.key]

    async def _check(self, content: bytes) -> None:
        if len(content) > _LARGE_BYTES:
            await self._turns.take()
        check_shape(content)


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


def _too_large(limit: int) -> ApiError:
    return ApiError(413, "body_too_large", f"the body is longer than {limit} bytes")


def _require_short(scope: Scope, limit: int) -> None:
    """Raises ApiError if Content-Length says that the body is too long."""
    length = Headers(scope=scope).get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > limit):
        raise _too_large(limit)


def _require_wanted(scope: Scope) -> None:
    """Raises ApiError for the body of a request that has none: it would take room from others, maybe without a key."""
    if scope["method"] in _WITHOUT_BODY and has_body(scope):
        raise ApiError(413, "body_too_large", f"a {scope['method']} request takes no body")


def _require_short_query(scope: Scope) -> None:
    """Raises ApiError for a query that takes long to read."""
    query: bytes = scope["query_string"]
    if len(query) > MAX_QUERY_BYTES:
        raise ApiError(422, "malformed_query", f"the query is longer than {MAX_QUERY_BYTES} bytes")
    if query.count(b"&") >= MAX_PARAMETERS:
        raise ApiError(422, "malformed_query", f"the query has more than {MAX_PARAMETERS} parameters")


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
