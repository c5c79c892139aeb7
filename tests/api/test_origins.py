"""Web pages that have a visitor's browser ask the server: by a name of their own that leads here, or from their own
origin."""

import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from crane_serve.service.api.origins import ANY, Origins
from tests.api.exchange import Exchange
from tests.api.serve_fake import FakeServer

Headers = list[tuple[bytes, bytes]]
LOCAL = ("localhost", "127.0.0.1", "::1")
KEY = "a-key-of-some-length"


async def answered(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
    else:
        await send({"type": "websocket.accept"})


async def ask(
    headers: Headers,
    method: str = "POST",
    *,
    hosts: tuple[str, ...] = LOCAL,
    pages: tuple[str, ...] = (),
    scheme: str = "http",
    kind: str = "http",
) -> Exchange:
    exchange = Exchange(method, "/masks/x", headers, kind=kind)
    exchange.scope["scheme"] = scheme
    await exchange.call(Origins(answered, hosts=hosts, pages=pages))
    return exchange


def headers(host: str | bytes, *origins: str, site: str | None = None) -> Headers:
    found = [(b"host", host if isinstance(host, bytes) else host.encode())]
    found += [(b"origin", origin.encode()) for origin in origins]
    return found if site is None else [*found, (b"sec-fetch-site", site.encode())]


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE", "PATCH", "get"])
class TestNames:
    @pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8", "127.0.0.1:9", "[::1]", "[::1]:8000", "localhost:"])
    async def test_own(self, method: str, host: str) -> None:
        assert (await ask(headers(host), method)).status == 204

    @pytest.mark.parametrize(
        "host",
        [
            "evil.example",
            "evil.example:8000",
            "localhost.evil.example",
            "evil.localhost",
            "localhost.",
            "localhost@evil.example",
            "evil.example@localhost",
            "evil.example#localhost",
            "localhost/x",
            "localhost:8000:1",
            "localhost:x",
            "127.0.0.2",
            "127.1",
            "::1",
            "[::1",
            "[::2]",
            "",
            " ",
            "localhost,evil.example",
            b"loc\xe4lhost",
            b"localhost\x00",
        ],
    )
    async def test_foreign(self, method: str, host: str | bytes) -> None:
        exchange = await ask([*headers(host), (b"content-length", b"5")], method)
        assert (exchange.status, exchange.error["code"], exchange.received) == (421, "unknown_host", 0)
        assert exchange.headers["connection"] == "close"
        assert (await ask(headers(host), method, hosts=())).status == 204
        assert (await ask(headers(host), method, hosts=(*LOCAL, ANY))).status == 204

    async def test_none_or_two(self, method: str) -> None:
        for given in ([], headers("localhost") * 2, headers("localhost") + headers("evil.example")):
            assert (await ask(given, method)).status == 421

    async def test_named(self, method: str) -> None:
        for host in ("Crane.example", "[2001:db8::1]"):
            assert (await ask(headers(host.lower() + ":8000"), method, hosts=(*LOCAL, host))).status == 204

    @pytest.mark.parametrize("every", ["0.0.0.0", "::", ""])
    async def test_every_address_and_no_name(self, method: str, every: str) -> None:
        hosts = (*LOCAL, every)
        for host in ("192.0.2.7:8000", "[2001:db8::1]", "localhost"):
            assert (await ask(headers(host), method, hosts=hosts)).status == 204
        for host in ("evil.example", "192.0.2.7.evil.example", "0x7f.1"):
            assert (await ask(headers(host), method, hosts=hosts)).status == 421


HOST = "localhost:8000"
OWN = f"http://{HOST}"
CHANGES = ["POST", "PUT", "DELETE", "PATCH", "post", "PROPFIND"]
FOREIGN = [
    headers(HOST, "http://evil.example"),
    headers(HOST, "null"),
    headers(HOST, ""),
    headers(HOST, "http://localhost"),
    headers(HOST, "http://localhost:3000"),
    headers(HOST, "http://127.0.0.1:8000"),
    headers(HOST, f"{OWN}.evil.example"),
    headers(HOST, f"chrome-extension://{HOST}"),
    headers(HOST, OWN, "http://evil.example"),
    headers(HOST, f"{OWN}, http://evil.example"),
    headers(HOST, site="cross-site"),
    headers(HOST, site="same-site"),
    headers(HOST, site="whatever"),
    headers(HOST, OWN, site="cross-site"),
    headers(HOST, "http://evil.example", site="same-origin"),
]


class TestPages:
    @pytest.mark.parametrize("method", CHANGES)
    @pytest.mark.parametrize(
        "given",
        [
            headers(HOST),  # no browser
            headers(HOST, OWN),
            headers(HOST, OWN.upper(), site="same-origin"),
            headers(HOST, f"https://{HOST}"),  # behind what ends TLS
            headers(HOST, site="none"),
            headers(HOST, site="same-origin"),
        ],
    )
    async def test_own(self, method: str, given: Headers) -> None:
        assert (await ask(given, method)).status == 204

    @pytest.mark.parametrize("method", CHANGES)
    @pytest.mark.parametrize("given", FOREIGN, ids=str)
    async def test_foreign(self, method: str, given: Headers) -> None:
        exchange = await ask([*given, (b"content-length", b"5"), (b"content-type", b"text/plain")], method)
        assert (exchange.status, exchange.error["code"], exchange.received) == (403, "cross_origin", 0)
        assert exchange.headers["connection"] == "close"
        assert (await ask(given, method, pages=(ANY,))).status == 204

    @pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
    @pytest.mark.parametrize("given", FOREIGN, ids=str)
    async def test_foreign_pages_may_ask_what_they_cannot_read(self, method: str, given: Headers) -> None:
        assert (await ask(given, method)).status == 204

    async def test_pages_that_the_operator_names(self) -> None:
        pages = ("https://a.example", "https://B.example:1")
        for origin in ("https://a.example", "https://b.example:1"):
            assert (await ask(headers(HOST, origin, site="cross-site"), pages=pages)).status == 204
        for given in (
            headers(HOST, "http://a.example"),
            headers(HOST, "https://a.example", "null"),
            headers(HOST, site="cross-site"),
        ):
            assert (await ask(given, pages=pages)).status == 403

    async def test_a_page_without_tls_is_another_origin_than_a_server_with_it(self) -> None:
        assert (await ask(headers("localhost", "http://localhost"), scheme="https")).status == 403
        assert (await ask(headers("localhost", "https://localhost"), scheme="https")).status == 204

    async def test_websockets(self) -> None:
        for given in (headers("evil.example"), headers(HOST, "http://evil.example")):
            exchange = Exchange("GET", "/", given, kind="websocket")
            del exchange.scope["method"]
            await exchange.call(Origins(answered, hosts=LOCAL, pages=()))
            assert exchange.sent[0]["type"] == "websocket.close"


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[FakeServer]]:
    started: list[FakeServer] = []
    yield started
    for server in started:
        server.kill()


