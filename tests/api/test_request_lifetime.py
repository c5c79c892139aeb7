"""How requests end: by themselves, when the client goes, when time is up, when the server ends them."""

import asyncio
import json
import logging
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from pydantic import SecretStr
from starlette.background import BackgroundTask
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from crane_serve.engine.answers import EngineDead
from crane_serve.service.api import request_lifetime
from crane_serve.service.api.app import create_app
from crane_serve.service.api.authentication import Authentication
from crane_serve.service.api.body import BoundedBody
from crane_serve.service.api.context import context_of
from crane_serve.service.api.errors import ApiError
from crane_serve.service.api.gate import Gate
from crane_serve.service.api.keys import KeyRing
from crane_serve.service.api.request_lifetime import RequestLifetime, RequestLifetimes
from tests.api.exchange import Exchange
from tests.api.fake_engine import FakeEngine

KEY = "a-key-of-somebody"
SHUTTING_DOWN = ApiError(503, "shutting_down", "the server is shutting down")


class Stack:
    """A RequestLifetime around an application, with what it reports to."""

    def __init__(self, app: ASGIApp, *, timeout_s: float = 60) -> None:
        self.gate = Gate(100, 10)
        self.lifetimes = RequestLifetimes()
        self.app = RequestLifetime(app, self.lifetimes, self.gate, timeout_s=timeout_s)

    def call(self, exchange: Exchange) -> "asyncio.Task[None]":
        return asyncio.create_task(exchange.call(self.app))

    async def is_clean(self) -> bool:
        await until(lambda: len(asyncio.all_tasks()) == 1)
        return (self.lifetimes.active, self.gate.sequences) == (0, 0)


class Work:
    """An application that holds three places of the gate, answers what it is told to, and then works for ever."""

    def __init__(self, stack: Callable[[], Stack], *chunks: bytes, media_type: bytes = b"text/plain") -> None:
        self._stack = stack
        self._chunks = chunks
        self._media_type = media_type
        self.cleanup_s = 0.0
        self.began = asyncio.Event()
        self.cleaned_up = False
        self.error: BaseException | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        self._stack().gate.admit(context_of(scope), 3)
        try:
            if self._chunks:
                headers = [(b"content-type", self._media_type)]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            self.began.set()
            await asyncio.Event().wait()
        except BaseException as error:
            self.error = error
            raise
        finally:
            await asyncio.sleep(self.cleanup_s)
            self.cleaned_up = True


def working(*chunks: bytes, media_type: bytes = b"text/plain", timeout_s: float = 60) -> tuple[Stack, Work]:
    work = Work(lambda: stack, *chunks, media_type=media_type)
    stack = Stack(work, timeout_s=timeout_s)
    return stack, work


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_lifetime, "_HEED_S", 0.2)
    monkeypatch.setattr(request_lifetime, "_GRACE_S", 0.5)


async def test_an_answer_passes_unchanged() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        content = await Request(scope, receive).json()
        stack.gate.admit(context_of(scope), 1)
        assert (stack.lifetimes.active, stack.gate.sequences) == (1, 1)
        await JSONResponse({"got": content}, status_code=201)(scope, receive, send)

    stack = Stack(app)
    exchange = Exchange("POST").give(b"[1,2]")
    await exchange.call(stack.app)
    assert (exchange.status, exchange.body) == (201, b'{"got":[1,2]}')
    assert await stack.is_clean()


async def test_errors_of_the_application_propagate() -> None:
    error = RuntimeError("broken")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        stack.gate.admit(context_of(scope), 1)
        raise error

    stack = Stack(app)
    exchange = Exchange().give()
    with pytest.raises(RuntimeError) as caught:
        await exchange.call(stack.app)
    assert caught.value is error
    assert exchange.sent == []
    assert await stack.is_clean()


async def test_other_scopes_pass() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    stack = Stack(app)
    for kind in ("lifespan", "websocket"):
        await Exchange(kind=kind).call(stack.app)
    assert seen == ["lifespan", "websocket"]


@pytest.mark.parametrize("chunks", [(), (b"x",), (b"data: 1\n\n",)])
async def test_a_client_that_goes_ends_the_work_and_gets_nothing(chunks: tuple[bytes, ...]) -> None:
    stack, work = working(*chunks, media_type=b"text/event-stream")
    work.cleanup_s = 0.05
    exchange = Exchange("POST").give(b"{}")
    call = stack.call(exchange)
    await work.began.wait()
    assert (stack.lifetimes.active, stack.gate.sequences) == (1, 3)
    sent = list(exchange.sent)
    exchange.hang_up()
    await call
    assert isinstance(work.error, asyncio.CancelledError)
    assert work.cleaned_up
    assert exchange.sent == sent
    assert await stack.is_clean()


