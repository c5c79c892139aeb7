"""The HTTP layer: what it reads for a client that it does not know yet is bounded."""

import asyncio
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from crane_serve.service.http_protocol import MAX_HEAD_BYTES, MAX_HEADERS, MAX_PIPELINED, HttpProtocol

READ = 256_000  # bytes that uvloop reads at once
HEAD = b"POST /generate HTTP/1.1\r\nhost: a\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
GET = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"


class Transport(asyncio.Transport):
    """A client that takes everything."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Connection(HttpProtocol):
    """A connection to an application that keeps bodies; pieces: how many of them Python has seen."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.pieces = 0
        config = uvicorn.Config(
            self.application, interface="asgi3", ws="none", lifespan="off", log_config=None, access_log=False
        )
        super().__init__(config=config, server_state=ServerState(), app_state={})
        self.connection_made(Transport())

    async def application(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    def on_body(self, body: bytes) -> None:
        self.pieces += 1
        super().on_body(body)

    async def send(self, data: bytes, size: int = READ) -> str:
        """The status lines of the answers to what a client sends in reads of so many bytes."""
        for start in range(0, len(data), size):
            if not self.transport.is_closing():
                self.data_received(data[start : start + size])
                await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)
        written = self.transport.written
        return " ".join(line.split()[1].decode() for line in written.split(b"\r\n") if line.startswith(b"HTTP/"))


HONEST = {
    "nothing special": (GET, [b""]),
    "a long head": (HEAD + b"a: " + b"x" * (MAX_HEAD_BYTES - 100) + b"\r\ncontent-length: 2\r\n\r\nab", [b"ab"]),
    "many headers": (HEAD + b"a: b\r\n" * (MAX_HEADERS - 2) + b"content-length: 2\r\n\r\nab", [b"ab"]),
    "a long body": (HEAD + b"content-length: 1000000\r\n\r\n" + b"\r\n" * 500_000, [b"\r\n" * 500_000]),
    "chunks": (CHUNKED + b"400\r\n%b\r\n" % (b"x" * 1024) * 500 + b"0\r\n\r\n", [b"x" * 512_000]),
    "small chunks": (CHUNKED + b"4\r\nabcd\r\n" * 1000 + b"0\r\n\r\n", [b"abcd" * 1000]),
    "trailers": (CHUNKED + b"1\r\na\r\n0\r\nx: y\r\n\r\n" + GET, [b"a", b""]),
    "several requests": (GET * MAX_PIPELINED, [b""] * MAX_PIPELINED),
}
HOSTILE = {
    "no HTTP": b"hello\r\n\r\n",
    "a head that is too long": HEAD + b"a: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n",
    "an address that is too long": b"GET /" + b"x" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nhost: a\r\n\r\n",
    "a head without end": HEAD + b"a: " + b"x" * 2_000_000,
    "an address without end": b"GET /" + b"x" * 2_000_000,
    "too many headers": HEAD + b"a: b\r\n" * (MAX_HEADERS + 1) + b"\r\n",
    "headers without end": HEAD + b"a: b\r\n" * 300_000,
    "chunks of one byte": CHUNKED + b"1\r\na\r\n" * 300_000,
    "a description of a chunk without end": CHUNKED + b"1;" + b"x" * 2_000_000,
    "a trailer without end": CHUNKED + b"1\r\na\r\n0\r\nx: " + b"y" * 2_000_000,
    "trailers without end": CHUNKED + b"1\r\na\r\n0\r\n" + b"x: y\r\n" * 300_000,
    "requests without end": GET * 10_000,
}


@pytest.mark.parametrize("size", [READ, 1000])
@pytest.mark.parametrize(("data", "bodies"), HONEST.values(), ids=HONEST)
async def test_what_clients_send(data: bytes, bodies: list[bytes], size: int) -> None:
    connection = Connection()
    assert set((await connection.send(data, size)).split()) == {"204"}
    assert connection.bodies == bodies


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
async def test_what_costs_too_much_is_refused(data: bytes) -> None:
    connection = Connection()
    assert "400" in await connection.send(data)
    assert connection.transport.is_closing()
    assert connection.pieces <= 6000
    assert len(connection.bodies) <= MAX_PIPELINED + 1


async def test_a_slow_head_has_its_bound_too() -> None:
    connection = Connection()
    sent = 0
    while not connection.transport.is_closing():
        connection.data_received(HEAD if not sent else b"x: y\r\n" if sent % 2 else b"a: b\r\n")
        sent += 1
    assert sent <= MAX_HEADERS + 2  # a header is known when the next one begins


async def test_the_time_between_requests_does_not_count() -> None:
    connection = Connection()
    for _ in range(20):
        await connection.send(HEAD + b"a: " + b"x" * 10_000 + b"\r\ncontent-length: 1\r\n\r\na")
    assert connection.bodies == [b"a"] * 20
    assert not connection.transport.is_closing()