def test_a_server_without_keys(servers: list[FakeServer], tmp_path: Path) -> None:
    servers.append(FakeServer(tmp_path))
    port = servers[0].port
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        evil = f"evil.example:{port}"
        own = {"host": evil, "origin": f"http://{evil}"}
        for path in ("/masks", "/", "/ready", "/health", "/openapi.json", "/v1/models"):
            assert client.get(path, headers=own).status_code == 421
        assert client.delete("/masks/attnlrp-zh", headers=own).status_code == 421
        body = b'{"prompt": "a", "max_tokens": 1}'
        for origin in ("http://evil.example", "null"):
            foreign = {"origin": origin, "content-type": "text/plain"}
            for path in ("/generate", "/score", "/v1/completions", "/languages", "/nowhere"):
                assert client.post(path, content=body, headers=foreign).status_code == 403
            assert client.delete("/masks/attnlrp-zh", headers=foreign).status_code == 403
            assert client.put("/masks/x", content=b"", headers=foreign).status_code == 403
        assert client.get("/masks/attnlrp-zh").status_code == 200
        page = {"origin": f"http://localhost:{port}", "host": f"localhost:{port}", "sec-fetch-site": "same-origin"}
        answer = client.post("/generate", json={"prompt": "a", "max_tokens": 1}, headers=page)
        assert answer.status_code == 200
    servers[0].signal(signal.SIGTERM)
    assert servers[0].exit_code() == 0
    refused = [line["status"] for line in servers[0].lines if line.get("status") in (403, 421)]
    assert sorted(set(refused)) == [403, 421]


def test_a_server_with_keys_is_asked_by_any_name(servers: list[FakeServer], tmp_path: Path) -> None:
    servers.append(FakeServer(tmp_path, admin_key=KEY))
    with httpx.Client(base_url=f"http://127.0.0.1:{servers[0].port}", headers={"x-api-key": KEY}) as client:
        foreign = {"host": "crane.example", "origin": "http://evil.example"}
        assert client.get("/masks", headers=foreign).status_code == 200
        assert client.delete("/masks/attnlrp-zh", headers=foreign).status_code == 204
        assert client.delete("/masks/attnlrp-en", headers={**foreign, "x-api-key": "none"}).status_code == 401


def test_names_given_to_a_server_with_keys(servers: list[FakeServer], tmp_path: Path) -> None:
    servers.append(FakeServer(tmp_path, admin_key=KEY, allowed_hosts="crane.example"))
    with httpx.Client(base_url=f"http://127.0.0.1:{servers[0].port}", headers={"x-api-key": KEY}) as client:
        for host, status in (("crane.example", 200), ("127.0.0.1", 200), ("evil.example", 421)):
            assert client.get("/ready", headers={"host": host}).status_code == status