async def test_a_client_that_has_gone_already_starts_nothing() -> None:
    stack, work = working()
    exchange = Exchange("POST").hang_up()
    await exchange.call(stack.app)
    assert (work.began.is_set(), exchange.sent) == (False, [])
    assert await stack.is_clean()


async def test_time_is_up() -> None:
    stack, work = working(timeout_s=0.05)
    work.cleanup_s = 0.05
    exchange = Exchange("POST").give(b"{}")
    await exchange.call(stack.app)
    assert (exchange.status, exchange.error["code"]) == (504, "timed_out")
    assert exchange.error["message"] == "the request took longer than 0.05 s, the time that this server allows"
    assert isinstance(work.error, asyncio.CancelledError)
    assert await stack.is_clean()


async def test_the_error_is_answered_when_everything_has_been_given_back() -> None:
    stack, work = working()
    work.cleanup_s = 0.1
    exchange = Exchange("POST").give(b"{}")
    call = stack.call(exchange)
    await work.began.wait()
    stack.lifetimes.end_all(SHUTTING_DOWN)
    await exchange.answering.wait()
    assert work.cleaned_up
    assert stack.gate.sequences == 0
    await call
    assert (exchange.status, exchange.error["code"]) == (503, "shutting_down")


async def test_a_complete_answer_is_never_late() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse(1)(scope, receive, send)
        await asyncio.sleep(0.3)
        finished.set()

    finished = asyncio.Event()
    stack = Stack(app, timeout_s=0.05)
    exchange = Exchange().give()
    await exchange.call(stack.app)
    assert (exchange.body, finished.is_set()) == (b"1", True)


async def test_background_work_goes_on_after_the_answer() -> None:
    done: list[Any] = []

    async def later(receive: Receive) -> None:
        done.append(await receive())  # servers say that the client has gone once the answer is complete
        await asyncio.sleep(0.05)
        done.append("later")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await JSONResponse(1, background=BackgroundTask(later, receive))(scope, receive, send)

    stack = Stack(app)
    exchange = Exchange().give()
    call = stack.call(exchange)
    await until(lambda: exchange.is_complete)
    assert stack.lifetimes.active == 1
    await call
    assert done == [{"type": "http.disconnect"}, "later"]
    assert await stack.is_clean()


async def test_background_work_can_be_ended() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse(1, background=BackgroundTask(asyncio.Event().wait))(scope, receive, send)

    stack = Stack(app)
    exchange = Exchange().give()
    call = stack.call(exchange)
    await until(lambda: exchange.is_complete)
    stack.lifetimes.end_all(SHUTTING_DOWN)
    await call
    assert exchange.body == b"1"
    assert await stack.is_clean()


EVENT = b'data: {"error":{"message":"the server is shutting down","type":"service_unavailable_error",'
REST = b'"param":null,"code":"shutting_down"}}'


@pytest.mark.parametrize(
    ("media_type", "chunks", "last"),
    [
        (b"text/event-stream", [b"data: 1\n\n"], EVENT + REST + b"\n\n"),
        (b"Text/Event-Stream; charset=utf-8", [b"data: 1\n", b"\n"], EVENT + REST + b"\n\n"),
        (b"text/event-stream", [b"data: 1\r\n\r\n", b""], EVENT + REST + b"\n\n"),
        (b"text/event-stream", [b""], EVENT + REST + b"\n\n"),
    ],
)
async def test_an_error_ends_a_stream_as_its_last_event(media_type: bytes, chunks: list[bytes], last: bytes) -> None:
    stack, work = working(*chunks, media_type=media_type)
    exchange = Exchange("POST").give(b"{}")
    call = stack.call(exchange)
    await work.began.wait()
    stack.lifetimes.end_all(SHUTTING_DOWN)
    await call
    assert exchange.body == b"".join(chunks) + last
    assert exchange.is_complete
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "shutting_down"
    assert await stack.is_clean()


@pytest.mark.parametrize(
    ("media_type", "chunk"),
    [
        (b"text/plain", b"x\n\n"),
        (b"application/json", b"["),
        (b"text/event-stream", b"data: 1\n"),
        (b"text/event-stream", b"data: 1"),
        (b"application/x-ndjson", b'{"a": 1}\n'),
    ],
)
async def test_any_other_answer_is_cut_off(media_type: bytes, chunk: bytes) -> None:
    stack, work = working(chunk, media_type=media_type)
    exchange = Exchange("POST").give(b"{}")
    call = stack.call(exchange)
    await work.began.wait()
    stack.lifetimes.end_all(SHUTTING_DOWN)
    with pytest.raises(ApiError) as caught:
        await call
    assert caught.value is SHUTTING_DOWN
    assert (exchange.body, exchange.is_complete) == (chunk, False)
    assert await stack.is_clean()


