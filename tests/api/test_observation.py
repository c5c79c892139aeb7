"""Observation and metrics: ids, the log line of a request, what is counted, and errors that nobody answered."""

import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crane_serve.service.api.app import create_app
from crane_serve.service.api.context import context_of
from crane_serve.service.api.errors import ApiError
from crane_serve.service.api.gate import Gate
from crane_serve.service.api.keys import Key, Role
from crane_serve.service.api.metrics import MAX_MASKS, Metrics
from crane_serve.service.api.observation import Observation
from tests.api.fake_engine import FakeEngine

SECRETS = ("sk-a-secret-key", "a secret prompt", "hidden-in-the-query")


@pytest.fixture
def gate() -> Gate:
    return Gate(8, 8)


@pytest.fixture
def metrics(gate: Gate) -> Metrics:
    return Metrics(gate, 8)


def samples(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    """Values of a sample by those of its labels, in the order of the labels' names."""
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
        if sample.name == name
    }


def scope_of(path: str = "/x", headers: tuple[tuple[bytes, bytes], ...] = (), **more: Any) -> Scope:
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": list(headers),
        "client": ("10.0.0.1", 5),
        **more,
    }


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


async def call(app: ASGIApp, scope: Scope) -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


def entries(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    names = ("request_id", "method", "route", "path", "status", "mask", "key", "client", "sequences", "levelname")
    lines = [record for record in caplog.records if record.name == "crane.access"]
    assert all(record.getMessage() == "request" and 0 <= record.seconds < 60 for record in lines)  # type: ignore[attr-defined]
    return [{name: getattr(record, name) for name in names} for record in lines]


@pytest.fixture(autouse=True)
def everything_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="crane")


class TestRequestId:
    @pytest.mark.parametrize("given", ["abc", "A-Z_0.9", "x" * 64])
    async def test_a_safe_one_is_kept(self, metrics: Metrics, given: str) -> None:
        seen: list[Any] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append((scope["headers"], context_of(scope).request_id))
            await answer(scope, receive, send)

        scope = scope_of(headers=((b"a", b"b"), (b"x-request-id", given.encode())))
        start, _ = await call(Observation(app, metrics), scope)
        assert seen == [([(b"a", b"b"), (b"x-request-id", given.encode())], given)]
        assert start["headers"] == [(b"x-request-id", given.encode())]

    @pytest.mark.parametrize(
        "given",
        [
            (),
            (b"",),
            (b"x" * 65,),
            (b"a b",),
            (b"a\r\nX-Evil: 1",),
            (b"abc\n",),
            (b"\xff\xfe",),
            ("ü".encode(),),
            (b"a", b"a"),
            (b"a", b"b"),
        ],
        ids=repr,
    )
    async def test_any_other_is_replaced(self, metrics: Metrics, given: tuple[bytes, ...]) -> None:
        seen: list[list[bytes]] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append([value for name, value in scope["headers"] if name == b"x-request-id"])
            await answer(scope, receive, send)

        scope = scope_of(headers=tuple((b"x-request-id", value) for value in given))
        start, _ = await call(Observation(app, metrics), scope)
        ((request_id,),) = seen
        assert len(request_id) == 32
        assert int(request_id, 16) >= 0
        assert start["headers"] == [(b"x-request-id", request_id)]

    async def test_the_applications_own_is_replaced(self, metrics: Metrics) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", b"other")]})
            await send({"type": "http.response.body", "body": b""})

        start, _ = await call(Observation(app, metrics), scope_of(headers=((b"x-request-id", b"mine"),)))
        assert start["headers"] == [(b"x-request-id", b"mine")]


