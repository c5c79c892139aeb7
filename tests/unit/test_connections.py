"""Long reads of a connection are read a piece at a time."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from uvicorn import Config
from uvicorn.server import ServerState

from crane_serve.service.connections import Connection

CHUNKS = 20_000
HEAD = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"


class Socket(asyncio.Transport):
    """A transport that keeps what is written, and whether it may be read."""

    def __init__(self) -> None:
        super().__init__()
        self.reading = True
        self.closing = False
        self.written = b""

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def write(self, data: Any) -> None:
        self.written += bytes(data)


class App:
    """An ASGI application that keeps the bodies that it gets."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


def connected(app: App) -> tuple[Connection, Socket]:
    connection = Connection(Config(app, lifespan="off", log_config=None), ServerState(), {})
    socket = Socket()
    connection.connection_made(socket)
    return connection, socket


async def rounds(until: Callable[[], bool]) -> int:
    """How many rounds of the loop pass until something holds."""
    for count in range(10_000):
        if until():
            return count
        await asyncio.sleep(0)
    raise AssertionError("it never did")


async def test_a_long_read_leaves_the_loop_to_others_and_is_read_whole():
    app = App()
    connection, socket = connected(app)
    connection.data_received(HEAD + b"1\r\na\r\n" * CHUNKS + b"0\r\n\r\n")
    assert not socket.reading
    assert connection.cycle is None  # nothing has been read yet
    assert await rounds(lambda: bool(app.bodies)) >= 2 * CHUNKS / 256
    assert app.bodies == [b"a" * CHUNKS]
    assert socket.reading
    assert b"200 OK" in socket.written


async def test_connections_take_turns():
    app = App()
    (one, _), (other, _) = connected(app), connected(app)
    one.data_received(HEAD + b"1\r\na\r\n" * 10 * CHUNKS + b"0\r\n\r\n")
    other.data_received(HEAD + b"1\r\nb\r\n" * CHUNKS + b"0\r\n\r\n")
    await rounds(lambda: bool(app.bodies))
    assert app.bodies == [b"b" * CHUNKS]
    await rounds(lambda: len(app.bodies) == 2)
    assert app.bodies[1] == b"a" * 10 * CHUNKS


@pytest.mark.parametrize("size", [0, 1, 1000, 65_536, 65_537, 3_000_000])
async def test_a_body_of_any_size_is_what_was_sent(size):
    app = App()
    connection, socket = connected(app)
    body = (b"0123456\n89" * (size // 10 + 1))[:size]
    data = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % size + body
    for start in range(0, len(data), 100_000):
        connection.data_received(data[start : start + 100_000])
    await rounds(lambda: bool(app.bodies))
    assert app.bodies == [body]
    assert socket.reading


async def test_what_arrives_meanwhile_is_read_after():
    app = App()
    connection, _ = connected(app)
    connection.data_received(HEAD + b"1\r\na\r\n" * 1000)
    connection.data_received(b"1\r\nb\r\n0\r\n\r\n")
    await rounds(lambda: bool(app.bodies))
    assert app.bodies == [b"a" * 1000 + b"b"]


@pytest.mark.parametrize("lost", [True, False])
async def test_a_connection_that_is_gone_is_not_read_on(lost):
    app = App()
    connection, socket = connected(app)
    connection.data_received(HEAD + b"1\r\na\r\n" * CHUNKS)
    other, _ = connected(app)
    if lost:
        connection.connection_lost(ConnectionResetError())
    else:
        socket.closing = True
    other.data_received(HEAD + b"1\r\nb\r\n" * 1000 + b"0\r\n\r\n")
    await rounds(lambda: bool(app.bodies))
    assert app.bodies == [b"b" * 1000]
    assert connection.cycle is None


async def test_a_body_that_nobody_takes_stays_paused():
    async def hangs(scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        await asyncio.sleep(60)

    connection, socket = connected(hangs)
    connection.data_received(HEAD + b"1000\r\n" + b"a" * 4096 + b"\r\n" + b"10000\r\n" + b"a" * 65_536 + b"\r\n")
    connection.data_received(b"1\r\na\r\n" * 1000)
    for _ in range(100):
        await asyncio.sleep(0)
    assert not socket.reading
    for task in connection.tasks:
        task.cancel()
