"""Bodies: read whole within bounds of size, sum and time."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crane_serve.service.api import body
from crane_serve.service.api.app import create_app
from crane_serve.service.api.body import MAX_PARAMETERS, MAX_QUERY_BYTES, BoundedBody
from crane_serve.service.api.context import context_of
from crane_serve.service.api.keys import Key, Role
from crane_serve.service.settings import ApiSettings
from tests.api.exchange import Exchange
from tests.api.fake_engine import FakeEngine


@pytest.fixture(autouse=True)
def short_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused clients of most tests neither go on sending nor hang up."""
    monkeypatch.setattr(body, "_PAUSE_S", 0.05)


class App:
    """Keeps the messages it receives, up to the end of the body; answers 204 once `go` is set."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.reached = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        more = True
        while more:
            self.reached.set()
            message = await receive()
            self.messages.append(message)
            more = message.get("more_body", False)
        await self.go.wait()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.messages)


def bounded(app: ASGIApp, *, max_bytes: int = 10, max_buffered_bytes: int = 25, timeout_s: float = 30) -> BoundedBody:
    return BoundedBody(app, max_bytes=max_bytes, max_buffered_bytes=max_buffered_bytes, timeout_s=timeout_s)


async def until(condition: object) -> None:
    """Wait until a function is true."""
    async with asyncio.timeout(10):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0)


def refused(exchange: Exchange, app: App, status: int, code: str) -> None:
    assert (exchange.status, exchange.error["code"]) == (status, code)
    assert exchange.headers["connection"] == "close"
    assert app.messages == []


async def test_a_body_in_one_message_is_not_copied() -> None:
    app, content = App(), b"0123456789"
    exchange = Exchange("POST", "/generate", [(b"content-length", b"10")]).give(content)
    await exchange.call(bounded(app))
    assert exchange.status == 204
    assert app.messages == [{"type": "http.request", "body": content, "more_body": False}]
    assert app.messages[0]["body"] is content


async def test_a_body_in_pieces_becomes_one_message() -> None:
    app, exchange = App(), Exchange("POST", "/generate")
    exchange.give(b"012", more=True).give(b"", more=True).give(b"34567", more=True).give(b"89")
    await exchange.call(bounded(app))
    assert app.messages == [{"type": "http.request", "body": b"0123456789", "more_body": False}]
    assert type(app.messages[0]["body"]) is bytes


async def test_after_the_body_messages_are_the_servers() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([(await receive())["type"] for _ in range(3)])

    await Exchange("POST", "/generate").give(b"a").hang_up().call(bounded(app))
    assert seen == ["http.request", "http.disconnect", "http.disconnect"]


@pytest.mark.parametrize("length", [b"11", b"1" * 30, b"9" * 5000, b"0000000000000000000000011"])
async def test_a_length_over_the_bound_is_refused_unread(length: bytes) -> None:
    app, exchange = App(), Exchange("POST", "/generate", [(b"content-length", length)])
    await exchange.call(bounded(app))
    refused(exchange, app, 413, "body_too_large")
    assert exchange.error["message"] == "the body is longer than 10 bytes"
    assert exchange.received == 0


@pytest.mark.parametrize("length", [None, b"10", b"nonsense", b"-1", b"\xb2"])
@pytest.mark.parametrize("pieces", [[b"0123456789x"], [b"0123456789", b"x"], [b"x"] * 11])
async def test_a_longer_body_than_it_says_is_refused(length: bytes | None, pieces: list[bytes]) -> None:
    app = App()
    exchange = Exchange("POST", "/generate", [] if length is None else [(b"content-length", length)])
    for piece in pieces:
        exchange.give(piece, more=True)
    middleware = bounded(app)
    await exchange.call(middleware)
    refused(exchange, app, 413, "body_too_large")
    assert middleware.buffered_bytes == 0


@pytest.mark.parametrize("pieces", [0, 1, 3])
async def test_a_slow_body_is_refused(pieces: int) -> None:
    app, exchange = App(), Exchange("POST", "/generate")
    for _ in range(pieces):
        exchange.give(b"x", more=True)
    middleware = bounded(app, timeout_s=0.05)
    await exchange.call(middleware)
    refused(exchange, app, 408, "body_too_slow")
    assert exchange.error["message"] == "the body did not arrive within 0.05 s"
    assert middleware.buffered_bytes == 0


async def test_the_time_is_for_the_whole_body() -> None:
    app, exchange = App(), Exchange("POST", "/generate")

    async def drip() -> None:
        while True:
            exchange.give(b"", more=True)
            await asyncio.sleep(0.01)

    dripping = asyncio.create_task(drip())
    await exchange.call(bounded(app, timeout_s=0.2))
    dripping.cancel()
    refused(exchange, app, 408, "body_too_slow")


@pytest.mark.parametrize("pieces", [0, 2])
async def test_a_client_that_goes_while_sending_is_not_answered(pieces: int) -> None:
    app, exchange = App(), Exchange("POST", "/generate")
    for _ in range(pieces):
        exchange.give(b"x", more=True)
    middleware = bounded(app)
    await exchange.hang_up().call(middleware)
    assert (exchange.sent, app.messages, middleware.buffered_bytes) == ([], [], 0)


async def test_all_bodies_together_are_bounded_until_their_requests_end() -> None:
    app = App()
    app.go.clear()
    middleware = bounded(app)
    running = [Exchange("POST", "/generate").give(b"0123456789") for _ in range(2)]
    calls = [asyncio.create_task(exchange.call(middleware)) for exchange in running]
    await until(lambda: len(app.messages) == 2)
    assert middleware.buffered_bytes == 20

    late, other = Exchange("POST", "/generate").give(b"012345"), App()
    await late.call(middleware)
    refused(late, other, 429, "too_much_data")
    assert int(late.headers["retry-after"]) > 0
    assert (middleware.buffered_bytes, len(app.messages)) == (20, 2)

    # One that is still arriving counts as far as it has come.
    arriving = Exchange("POST", "/generate").give(b"01", more=True)
    calls.append(asyncio.create_task(arriving.call(middleware)))
    await until(lambda: middleware.buffered_bytes == 22)
    arriving.give(b"234")
    await until(lambda: len(app.messages) == 3)
    assert middleware.buffered_bytes == 25
    app.go.set()
    await asyncio.gather(*calls)
    assert [exchange.status for exchange in (*running, arriving)] == [204] * 3
    assert middleware.buffered_bytes == 0


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("header", [(b"content-length", b"3"), (b"transfer-encoding", b"chunked")])
async def test_a_request_that_only_reads_has_no_body(method: str, header: tuple[bytes, bytes]) -> None:
    app, exchange = App(), Exchange(method, "/health", [header]).give(b"abc")
    middleware = bounded(app)
    await exchange.call(middleware)
    refused(exchange, app, 413, "body_too_large")
    assert (exchange.error["message"], exchange.received) == (f"a {method} request takes no body", 0)


async def test_masks_and_json_have_bounds_of_their_own() -> None:
    middleware = BoundedBody(App(), max_bytes=10, max_json_bytes=5, max_buffered_bytes=25, timeout_s=30)
    for method, size, status in (("PUT", 10, 204), ("PUT", 11, 413), ("POST", 5, 204), ("POST", 6, 413)):
        exchange = Exchange(method, "/masks/x").give(b"x" * size)
        await exchange.call(middleware)
        assert exchange.status == status
        if status == 413:
            assert exchange.error["message"] == f"the body is longer than {size - 1} bytes"


@pytest.mark.parametrize("path", ["/generate", "/", "/masks", "/nowhere"])
@pytest.mark.parametrize(
    ("query", "bound"),
    [(b"a" * (MAX_QUERY_BYTES + 1), str(MAX_QUERY_BYTES)), (b"a&" * MAX_PARAMETERS, str(MAX_PARAMETERS))],
    ids=["bytes", "parameters"],
)
async def test_a_query_is_bounded_before_it_is_read(path: str, query: bytes, bound: str) -> None:
    app, exchange = App(), Exchange("GET", path, query=query)
    await exchange.call(bounded(app))
    refused(exchange, app, 422, "malformed_query")
    assert bound in exchange.error["message"]
    fits = Exchange("GET", path, query=query[: MAX_QUERY_BYTES // 2 if bound == str(MAX_QUERY_BYTES) else -1]).give()
    await fits.call(bounded(App()))
    assert fits.status == 204


def of_key(exchange: Exchange, name: str) -> Exchange:
    context_of(exchange.scope).key = Key(name, Role.USER)
    return exchange


async def arrives(middleware: BoundedBody, exchange: Exchange) -> asyncio.Task[None]:
    """A call whose body has come as far as it was given."""
    call = asyncio.create_task(exchange.call(middleware))
    for _ in range(5):
        await asyncio.sleep(0)
    return call


async def test_bodies_that_are_still_arriving_make_room() -> None:
    """First the one that has taken the most room for the longest; a new one is not refused for them."""
    app = App()
    middleware = bounded(app)
    old, big, new = (Exchange("POST", "/generate").give(b"x" * size, more=True) for size in (6, 10, 9))
    calls = [await arrives(middleware, exchange) for exchange in (old, big, new)]
    for held in middleware._arriving:
        held.began -= {6: 300, 10: 100, 9: 50}[held.size]  # 1800, 1000 and 450 byte seconds
    assert middleware.buffered_bytes == 25

    late = Exchange("POST", "/generate").give(b"012345")
    await late.call(middleware)
    assert late.status == 204
    assert middleware.buffered_bytes == 19
    await calls[0]
    assert (old.status, old.error["code"]) == (408, "body_too_slow")
    assert "others needed the room" in old.error["message"]

    late = Exchange("POST", "/generate").give(b"0123456789")
    await late.call(middleware)
    assert late.status == 204
    await calls[1]
    assert (big.status, middleware.buffered_bytes) == (408, 9)
    new.give(b"!")
    await calls[2]
    assert (new.status, middleware.buffered_bytes, len(app.messages)) == (204, 0, 3)


async def test_bodies_that_have_arrived_are_not_cut() -> None:
    app = App()
    app.go.clear()
    middleware = bounded(app)
    running = [Exchange("POST", "/generate").give(b"0123456789") for _ in range(2)]
    calls = [await arrives(middleware, exchange) for exchange in running]
    arriving = Exchange("POST", "/generate").give(b"012", more=True)
    calls.append(await arrives(middleware, arriving))
    late = Exchange("POST", "/generate").give(b"0123456789")  # the end of `arriving` would not be enough
    await late.call(middleware)
    assert (late.status, late.error["code"], middleware.buffered_bytes) == (429, "too_much_data", 23)
    app.go.set()
    arriving.give(b"3")
    await asyncio.gather(*calls)
    assert [exchange.status for exchange in (*running, arriving)] == [204] * 3


async def test_a_key_has_half_of_the_room() -> None:
    app = App()
    app.go.clear()
    middleware = bounded(app)  # 12 of 25 bytes
    mine, slow = (of_key(Exchange("POST", "/generate").give(b"x" * 6, more=more), "a") for more in (False, True))
    calls = [await arrives(middleware, exchange) for exchange in (mine, slow)]
    second = of_key(Exchange("POST", "/generate").give(b"01"), "a")
    calls.append(await arrives(middleware, second))
    await calls[1]
    assert (slow.status, slow.error["code"], middleware.buffered_bytes) == (408, "body_too_slow", 8)
    third = of_key(Exchange("POST", "/generate").give(b"012345"), "a")
    await third.call(middleware)
    assert (third.status, third.error["code"]) == (429, "too_much_data")
    assert third.error["message"] == "the server holds 8 bytes of requests with this key; no room for more"
    others = [of_key(Exchange("POST", "/generate").give(b"0123456789"), "b")]
    calls.append(await arrives(middleware, others[0]))
    app.go.set()
    await asyncio.gather(*calls)
    assert [exchange.status for exchange in (mine, second, *others)] == [204] * 3
    assert middleware.buffered_bytes == 0


async def test_the_count_survives_failures_and_cancellation() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("broken")

    middleware = bounded(broken)
    with pytest.raises(RuntimeError, match="broken"):
        await Exchange("POST", "/generate").give(b"0123").call(middleware)
    assert middleware.buffered_bytes == 0

    app = App()
    app.go.clear()
    middleware = bounded(app)
    for exchange in (Exchange("POST").give(b"0123"), Exchange("POST").give(b"0123", more=True)):
        call = asyncio.create_task(exchange.call(middleware))
        await until(lambda: middleware.buffered_bytes == 4)
        call.cancel()
        await asyncio.wait({call})
        assert middleware.buffered_bytes == 0


@pytest.mark.parametrize("path", ["/generate", "/masks/x", "/v1/completions"])
@pytest.mark.parametrize(
    ("codings", "is_plain"),
    [
        ([b"gzip"], False),
        ([b"identity, gzip"], False),
        ([b"identity", b"br"], False),
        ([b"GZIP"], False),
        ([b"\xff"], False),
        ([b"identity"], True),
        ([b" Identity ,"], True),
        ([b""], True),
    ],
)
async def test_compressed_bodies_are_refused(path: str, codings: list[bytes], is_plain: bool) -> None:
    headers = [(b"content-length", b"3"), *((b"content-encoding", coding) for coding in codings)]
    app, exchange = App(), Exchange("PUT", path, headers).give(b"abc")
    await exchange.call(bounded(app))
    if is_plain:
        assert (exchange.status, app.body) == (204, b"abc")
    else:
        refused(exchange, app, 415, "unsupported_encoding")
        assert exchange.headers["accept-encoding"] == "identity"
        assert exchange.received == 0


async def test_a_coding_of_no_body_is_no_fault() -> None:
    app, exchange = App(), Exchange("GET", "/masks", [(b"content-encoding", b"gzip")]).give()
    await exchange.call(bounded(app))
    assert exchange.status == 204


async def test_over_the_service() -> None:
    async def start() -> FakeEngine:
        return FakeEngine()

    app = create_app(start, ApiSettings(max_body_bytes=1024, max_buffered_bytes=1024))  # type: ignore[arg-type]
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://crane") as client:
            for _ in range(3):
                answer = await client.post("/generate", json={"prompt": "hi", "max_tokens": 1})
                assert answer.status_code == 200
            answer = await client.post("/generate", json={"prompt": "x" * 1024})
            assert answer.json()["error"]["code"] == "body_too_large"
            assert (await client.get("/masks")).status_code == 200


async def test_the_rest_of_a_refused_body_is_thrown_away_after_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "_PAUSE_S", 30)
    exchange = Exchange("POST", "/generate").give(b"x" * 11, more=True)
    call = asyncio.create_task(exchange.call(bounded(App())))
    await until(lambda: len(exchange.sent) == 2)
    assert exchange.error["code"] == "body_too_large"
    for more in (True, True, False):
        assert not exchange.is_complete
        exchange.give(b"x" * 1000, more=more)
    await call
    assert exchange.is_complete


async def test_a_body_that_has_arrived_is_refused_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "_PAUSE_S", 30)
    exchange = Exchange("POST", "/generate").give(b"012345", more=True).give(b"6789x")
    await asyncio.wait_for(exchange.call(bounded(App())), 5)
    assert (exchange.status, exchange.is_complete) == (413, True)


async def test_a_refused_body_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "_PAUSE_S", 30)
    exchange = Exchange("POST", "/generate", [(b"content-length", b"11")])
    await exchange.call(bounded(App(), timeout_s=0.1))
    assert (exchange.status, exchange.is_complete) == (413, True)


@asynccontextmanager
async def served(app: ASGIApp) -> AsyncIterator[str]:
    """The address of a server of `app`."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        running = asyncio.create_task(server.serve([listening]))
        await until(lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        await running


async def test_clients_of_a_server_get_the_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "_PAUSE_S", 5)
    app = App()
    middleware = bounded(app, max_bytes=100_000, max_buffered_bytes=2**20)

    async def pieces(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b"x" * 10_000

    async with served(middleware) as url, httpx.AsyncClient(base_url=url, timeout=10) as client:
        assert (await client.post("/generate", content=b"x" * 100_000)).status_code == 204
        assert app.messages.pop()["body"] == b"x" * 100_000
        assert (await client.post("/generate", content=pieces(10))).status_code == 204
        assert app.messages.pop()["body"] == b"x" * 100_000
        for content in (b"x" * 10_000_000, pieces(11), pieces(1000)):
            answer = await client.post("/generate", content=content)
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
            assert answer.headers["connection"] == "close"
    assert (app.messages, middleware.buffered_bytes) == ([], 0)
