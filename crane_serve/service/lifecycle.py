"""The life of the server process: start, serve, drain, stop; and its exit codes."""

import asyncio
import gc
import logging
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI

from crane_serve.engine.answers import EngineDead
from crane_serve.service.api.errors import ApiError
from crane_serve.service.connections import Connection
from crane_serve.service.settings import ServeSettings

STOPPED, FAILED = 0, 1
"""Exit codes: of a server that was asked to stop, and of one that could not start or whose engine has died."""

MAX_HEAD_BYTES = 64 * 2**10
"""Longest head of a request; an unfinished head may be longer by one read of the socket."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_BACKLOG = 2048
_POLL_S = 0.2
_GRACE_S = 0.2
_DEATH_ANSWERS_S = 2.0
_DEATH_NOTICE_S = 1.0
_CLOSING_S = 5

_log = logging.getLogger("crane.serve")


def run(app: FastAPI, settings: ServeSettings) -> int:
    """Serve `app` until a signal or the death of its engine ends it; the exit code.

    On SIGTERM or SIGINT nothing more is admitted, requests under way have `drain_timeout_s` to end, and the rest are
    answered with a 503. A second signal ends the wait. A signal before the engine has started ends the start. Uses
    `gate`, `lifetimes` and `engine` of the application's state. Must be called in the main thread.
    """
    _raise_file_limit()
    try:
        with _signals(_give_up) as on_signal, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_Life(app, settings).serve(on_signal))
    except _GivenUp:
        _log.warning("stopped before the engine had started")
        return STOPPED
    except Exception as error:
        _log.error("the server failed: %s: %s", type(error).__name__, error)
        _log.debug("the failure", exc_info=error)
        return FAILED


class _GivenUp(SystemExit):
    """A signal while the engine was starting. Not an Exception, so that the code that starts the engine does not catch
    it."""


def _give_up() -> None:
    raise _GivenUp(STOPPED)


def _nothing() -> None:
    pass


def _soon(loop: asyncio.AbstractEventLoop, action: Callable[[], None]) -> None:
    loop.call_soon_threadsafe(action)


_OnSignal = Callable[[Callable[[], None]], None]


@contextmanager
def _signals(first: Callable[[], None]) -> Iterator[_OnSignal]:
    """Call a handler on each signal: `first`, until another is passed to the function that this yields."""
    current = first

    def call(number: int, frame: FrameType | None) -> None:
        current()

    def change(action: Callable[[], None]) -> None:
        nonlocal current
        current = action

    # Not the event loop's handlers: while the engine starts, the loop is blocked for a long time.
    before = {number: signal.signal(number, call) for number in _SIGNALS}
    try:
        yield change
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Server(uvicorn.Server):
    def capture_signals(self) -> Any:
        """Does not handle signals: uvicorn's own handling would end the process during the drain."""
        return nullcontext()


class _Life:
    """One run of the server."""

    def __init__(self, app: FastAPI, settings: ServeSettings) -> None:
        self._app = app
        self._settings = settings
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    async def serve(self, on_signal: _OnSignal) -> int:
        """The exit code. Raises what the start of the engine raises, OSError if the address cannot be had."""
        if self._settings.port:
            self._listen().close()  # so that an address in use is an error now, and not after the engine has started
        loop = asyncio.get_running_loop()
        async with self._app.router.lifespan_context(self._app):
            on_signal(lambda: _soon(loop, self._signalled))
            gc.collect()
            gc.freeze()  # what has been made so far stays: to go through it again would hold the loop for long
            sockets = [self._listen()]
            server = _Server(self._config())
            serving = asyncio.create_task(server.serve(sockets))
            host, port = sockets[0].getsockname()[:2]
            _log.info("listening", extra={"host": host, "port": port})
            try:
                code = await self._until_the_end(serving)
            finally:
                server.should_exit = True
                await serving
                on_signal(_nothing)  # the engine is stopping
        return code

    def _signalled(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def _listen(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._settings.host else socket.AF_INET
        return socket.create_server((self._settings.host, self._settings.port), family=family, backlog=_BACKLOG)

    def _config(self) -> uvicorn.Config:
        settings = self._settings
        return uvicorn.Config(
            self._app,
            http=Connection,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            ws="none",
            lifespan="off",  # `serve` runs it
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=settings.max_connections + 1,  # uvicorn refuses the connection that reaches its limit
            timeout_graceful_shutdown=_CLOSING_S,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
        )

    async def _until_the_end(self, serving: asyncio.Task[None]) -> int:
        stop, death = asyncio.create_task(self._stop.wait()), asyncio.create_task(self._engine_dies())
        try:
            await asyncio.wait({serving, stop, death}, return_when=asyncio.FIRST_COMPLETED)
            if stop.done():
                await self._drain(death)
            if death.done():
                await self._announce_death()
                return FAILED
            return STOPPED if stop.done() else FAILED
        finally:
            stop.cancel()
            death.cancel()

    async def _engine_dies(self) -> None:
        while not self._app.state.engine.is_dead:
            await asyncio.sleep(_POLL_S)

    async def _drain(self, death: asyncio.Task[None]) -> None:
        lifetimes, timeout_s = self._app.state.lifetimes, self._settings.drain_timeout_s
        self._app.state.gate.closed = True
        _log.info("shutting down", extra={"requests": lifetimes.active, "drain_timeout_s": timeout_s})
        idle, hurry = asyncio.create_task(lifetimes.idle()), asyncio.create_task(self._hurry.wait())
        await asyncio.wait({idle, hurry, death}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        drained = idle.done()
        idle.cancel()
        hurry.cancel()
        if death.done():
            return
        if drained:
            await asyncio.sleep(_GRACE_S)  # for clients that are just sending a request on an open connection
        else:
            _log.warning("requests are ended", extra={"requests": lifetimes.active})
        lifetimes.end_all(
            ApiError(503, "shutting_down", "the server is shutting down", headers={"Connection": "close"})
        )

    async def _announce_death(self) -> None:
        _log.error("the engine has died", extra={"requests": self._app.state.lifetimes.active})
        with suppress(TimeoutError):
            await asyncio.wait_for(self._app.state.lifetimes.idle(), _DEATH_ANSWERS_S)
        self._app.state.lifetimes.end_all(EngineDead("the engine has died"))
        await asyncio.sleep(_DEATH_NOTICE_S)


def _raise_file_limit() -> None:
    """Raise the process's limit of open files, and so of connections, as far as the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # the kernel's own limit may be lower than "unlimited"
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
