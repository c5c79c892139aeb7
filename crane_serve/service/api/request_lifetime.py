"""RequestLifetime: middleware that ends a request: its client has gone, its time is up, or the server must end it."""

import asyncio
import logging
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crane_serve.service.api.context import context_of
from crane_serve.service.api.errors import ApiError, error_event, error_response
from crane_serve.service.api.gate import Gate
from crane_serve.service.api.turns import Turns

_log = logging.getLogger("crane.api")

_HEED_S = 1.0  # time for an application to end by itself, after it was told that the client has gone
_GRACE_S = 10.0  # time for a cancelled application to clean up, and for a client to take the last event
_EVENTS = "text/event-stream"


class _Closed(OSError):
    """Raised in the application if it sends an answer after the request has ended."""


class RequestLifetimes:
    """The requests under way."""

    def __init__(self) -> None:
        self._runs: set[_Run] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def active(self) -> int:
        """How many requests are under way."""
        return len(self._runs)

    async def idle(self) -> None:
        """Wait until no request is under way."""
        while self._runs:
            await self._idle.wait()

    def end_all(self, error: Exception) -> None:
        """Cancel all requests under way, and answer them with `error`."""
        for run in tuple(self._runs):
            run.end(error)

    def add(self, run: "_Run") -> None:
        """Count a request that has begun."""
        self._runs.add(run)
        self._idle.clear()

    def discard(self, run: "_Run") -> None:
        """Stop counting a request."""
        self._runs.discard(run)
        if not self._runs:
            self._idle.set()


class RequestLifetime:
    """Runs each request in a task of its own, which is cancelled when the client has gone or the time is up.

    timeout_s: for an answer to be complete; what takes longer is a 504. A request that is ended is answered once its
    task has cleaned up and `gate` has forgotten it, or after 10 s, so that nothing that it held is in the way of the
    next one. If the answer has begun, the error is the last event of a stream of these, and for any other answer
    raised, so that the server cuts the connection. The application is told that `send` raises OSError once the request
    has ended (ASGI 2.4), so that responses need not listen themselves. Bodies come in one message (BoundedBody), and
    the application gets its body in one of `turns`, since it will read it at once.
    """

    def __init__(
        self, app: ASGIApp, lifetimes: RequestLifetimes, gate: Gate, *, timeout_s: float, turns: Turns | None = None
    ) -> None:
        self._app = app
        self._lifetimes = lifetimes
        self._gate = gate
        self._timeout_s = timeout_s
        self._turns = turns or Turns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = context_of(scope)
        scope["asgi"] = {**scope.get("asgi", {"version": "3.0"}), "spec_version": "2.4"}
        first = await receive()
        if first["type"] == "http.disconnect":
            return
        run = _Run(first, receive, send, self._turns)
        self._lifetimes.add(run)
        try:
            try:
                await run.until_over(self._app, scope, self._timeout_s)
            finally:
                self._gate.leave(context)
            await run.answer(scope)
        finally:
            self._lifetimes.discard(run)


class _Run:
    """One run of the application for a request. first: the message with the body."""

    def __init__(self, first: Message, receive: Receive, send: Send, turns: Turns) -> None:
        self._first: Message | None = first
        self._turns = turns
        self._receive = receive
        self._send = send
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._is_ended = False  # before the application was done with it
        self._error: Exception | None = None  # the reason, if the client is told one
        self._timer: asyncio.TimerHandle | None = None
        self._gone = asyncio.Event()
        self._waiting = 0  # calls of the application that wait for the message that the client has gone
        self._is_heeded = False  # the application has been given that message
        self._is_closed = False  # nothing more is taken from the application
        self._start: Message | None = None
        self._tail = b""  # the last bytes sent
        self._is_last_given = False  # the end of the answer, to the server
        self._is_complete = False

    def end(self, error: Exception | None) -> None:
        """End the request, if it is not over. error: for the client, None if it has gone."""
        if not self._over.done():
            self._is_ended = True
            self._error = error
            self._over.set_result(None)

    async def until_over(self, app: ASGIApp, scope: Scope, timeout_s: float) -> None:
        """Run the application until it returns, or the request is ended. Raises what the application raises."""
        task = asyncio.create_task(_call(app, scope, self._give, self._take))
        task.add_done_callback(self._done)
        listener = asyncio.create_task(self._listen())
        message = f"the request took longer than {timeout_s:g} s, the time that this server allows"
        late = ApiError(504, "timed_out", message)
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self.end, late)
        try:
            await self._over
        finally:
            self._is_closed = True
            if self._timer is not None:
                self._timer.cancel()
            try:
                if not task.done():
                    await self._stop(task)
            finally:
                listener.cancel()
        if not self._is_ended:
            task.result()

    async def answer(self, scope: Scope) -> None:
        """Tell the client why its request was ended, if it was. Raises that error if the answer cannot say so."""
        if self._error is None or self._is_complete:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(_GRACE_S):
                if self._start is None:
                    await error_response(self._error)(scope, self._receive, self._send)
                    return
                last = self._last_piece(self._error, scope["path"])
                if last is not None:
                    await self._send({"type": "http.response.body", "body": last, "more_body": False})
                    return
        raise self._error.with_traceback(None)

    def _done(self, task: asyncio.Task[None]) -> None:
        if not self._over.done():
            self._over.set_result(None)
        elif not task.cancelled():
            error = task.exception()
            if error is not None and not isinstance(error, (_Closed, ClientDisconnect)):
                _log.warning("a request failed while it was being ended", exc_info=error)

    async def _stop(self, task: asyncio.Task[None]) -> None:
        """End the application's task. If it waits for a disconnect, it is told first, since it may have to end tasks of
        its own."""
        self._tell_gone()
        try:
            if self._is_heeded:
                await asyncio.wait({task}, timeout=_HEED_S)
        finally:
            task.cancel()
        await asyncio.wait({task}, timeout=_GRACE_S)
        if not task.done():
            _log.error("a request is still running %g s after it was cancelled", _GRACE_S)

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._hang_up()

    def _hang_up(self) -> None:
        """The client has gone, or the answer is complete: servers send the same message for both."""
        self._tell_gone()
        if not self._is_last_given:
            self.end(None)

    def _tell_gone(self) -> None:
        self._is_heeded |= self._waiting > 0
        self._gone.set()

    async def _give(self) -> Message:
        """`receive` for the application."""
        if self._first is not None:
            first, self._first = self._first, None
            if first.get("body"):
                await self._turns.take()
            return first
        self._waiting += 1
        try:
            await self._gone.wait()
        finally:
            self._waiting -= 1
        return {"type": "http.disconnect"}

    async def _take(self, message: Message) -> None:
        """`send` for the application."""
        if self._is_closed:
            raise _Closed("the request has ended")
        if message["type"] != "http.response.body":
            await self._send(message)
            if message["type"] == "http.response.start":
                self._start = message
            return
        self._is_last_given = not message.get("more_body", False)
        await self._send(message)
        self._tail = (self._tail + bytes(message.get("body", b"")[-4:]))[-4:]
        if self._is_last_given:
            self._is_complete = True
            if self._timer is not None:
                self._timer.cancel()

    def _last_piece(self, error: Exception, path: str) -> bytes | None:
        """The message that ends an answer that has begun; None if it is not a stream of events, or is in the middle of
        an event."""
        assert self._start is not None, "the answer has begun"
        kind = Headers(raw=self._start["headers"]).get("content-type", "").partition(";")[0].strip().lower()
        if kind == _EVENTS and (not self._tail or self._tail.endswith((b"\n\n", b"\r\n\r\n"))):
            return error_event(error, path)
        return None


async def _call(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)