async def test_the_server_ends_all_requests_with_the_same_error() -> None:
    stacks = [working() for _ in range(3)]
    lifetimes = stacks[0][0].lifetimes
    exchanges = []
    calls = []
    for stack, work in stacks:
        stack.app._lifetimes = lifetimes
        exchanges.append(Exchange("POST").give(b"{}"))
        calls.append(stack.call(exchanges[-1]))
        await work.began.wait()
    idle = asyncio.create_task(lifetimes.idle())
    await asyncio.sleep(0)
    assert (lifetimes.active, idle.done()) == (3, False)
    lifetimes.end_all(EngineDead("the engine has died"))
    await asyncio.gather(*calls)
    await asyncio.wait_for(idle, 5)
    assert lifetimes.active == 0
    assert {(exchange.status, exchange.error["code"]) for exchange in exchanges} == {(503, "engine_dead")}


async def test_idle_is_at_once_if_nothing_runs() -> None:
    await asyncio.wait_for(RequestLifetimes().idle(), 5)


async def test_work_that_ignores_its_end_does_not_hold_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    release = asyncio.Event()
    late: list[BaseException] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        stack.gate.admit(context_of(scope), 1)
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        try:
            await JSONResponse(1)(scope, receive, send)
        except OSError as error:
            late.append(error)

    stack = Stack(app, timeout_s=0.05)
    exchange = Exchange().give()
    with caplog.at_level(logging.ERROR, "crane.api"):
        await exchange.call(stack.app)
    assert exchange.error["code"] == "timed_out"
    assert "0.5 s after it was cancelled" in caplog.text
    release.set()
    assert await stack.is_clean()
    assert len(late) == 1
    assert len(exchange.sent) == 2


async def test_a_failure_of_the_cleanup_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise RuntimeError("broken cleanup")

    stack = Stack(app, timeout_s=0.05)
    exchange = Exchange().give()
    await exchange.call(stack.app)
    assert exchange.status == 504
    assert "broken cleanup" in caplog.text


