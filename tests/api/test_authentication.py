"""Who is let in, with which key, to which path; and that a refusal costs and shows nothing."""

import logging
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr
from starlette.types import Message, Receive, Scope, Send

from crane_serve.service.api.app import create_app
from crane_serve.service.api.authentication import Authentication
from crane_serve.service.api.context import context_of
from crane_serve.service.api.keys import Key, KeyRing, Role
from crane_serve.service.settings import ApiSettings
from tests.api.exchange import Exchange
from tests.api.fake_engine import FakeEngine

USER, ADMIN = "user-" + "u" * 20, "admin-" + "a" * 20
Headers = list[tuple[bytes, bytes]]


@pytest.fixture
def keys(tmp_path: Path) -> KeyRing:
    file = tmp_path / "keys"
    file.write_text(f"ursula user {USER}\nada admin {ADMIN}\n")
    file.chmod(0o600)
    ring = KeyRing.load(file)
    assert ring is not None
    return ring


class App:
    """Answers 204, and keeps whose requests have reached it."""

    def __init__(self) -> None:
        self.seen: list[Key | None] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.append(context_of(scope).key)
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def ask(
    keys: KeyRing | None, method: str, path: str, headers: Headers, query: bytes = b""
) -> tuple[Exchange, App]:
    app, exchange = App(), Exchange(method, path, headers, query=query)
    await exchange.call(Authentication(app, keys))
    return exchange, app


def bearer(token: str) -> Headers:
    return [(b"authorization", b"Bearer " + token.encode())]


URSULA, ADA = Key("ursula", Role.USER), Key("ada", Role.ADMIN)


@pytest.mark.parametrize(
    "headers",
    [
        bearer(USER),
        [(b"authorization", b"bearer " + USER.encode())],
        [(b"authorization", b"  BEARER   " + USER.encode() + b"  ")],
        [(b"x-api-key", USER.encode())],
        [(b"x-api-key", b" " + USER.encode()), *bearer(USER)],
    ],
)
async def test_a_key_lets_in(keys: KeyRing, headers: Headers) -> None:
    exchange, app = await ask(keys, "POST", "/generate", headers)
    assert (exchange.status, app.seen) == (204, [URSULA])
    assert exchange.received == 0


MISSING, UNKNOWN = "missing_api_key", "unknown_api_key"


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ([], MISSING),
        ([(b"authorization", b"")], MISSING),
        ([(b"authorization", b"Bearer")], MISSING),
        ([(b"authorization", b"Bearer ")], MISSING),
        ([(b"authorization", b"Basic " + USER.encode())], MISSING),
        ([(b"authorization", USER.encode())], MISSING),
        ([(b"authorization", b"Basic x"), (b"x-api-key", USER.encode())], MISSING),
        ([(b"x-api-key", b" ")], MISSING),
        ([(b"cookie", b"key=" + USER.encode())], MISSING),
        (bearer(USER[:-1]), UNKNOWN),
        (bearer(USER + " " + USER), UNKNOWN),
        (bearer("x" * 100_000), UNKNOWN),
        (bearer(USER.upper()), UNKNOWN),
        (bearer(USER + "\r\nx-evil: 1"), UNKNOWN),
        ([(b"authorization", b"Bearer \xff\xfe\x00" + USER.encode())], UNKNOWN),
        ([(b"authorization", b"Bearer " + "schlüssel".encode() * 4)], UNKNOWN),
        ([*bearer(USER), (b"x-api-key", ADMIN.encode())], UNKNOWN),
        ([*bearer(USER), (b"x-api-key", b"")], UNKNOWN),
        ([*bearer(USER), *bearer(USER)], UNKNOWN),
        ([*bearer(USER), *bearer(ADMIN)], UNKNOWN),
        ([(b"x-api-key", USER.encode())] * 2, UNKNOWN),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/masks", "/metrics", "/v1/models", "/nowhere"])
