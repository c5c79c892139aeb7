"""Requests to the application in this process, whose answers are handed on as they come."""

import asyncio
import logging
from collections.abc import AsyncIterator

import httpx
from starlette.types import ASGIApp, Message, Scope

_log = logging.getLogger("crane.api")

_CLOSING_S = 15.0  # more than the service allows a request to clean up


class InProcessTransport(httpx.AsyncBaseTransport):
    """Calls `app` as a server does, through all of its middleware.

    httpx.ASGITransport waits for the end of an answer before it hands on the beginning. client: address and port that
    the requests come from. Closing a response tells the application that its client has gone, and waits for it to end.
    """

    def __init__(self, app: ASGIApp, client: tuple[str, int] | None) -> None:
        self._app = app
        self._client = client

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Begin the answer. Raises what the application does before its answer has begun."""
        path, _, query = request.url.raw_path.partition(b"?")
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": request.url.scheme,
            "path": request.url.path,
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
            "client": self._client,
            "server": (request.url.host, request.url.port),
        }
        answer = _Answer(self._app, scope, await request.aread())
        try:
            start = await answer.start()
        except BaseException:
            await answer.aclose()
            raise
        return httpx.Response(start["status"], headers=start.get("headers", []), stream=answer)


class _Answer(httpx.AsyncByteStream):
    """One request on its way through the application."""

    def __init__(self, app: ASGIApp, scope: Scope, body: bytes) -> None:
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue()
        self._body: bytes | None = body
        self._gone = asyncio.Event()
        self._task = asyncio.create_task(self._run(app, scope))

    async def start(self) -> Message:
        """The message that the answer begins with. Raises httpx.ReadError if there is none."""
        message = await self._messages.get()
        if message is None:
            raise httpx.ReadError("the request got no answer")
        return message

    async def __aiter__(self) -> AsyncIterator[bytes]:
        more = True
        while more:
            message = await self._messages.get()
            if message is None:
                raise httpx.ReadError("the answer was cut off")
            more = message.get("more_body", False)
            yield message.get("body", b"")

    async def aclose(self) -> None:
        self._gone.set()
        await asyncio.wait({self._task}, timeout=_CLOSING_S)

    async def _run(self, app: ASGIApp, scope: Scope) -> None:
        try:
            await app(scope, self._receive, self._send)
        except Exception as error:
            _log.warning("an answer to the playground was cut off", exc_info=error)
        finally:
            self._messages.put_nowait(None)

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self._gone.is_set():
            raise OSError("the client has gone")
        self._messages.put_nowait(message)