@pytest.mark.parametrize("ending", ["hang up", "time", "server"])
async def test_an_application_that_listens_itself_may_end_its_own_tasks(ending: str) -> None:
    """As vLLM's routes do: cancelled from outside they would leave their handler running."""
    handler: asyncio.Task[None] | None = None
    began = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal handler
        await receive()

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        handler, listener = asyncio.create_task(asyncio.Event().wait()), asyncio.create_task(listen())
        asyncio.get_running_loop().call_soon(began.set)
        _, pending = await asyncio.wait([handler, listener], return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await JSONResponse(None)(scope, receive, send)

    stack = Stack(app, timeout_s=0.1 if ending == "time" else 60)
    exchange = Exchange("POST").give(b"{}")
    call = stack.call(exchange)
    await began.wait()
    await asyncio.sleep(0)
    if ending == "hang up":
        exchange.hang_up()
    elif ending == "server":
        stack.lifetimes.end_all(SHUTTING_DOWN)
    await call
    assert await stack.is_clean()
    assert handler is not None
    assert handler.cancelled()
    expected = {"hang up": None, "time": "timed_out", "server": "shutting_down"}
    assert (exchange.error["code"] if exchange.sent else None) == expected[ending]


async def test_an_application_that_listens_and_does_not_heed_is_cancelled() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        while True:
            await receive()
            await asyncio.sleep(0.01)

    stack = Stack(app)
    exchange = Exchange("POST").give(b"{}")
    call = stack.call(exchange)
    await until(lambda: stack.lifetimes.active)
    await asyncio.sleep(0)
    exchange.hang_up()
    await call
    assert exchange.sent == []
    assert await stack.is_clean()


@pytest.mark.parametrize("times", [1, 2])
async def test_cancelled_from_outside_everything_is_cleaned_up(times: int) -> None:
    stack, work = working(b"x")
    work.cleanup_s = 0.1
    exchange = Exchange("POST").give(b"{}")
    call = stack.call(exchange)
    await work.began.wait()
    for _ in range(times):
        call.cancel()
        await asyncio.sleep(0.01)
    with pytest.raises(asyncio.CancelledError):
        await call
    assert isinstance(work.error, asyncio.CancelledError)
    assert await stack.is_clean()
    assert work.cleaned_up
    assert exchange.body == b"x"


async def test_cancelled_twice_while_the_application_is_given_time_it_still_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(request_lifetime, "_HEED_S", 30)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await receive()
        await asyncio.Event().wait()

    stack = Stack(app)
    call = stack.call(Exchange("POST").give(b"{}"))
    await until(lambda: stack.lifetimes.active)
    for _ in range(2):
        await asyncio.sleep(0.01)
        call.cancel()
    await asyncio.wait({call})
    assert await stack.is_clean()


async def test_a_client_that_takes_nothing_does_not_hold_the_end() -> None:
    stack, work = working(b"data: 1\n\n", media_type=b"text/event-stream", timeout_s=0.2)
    exchange = Exchange("POST").give(b"{}")
    call = stack.call(exchange)
    await work.began.wait()
    exchange.stuck = True
    with pytest.raises(ApiError, match="took longer"):
        await call
    assert exchange.body == b"data: 1\n\n"
    assert await stack.is_clean()


async def fake_service(engine: FakeEngine) -> FastAPI:
    async def start() -> FakeEngine:
        return engine

    return create_app(start)  # type: ignore[arg-type]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ending", ["hang up", "server"])
async def test_over_the_service(stream: bool, ending: str) -> None:
    engine = FakeEngine()
    engine.wait_after_tokens = 2
    app = await fake_service(engine)
    lifetimes = app.state.lifetimes
    body = json.dumps({"prompt": ["a", "b"], "stream": stream}).encode()
    async with app.router.lifespan_context(app):
        exchange = Exchange("POST", "/generate", [(b"content-type", b"application/json")]).give(body)
        call = asyncio.create_task(exchange.call(app))
        await until(lambda: engine.running == 2 and (not stream or len(exchange.sent) >= 4))
        assert (lifetimes.active, app.state.gate.sequences) == (1, 2)
        if ending == "hang up":
            exchange.hang_up()
        else:
            lifetimes.end_all(SHUTTING_DOWN)
        await call
        assert (engine.running, engine.aborted) == (0, 2)
        assert (lifetimes.active, app.state.gate.sequences) == (0, 0)
        if ending == "hang up":
            assert not exchange.is_complete
        elif stream:
            assert exchange.body.endswith(b"\n\n" + EVENT + REST + b"\n\n")
        else:
            assert (exchange.status, exchange.error["code"]) == (503, "shutting_down")


async def test_over_a_socket() -> None:
    """A server, clients that hang up at any time, and one that is answered."""
    engine = FakeEngine()
    app = await fake_service(engine)
    lifetimes = RequestLifetimes()
    gate = app.state.gate
    inner = RequestLifetime(app, lifetimes, gate, timeout_s=60)
    bounded = BoundedBody(inner, max_bytes=2**20, max_buffered_bytes=2**24, timeout_s=10)
    stacked = Authentication(bounded, KeyRing.load(None, SecretStr(KEY)))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        client = httpx.AsyncClient(base_url=url, timeout=10, headers={"authorization": f"Bearer {KEY}"})
        async with app.router.lifespan_context(app), client:
            server = uvicorn.Server(uvicorn.Config(stacked, log_level="critical", lifespan="off"))
            running = asyncio.create_task(server.serve([listening]))
            await until(lambda: server.started)
            engine.wait_after_tokens = 1
            for stream in (False, True):
                asking = asyncio.create_task(client.post("/generate", json={"prompt": "a", "stream": stream}))
                await until(lambda: engine.running == 1)
                asking.cancel()
                await asyncio.wait({asking})
                await until(lambda: engine.running == 0 and lifetimes.active == 0)
            async with client.stream("POST", "/generate", json={"prompt": "a", "stream": True}) as answer:
                pieces = answer.aiter_bytes()
                assert b'"text":"a"' in await anext(pieces)
                lifetimes.end_all(SHUTTING_DOWN)
                assert b"".join([piece async for piece in pieces]) == EVENT + REST + b"\n\n"
            engine.wait_after_tokens = None
            for stream in (False, True):
                answer = await client.post("/generate", json={"prompt": "a", "max_tokens": 3, "stream": stream})
                assert answer.status_code == 200
                assert answer.text.endswith("data: [DONE]\n\n") is stream
            refused = await client.post("/generate", json={}, headers={"authorization": "Bearer nobody's"})
            assert refused.status_code == 401
            assert (gate.sequences, lifetimes.active, bounded.buffered_bytes) == (0, 0, 0)
            assert not gate._requests_per_key
            server.should_exit = True
            await running