class TestOneRequest:
    async def test_the_log_line(self, metrics: Metrics, caplog: pytest.LogCaptureFixture, engine: FakeEngine) -> None:
        mask = engine.library.resolve("zh")

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            context = context_of(scope)
            context.key, context.mask, context.sequences = Key("someone", Role.USER), mask, 3
            scope["crane_route"] = "/v1/things/{id}"
            await answer(scope, receive, send)
            context.sequences = 0

        scope = scope_of("/v1/things/\r\n" + "y" * 300, ((b"x-request-id", b"me"),), query_string=b"a=b")
        start, _ = await call(Observation(app, metrics), scope)
        assert mask is not None
        assert dict(start["headers"]) == {
            b"x-request-id": b"me",
            b"x-crane-mask": b"attnlrp-zh",
            b"x-crane-mask-digest": mask.mask.digest.encode(),
        }
        assert entries(caplog) == [
            {
                "request_id": "me",
                "method": "POST",
                "route": "/v1/things/{id}",
                "path": "/v1/things/\r\n" + "y" * 187,
                "status": 200,
                "mask": "attnlrp-zh",
                "key": "someone",
                "client": "10.0.0.1",
                "sequences": 3,
                "levelname": "INFO",
            }
        ]
        assert samples(metrics, "crane_requests_total") == {("attnlrp-zh", "/v1/things/{id}", "200"): 1}
        assert samples(metrics, "crane_request_seconds_count") == {("attnlrp-zh", "/v1/things/{id}"): 1}
        assert samples(metrics, "crane_requests_in_flight") == {(): 0}

    @pytest.mark.parametrize("sent", [0, 1, 2])
    async def test_a_client_that_left(self, metrics: Metrics, caplog: pytest.LogCaptureFixture, sent: int) -> None:
        messages: list[Message] = [
            {"type": "http.response.start", "status": 200, "headers": []},
            {"type": "http.response.body", "body": b"a", "more_body": True},
        ]

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            for message in messages[:sent]:
                await send(message)

        assert len(await call(Observation(app, metrics), scope_of())) == sent
        assert [entry["status"] for entry in entries(caplog)] == [499]
        assert samples(metrics, "crane_requests_total") == {("none", "unmatched", "499"): 1}

    async def test_an_unanswered_error(self, metrics: Metrics, caplog: pytest.LogCaptureFixture) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            raise RuntimeError("secret detail")

        start, body = await call(Observation(app, metrics), scope_of())
        assert start["status"] == 500
        assert b"x-request-id" in dict(start["headers"])
        assert json.loads(body["body"])["error"]["code"] == "internal_error"
        assert b"secret" not in body["body"]
        assert [record.exc_info is not None for record in caplog.records if record.name == "crane.api"] == [True]
        assert [entry["status"] for entry in entries(caplog)] == [500]

    async def test_a_foreseen_error_is_answered_and_not_logged(
        self, metrics: Metrics, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            raise ApiError(418, "teapot", "short and stout")

        start, _ = await call(Observation(app, metrics), scope_of())
        assert start["status"] == 418
        assert [record for record in caplog.records if record.name != "crane.access"] == []

    @pytest.mark.parametrize(
        ("error", "status"), [(RuntimeError("broken"), 500), (ApiError(504, "timed_out", "too long"), 504)]
    )
    async def test_an_error_in_the_middle_of_an_answer_is_raised(
        self, metrics: Metrics, caplog: pytest.LogCaptureFixture, error: Exception, status: int
    ) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            raise error

        with pytest.raises(type(error), match=str(error)):
            await call(Observation(app, metrics), scope_of())
        assert [entry["status"] for entry in entries(caplog)] == [status]
        assert samples(metrics, "crane_requests_in_flight") == {(): 0}

    async def test_an_error_after_the_answer_is_logged_once(
        self, metrics: Metrics, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await answer(scope, receive, send)
            raise RuntimeError("in the background")

        assert len(await call(Observation(app, metrics), scope_of())) == 2
        assert [record.exc_info is not None for record in caplog.records if record.name == "crane.api"] == [True]
        assert [entry["status"] for entry in entries(caplog)] == [200]

    async def test_a_request_under_way_is_counted(self, metrics: Metrics) -> None:
        seen: list[float] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(samples(metrics, "crane_requests_in_flight")[()])
            await answer(scope, receive, send)

        await call(Observation(app, metrics), scope_of())
        assert seen == [1]

    async def test_what_is_no_request_passes(self, metrics: Metrics) -> None:
        seen: list[Scope] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(scope)

        await call(Observation(app, metrics), {"type": "lifespan"})
        assert seen == [{"type": "lifespan"}]
        assert samples(metrics, "crane_requests_total") == {}


class TestMetrics:
    def test_labels_are_bounded(self, metrics: Metrics) -> None:
        for name in ("a,b", "a@0.5", None, *(f"m{index}" for index in range(MAX_MASKS + 5)), "m0"):
            metrics.on_tokens(name, 2, 1)
        tokens = samples(metrics, "crane_tokens_total")
        assert len(tokens) == 2 * (MAX_MASKS + 3)
        assert {name: tokens["prompt", name] for name in ("none", "combined", "other", "m0", "m1")} == {
            "none": 2,
            "combined": 4,
            "other": 10,
            "m0": 4,
            "m1": 2,
        }
        assert tokens["completion", "other"] == 5

    async def test_gauges_are_live(self, metrics: Metrics, gate: Gate, engine: FakeEngine) -> None:
        def gauges() -> list[float]:
            names = ("sequences", "sequences_limit", "mask_rows", "mask_rows_used", "masks", "ready")
            return [samples(metrics, f"crane_{name}")[()] for name in names]

        assert gauges() == [0, 8, 0, 0, 0, 0]
        metrics.watch(engine)  # type: ignore[arg-type]
        assert gauges() == [0, 8, engine.mask_rows, 0, 4, 1]
        context = context_of(scope_of())
        gate.admit(context, 3)
        engine.library.discard("lape-zh")
        async with engine.row(engine.library.resolve("zh")):
            assert gauges() == [3, 8, engine.mask_rows, 1, 3, 1]
        gate.leave(context)
        gate.closed = True
        assert gauges() == [0, 8, engine.mask_rows, 0, 3, 0]
        gate.closed = False
        engine.is_dead = True
        assert gauges()[-1] == 0


class TestService:
    """The routes of the service behind Observation."""

    @pytest_asyncio.fixture
    async def client(self, engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
        async def start() -> FakeEngine:
            return engine

        app: FastAPI = create_app(start)  # type: ignore[arg-type]
        async with app.router.lifespan_context(app):
            self.gate: Gate = app.state.gate
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://crane") as client:
                yield client

    @pytest.mark.parametrize(
        ("method", "path", "route", "status", "level"),
        [
            ("GET", "/masks/zh", "/masks/{name}", 200, "INFO"),
            ("GET", "/masks/" + "n" * 500, "/masks/{name}", 404, "INFO"),
            ("GET", "/masks", "/masks", 200, "INFO"),
            ("GET", "/nothing/here", "unmatched", 404, "INFO"),
            ("GET", "/generate", "/generate", 405, "INFO"),
            ("GET", "/health", "/health", 200, "DEBUG"),
            ("GET", "/ready", "/ready", 200, "DEBUG"),
            ("GET", "/metrics", "/metrics", 200, "DEBUG"),
        ],
    )
    async def test_routes(
        self,
        client: httpx.AsyncClient,
        caplog: pytest.LogCaptureFixture,
        method: str,
        path: str,
        route: str,
        status: int,
        level: str,
    ) -> None:
        response = await client.request(method, path)
        assert response.status_code == status
        (entry,) = entries(caplog)
        assert (entry["route"], entry["status"], entry["levelname"]) == (route, status, level)
        assert entry["path"] == path[:200]
        assert "x-crane-mask" not in response.headers

    @pytest.mark.parametrize(("mask", "label"), [("zh", "attnlrp-zh"), ("zh,vi", "combined"), ("zh@0.5", "combined")])
    async def test_the_mask_of_a_request(self, client: httpx.AsyncClient, mask: str, label: str) -> None:
        response = await client.post("/generate", params={"mask": mask}, json={"prompt": "a", "max_tokens": 2})
        used = response.json()["mask"]
        assert response.headers["x-crane-mask"] == used["name"]
        assert response.headers["x-crane-mask-digest"] == used["digest"]
        text = (await client.get("/metrics")).text
        assert f'crane_requests_total{{mask="{label}",route="/generate",status="200"}} 1.0' in text
        assert f'crane_tokens_total{{kind="completion",mask="{label}"}} 2.0' in text

    async def test_unmasked_requests_name_no_mask(self, client: httpx.AsyncClient) -> None:
        response = await client.post("/generate", params={"mask": "none"}, json={"prompt": "a", "max_tokens": 1})
        assert response.status_code == 200
        assert not [name for name in response.headers if name.startswith("x-crane")]

    async def test_the_text_is_one_valid_exposition(self, client: httpx.AsyncClient) -> None:
        await client.post("/generate", params={"mask": "zh"}, json={"prompt": "a", "max_tokens": 1})
        response = await client.get("/metrics")
        assert response.headers["content-type"] == "text/plain; version=0.0.4"
        names = [family.name for family in text_string_to_metric_families(response.text)]
        assert len(names) == len(set(names))
        assert {"crane_requests", "crane_request_seconds", "crane_tokens", "vllm:num_requests_running"} <= set(names)

    async def test_what_is_secret_is_in_no_log(
        self, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        key, prompt, query = SECRETS
        headers = {"Authorization": f"Bearer {key}", "x-api-key": key}
        body = {"prompt": prompt, "max_tokens": 1}
        for params in ({}, {"mask": query}, {"key": query}):
            await client.post("/generate", params=params, json=body, headers=headers)
        assert [entry["status"] for entry in entries(caplog)] == [200, 404, 422]
        logged = [str(vars(record)) for record in caplog.records if record.name.startswith("crane")]
        assert not [secret for secret in SECRETS if any(secret in line for line in logged)]

    async def test_an_unexpected_error_is_logged_once_and_answered(
        self, client: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
    ) -> None:
        engine.error = RuntimeError("broken")
        response = await client.post("/score", json={"text": ["a"]})
        assert response.status_code == 500
        assert "x-request-id" in response.headers
        assert len([record for record in caplog.records if record.exc_info]) == 1
        assert [entry["status"] for entry in entries(caplog)] == [500]

    @pytest.mark.parametrize(
        ("state", "code"),
        [
            (lambda gate, engine: setattr(gate, "closed", True), "shutting_down"),
            (lambda gate, engine: setattr(engine, "is_dead", True), "engine_dead"),
        ],
        ids=["closed", "dead"],
    )
    async def test_readiness_ends_while_the_process_answers(
        self, client: httpx.AsyncClient, engine: FakeEngine, state: Callable[[Gate, FakeEngine], None], code: str
    ) -> None:
        assert (await client.get("/ready")).status_code == 200
        state(self.gate, engine)
        response = await client.get("/ready")
        assert (response.status_code, response.json()["error"]["code"]) == (503, code)
        assert "retry-after" in response.headers
        assert (await client.get("/health")).status_code == 200
        assert "crane_ready 0.0" in (await client.get("/metrics")).text