async def test_no_good_key_is_a_401(
    keys: KeyRing, headers: Headers, code: str, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        exchange, app = await ask(keys, "GET", path, headers)
    assert (exchange.status, exchange.error["code"], app.seen) == (401, code, [])
    assert exchange.error["type"] == "authentication_error"
    assert exchange.headers["www-authenticate"] == "Bearer"
    assert "connection" not in exchange.headers
    answer = b"".join(name + value for name, value in exchange.headers.raw) + exchange.body
    for secret in (USER, ADMIN, "x-evil", "schl"):
        assert secret.encode() not in answer
        assert secret not in caplog.text
    assert all(b"\r" not in value and b"\n" not in value for _, value in exchange.headers.raw)
    assert exchange.received == 0


async def test_a_key_in_the_query_is_not_read(keys: KeyRing) -> None:
    query = f"api_key={USER}&key={USER}&x-api-key={USER}&authorization=Bearer%20{USER}".encode()
    exchange, _ = await ask(keys, "GET", "/masks", [], query)
    assert (exchange.status, exchange.error["code"]) == (401, MISSING)


@pytest.mark.parametrize(
    ("headers", "closes"),
    [
        ([(b"content-length", b"5")], True),
        ([(b"transfer-encoding", b"chunked")], True),
        ([(b"content-length", b"0")], False),
        ([], False),
    ],
)
@pytest.mark.parametrize("status", [401, 403])
async def test_a_refusal_leaves_the_body_unread(keys: KeyRing, headers: Headers, closes: bool, status: int) -> None:
    exchange, _ = await ask(keys, "PUT", "/masks/x", [*headers, *(bearer(USER) if status == 403 else [])])
    assert (exchange.status, exchange.received) == (status, 0)
    assert exchange.headers.getlist("connection") == ["close"] * closes


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_health_is_public(keys: KeyRing, method: str, path: str) -> None:
    exchange, app = await ask(keys, method, path, [])
    assert (exchange.status, app.seen) == (204, [None])
    exchange, app = await ask(keys, method, path, bearer("nonsense-nonsense"))
    assert (exchange.status, app.seen) == (204, [None])


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/health"),
        ("OPTIONS", "/health"),
        ("GET", "/health/"),
        ("GET", "//health"),
        ("GET", "/./health"),
        ("GET", "/masks/../health"),
        ("GET", "/health/../masks"),
        ("GET", "/health\n"),
        ("GET", "/health;x"),
        ("GET", "/Health"),
        ("GET", "/health\0"),
        ("GET", "/ready/x"),
        ("GET", ""),
        ("GET", "/"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
    ],
)
async def test_nothing_else_is_public(keys: KeyRing, method: str, path: str) -> None:
    exchange, app = await ask(keys, method, path, [])
    assert (exchange.status, app.seen) == (401, [])
    exchange, app = await ask(keys, method, path, bearer(USER))
    assert (exchange.status, app.seen) == (204, [URSULA])


PATHS = [
    "/masks",
    "/masks/x",
    "/masks/",
    "//masks/x",
    "/masks//x",
    "/./masks/x",
    "/generate/../masks/x",
    "/masks/../masks/x",
    "/masks\n",
    "/masks/x/y",
    "/masks;v=1/x",
    "/Masks/x",
    "/%6dasks/masks",
    "/root/masks/x",
    "masks/x",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["PUT", "DELETE", "POST", "PATCH", "PROPPATCH", "put"])
async def test_changes_of_masks_need_an_admin(keys: KeyRing, method: str, path: str) -> None:
    exchange, app = await ask(keys, method, path, bearer(USER))
    assert (exchange.status, exchange.error["code"], app.seen) == (403, "admin_key_required", [])
    assert exchange.error["type"] == "permission_error"
    exchange, app = await ask(keys, method, path, bearer(ADMIN))
    assert (exchange.status, app.seen) == (204, [ADA])
    assert (await ask(keys, method, path, []))[0].status == 401


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
async def test_masks_can_be_read_with_any_key(keys: KeyRing, method: str, path: str) -> None:
    for token, key in ((USER, URSULA), (ADMIN, ADA)):
        exchange, app = await ask(keys, method, path, bearer(token))
        assert (exchange.status, app.seen) == (204, [key])


@pytest.mark.parametrize("path", ["/health", "/generate", "/masks/x"])
async def test_without_keys_everything_passes(path: str) -> None:
    exchange, app = await ask(None, "PUT", path, bearer("whatever"))
    assert (exchange.status, app.seen) == (204, [None])


async def test_websockets_need_a_key_too(keys: KeyRing) -> None:
    for headers, path in (([], "/v1/realtime"), (bearer("nonsense"), "/v1/realtime"), ([], "/health")):
        app, exchange = App(), Exchange("GET", path, headers, kind="websocket")
        del exchange.scope["method"]
        await exchange.call(Authentication(app, keys))
        assert app.seen == []
        assert [(message["type"], message["code"]) for message in exchange.sent] == [("websocket.close", 1008)]
    app, exchange = App(), Exchange("GET", "/masks", bearer(USER), kind="websocket")
    del exchange.scope["method"]
    await exchange.call(Authentication(app, keys))
    assert app.seen == [URSULA]


async def test_the_lifespan_passes(keys: KeyRing) -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    async def nothing(*message: Message) -> Message:
        raise AssertionError

    await Authentication(app, keys)({"type": "lifespan"}, nothing, nothing)
    assert seen == ["lifespan"]


async def test_every_route_of_the_service_is_behind_it() -> None:
    async def start() -> FakeEngine:
        return FakeEngine()

    settings = ApiSettings(user_key=SecretStr(USER), admin_key=SecretStr(ADMIN))
    app = create_app(start, settings)  # type: ignore[arg-type]
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://crane") as client:
            open_paths = set()
            for path in app.openapi()["paths"]:
                for method in app.openapi()["paths"][path]:
                    if (await client.request(method, path.replace("{name}", "zh"))).status_code != 401:
                        open_paths.add((method, path))
            assert open_paths == {("get", "/health"), ("get", "/ready")}
            answer = await client.get("/masks", headers={"x-api-key": USER})
            assert answer.status_code == 200
            # Percent-encoded paths are decoded before anything here sees them, once.
            for path in ("/%6dasks/zh", "/x/%2e%2e/masks/zh", "/masks%2Fzh", "//masks/zh"):
                url = httpx.URL("http://crane").copy_with(raw_path=path.encode())
                refused = await client.put(url, headers={"x-api-key": USER}, content=b"x")
                assert refused.status_code == 403, path
