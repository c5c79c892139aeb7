"""The server process: how it drains, dies and fails to start, and what many or shapeless clients can do to it."""

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.serve_fake import FakeServer

Start = Callable[..., FakeServer]
_DEADLINE_S = 30


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    servers: list[FakeServer] = []

    def start(**settings: Any) -> FakeServer:
        servers.append(FakeServer(tmp_path, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@asynccontextmanager
async def client_of(server: FakeServer) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{server.port}", timeout=_DEADLINE_S, limits=limits
    ) as client:
        yield client


def asked(prompt: str, *, stream: bool = False) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": 3, "stream": stream, "temperature": 0.0}


async def generate(client: httpx.AsyncClient, prompt: str, *, stream: bool = False) -> httpx.Response:
    return await client.post("/generate", json=asked(prompt, stream=stream))


async def under_way(client: httpx.AsyncClient, sequences: int) -> None:
    """Wait until the server runs this many sequences."""
    async with asyncio.timeout(_DEADLINE_S):
        while f"crane_sequences {sequences}.0\n" not in (await client.get("/metrics")).text:
            await asyncio.sleep(0.02)


async def ready_says(client: httpx.AsyncClient, code: str) -> None:
    async with asyncio.timeout(_DEADLINE_S):
        while (response := await client.get("/ready")).status_code == 200:
            await asyncio.sleep(0.02)
    assert (response.status_code, response.json()["error"]["code"]) == (503, code)


def events(response: httpx.Response) -> list[str]:
    return [event.removeprefix("data: ") for event in response.text.strip().split("\n\n")]


def assert_ended_with(response: httpx.Response, code: str) -> None:
    """An error answer, or a stream whose last event is one."""
    if response.headers["content-type"].startswith("text/event-stream"):
        error = json.loads(events(response)[-1])["error"]
    else:
        assert response.status_code == 503
        error = response.json()["error"]
    assert (error["code"], error["type"]) == (code, "service_unavailable_error")


class TestDrain:
    async def test_what_is_under_way_ends_and_nothing_new_is_admitted(self, start: Start) -> None:
        server = start()
        async with client_of(server) as client:
            tasks = [asyncio.create_task(generate(client, "wait", stream=bool(index % 2))) for index in range(20)]
            await under_way(client, 20)
            server.signal(signal.SIGTERM)
            await ready_says(client, "shutting_down")
            refused = await generate(client, "a")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert refused.headers["connection"] == "close"
            assert "retry-after" in refused.headers
            assert (await client.get("/health")).status_code == 200
            assert not any(task.done() for task in tasks)
            server.signal(signal.SIGUSR1)
            responses = await asyncio.gather(*tasks)
        for index, response in enumerate(responses):
            assert response.status_code == 200
            if index % 2:
                assert events(response)[-1] == "[DONE]"
                assert len(events(response)) == 5
            else:
                assert response.json()["outputs"][0]["text"] == "abc"
        assert server.exit_code() == 0
        assert "engine stopped" in server.text
        assert "Traceback" not in server.text
        assert sorted(line["status"] for line in server.lines if line.get("route") == "/generate") == [200] * 20 + [503]

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    async def test_an_idle_server_stops_at_once(self, start: Start, number: signal.Signals) -> None:
        server = start(drain_timeout_s=300)
        async with client_of(server) as client:
            assert (await generate(client, "a")).status_code == 200
            server.signal(number)
            assert server.exit_code() == 0
        assert "engine stopped" in server.text

    @pytest.mark.parametrize("hurry", [False, True], ids=["the time is over", "a second signal"])
    async def test_what_does_not_end_is_told_so(self, start: Start, hurry: bool) -> None:
        server = start(drain_timeout_s=300 if hurry else 0.3)
        async with client_of(server) as client:
            tasks = [asyncio.create_task(generate(client, "hang", stream=bool(index % 2))) for index in range(6)]
            await under_way(client, 6)
            server.signal(signal.SIGTERM)
            if hurry:
                await ready_says(client, "shutting_down")
                server.signal(signal.SIGTERM)
            responses = await asyncio.gather(*tasks)
        for response in responses:
            assert_ended_with(response, "shutting_down")
        assert server.exit_code() == 0
        assert "engine stopped" in server.text
        assert "Traceback" not in server.text


class TestEngineDeath:
    async def test_requests_are_told_and_the_process_fails(self, start: Start) -> None:
        server = start()
        async with client_of(server) as client:
            prompts = ["hang", "notice"] * 4
            tasks = [
                asyncio.create_task(generate(client, prompt, stream=index >= 4)) for index, prompt in enumerate(prompts)
            ]
            await under_way(client, 8)
            server.signal(signal.SIGUSR2)
            await ready_says(client, "engine_dead")
            assert_ended_with(await generate(client, "a"), "engine_dead")
            for response in await asyncio.gather(*tasks):
                assert_ended_with(response, "engine_dead")
            assert_ended_with(await generate(client, "a"), "engine_dead")
        assert server.exit_code() == 1
        assert [line["message"] for line in server.lines if line["level"] == "ERROR"] == ["the engine has died"]
        assert "engine stopped" in server.text

    async def test_while_it_drains(self, start: Start) -> None:
        server = start(drain_timeout_s=300)
        async with client_of(server) as client:
            task = asyncio.create_task(generate(client, "hang"))
            await under_way(client, 1)
            server.signal(signal.SIGTERM)
            await ready_says(client, "shutting_down")
            server.signal(signal.SIGUSR2)
            assert_ended_with(await task, "engine_dead")
        assert server.exit_code() == 1


class TestStart:
    def errors(self, server: FakeServer) -> list[str]:
        assert "Traceback" not in server.text
        return [line["message"] for line in server.lines if line["level"] == "ERROR"]

    def test_an_engine_that_does_not_start(self, start: Start) -> None:
        server = start(fail="no\nmemory")
        assert server.exit_code() == 1
        assert self.errors(server) == ["the server failed: RuntimeError: no\nmemory"]
        assert "listening" not in server.text

    def test_a_port_that_is_taken(self, start: Start) -> None:
        with closing(socket.create_server(("127.0.0.1", 0))) as taken:
            server = start(port=taken.getsockname()[1], never=True)
            assert server.exit_code() == 1
        (error,) = self.errors(server)
        assert "Address already in use" in error
        assert "starting" not in server.text  # it is known before the engine starts

    def test_a_certificate_that_is_missing(self, start: Start, tmp_path: Path) -> None:
        server = start(ssl_certfile=str(tmp_path / "missing.pem"))
        assert server.exit_code() == 1
        assert len(self.errors(server)) == 1

    def test_a_signal_gives_it_up(self, start: Start) -> None:
        server = start(never=True)
        server.wait_for("starting")
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0
        assert self.errors(server) == []


async def connect(server: FakeServer, data: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(data)
    return reader, writer


async def rest(reader: asyncio.StreamReader) -> bytes:
    """What comes until the server closes."""
    async with asyncio.timeout(_DEADLINE_S):
        try:
            return await reader.read()
        except ConnectionError:
            return b""


def status_of(answer: bytes) -> int:
    head, _, _ = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split(b" ", 2)[1])


GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


class TestConnections:
    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
        server = FakeServer(tmp_path_factory.mktemp("server"), max_connections=400)
        yield server
        server.kill()

    @pytest.fixture(autouse=True)
    async def still_serves(self, server: FakeServer) -> AsyncIterator[None]:
        yield
        async with client_of(server) as client:
            assert (await generate(client, "a")).json()["outputs"][0]["text"] == "abc"

    async def test_many_slow_heads_do_not_keep_others_out(self, server: FakeServer) -> None:
        connections = await asyncio.gather(*(connect(server, GET) for _ in range(300)))
        async with client_of(server) as client:
            assert (await client.get("/ready")).status_code == 200
        for _, writer in connections:
            writer.write(b"Connection: close\r\n\r\n")
        answers = await asyncio.gather(*(rest(reader) for reader, _ in connections))
        assert {status_of(answer) for answer in answers} == {200}
        for _, writer in connections:
            writer.close()

    @pytest.mark.parametrize("end", [b"", b"\r\n\r\n"], ids=["endless", "whole"])
    @pytest.mark.parametrize(
        "part", [b"X: " + b"y" * 400_000, b"X: y\r\n" * 40_000], ids=["one long header", "many headers"]
    )
    async def test_a_long_head_is_refused(self, server: FakeServer, part: bytes, end: bytes) -> None:
        reader, writer = await connect(server)
        writer.write(GET + part + end)
        answer = await rest(reader)  # the connection may be reset with the answer in it
        assert not answer or status_of(answer) == 400
        writer.close()

    async def test_a_head_of_64_kb_is_taken(self, server: FakeServer) -> None:
        reader, writer = await connect(server)
        writer.write(GET + b"X: " + b"y" * 65_000 + b"\r\nConnection: close\r\n\r\n")
        assert (await rest(reader)).startswith(b"HTTP/1.1 200 OK")
        writer.close()

    @pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00", b"hello\r\n\r\n", b"GET /\xff HTTP/9.9\r\n\r\n"])
    async def test_what_is_no_http_is_refused(self, server: FakeServer, data: bytes) -> None:
        reader, writer = await connect(server)
        writer.write(data)
        assert status_of(await rest(reader)) == 400
        writer.close()

    async def test_an_offer_to_upgrade_is_not_taken(self, server: FakeServer) -> None:
        reader, writer = await connect(server)
        writer.write(GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        assert b"200 OK" in await reader.readuntil(b"\r\n")
        writer.close()

    async def test_requests_behind_each_other_are_answered_in_order(self, server: FakeServer) -> None:
        reader, writer = await connect(server)
        paths = [b"/health", b"/nothing", b"/health"]
        requests = [b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n" for path in paths]
        requests[-1] += b"Connection: close\r\n"
        writer.write(b"\r\n".join(requests) + b"\r\n")
        answer = await rest(reader)
        assert [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]] == [200, 404, 200]
        writer.close()

    async def test_a_connection_too_many(self, server: FakeServer) -> None:
        others = await asyncio.gather(*(connect(server) for _ in range(400)))
        reader, writer = await connect(server)
        writer.write(GET + b"\r\n")
        assert status_of(await rest(reader)) == 503
        for _, other in others:
            other.close()
        await asyncio.gather(*(other.wait_closed() for _, other in others))
        writer.close()
