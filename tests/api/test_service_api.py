"""What all routes share: which mask a request means, malformed bodies, health, and one shape of errors."""

import logging
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

import crane_serve
from crane_serve.service.api.app import create_app
from tests.api.fake_engine import BROKEN, FINGERPRINT, NEURONS, FakeEngine

KNOWN = ", ".join(sorted(NEURONS))
BODIES = [("/generate", {"prompt": "a", "max_tokens": 1}), ("/score", {"text": ["a"]})]
routes = pytest.mark.parametrize(("route", "body"), BODIES, ids=["generate", "score"])


TYPES = {404: "not_found_error", 503: "service_unavailable_error"}


def error_of(response: httpx.Response) -> dict[str, Any]:
    answer = response.json()
    assert list(answer) == ["error"]
    assert sorted(answer["error"]) == ["code", "message", "param", "type"]
    assert answer["error"].pop("type") == TYPES.get(
        response.status_code, "server_error" if response.status_code >= 500 else "invalid_request_error"
    )
    error: dict[str, Any] = answer["error"]
    return error


@routes
@pytest.mark.parametrize(
    ("query", "mask", "name"),
    [
        ("", None, None),
        ("?mask=none", None, None),
        ("", "none", None),
        ("?mask=none", "none", None),
        ("?mask=zh", None, "attnlrp-zh"),
        ("", "zh", "attnlrp-zh"),
        ("?mask=zh", "zh", "attnlrp-zh"),
        ("?mask=zh", "attnlrp-zh", "attnlrp-zh"),
        ("?mask=lape-zh", None, "lape-zh"),
        ("?mask=zh,vi", None, "attnlrp-vi,attnlrp-zh"),
        ("?mask=zh,vi", "vi,zh", "attnlrp-vi,attnlrp-zh"),
        ("?mask=zh%2Cvi", None, "attnlrp-vi,attnlrp-zh"),
    ],
)
async def test_a_mask_in_query_or_body(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    route: str,
    body: dict[str, Any],
    query: str,
    mask: str | None,
    name: str | None,
) -> None:
    response = await client.post(route + query, json=body if mask is None else {**body, "mask": mask})
    assert response.status_code == 200
    used = response.json()["mask"]
    resolved = engine.library.resolve(name)
    assert engine.calls[0].mask == resolved
    if resolved is None:
        assert used is None
    else:
        content = {"digest": resolved.mask.digest, "neurons": resolved.mask.neurons}
        assert used == {"name": name, **content, "positions": "all"}


@routes
async def test_a_mask_by_digest(
    client: httpx.AsyncClient, engine: FakeEngine, route: str, body: dict[str, Any]
) -> None:
    digest = engine.library.masks["lape-zh"].mask.digest
    response = await client.post(route, params={"mask": digest}, json={**body, "mask": "lape-zh"})
    assert response.json()["mask"]["name"] == "lape-zh"


@routes
@pytest.mark.parametrize(
    ("query", "mask", "status", "code", "message"),
    [
        ("?mask=zh", "vi", 400, "mask_conflict", "the query says mask=zh, the body vi"),
        ("?mask=zh", "none", 400, "mask_conflict", "the query says mask=zh, the body none"),
        ("?mask=none", "zh", 400, "mask_conflict", "the query says mask=none, the body zh"),
        ("?mask=zh", "zh,vi", 400, "mask_conflict", "the query says mask=zh, the body zh,vi"),
        ("?mask=zh&mask=vi", None, 400, "mask_conflict", "'mask' is given twice in the query; join names with commas"),
        ("?mask=zh&mask=zh", None, 400, "mask_conflict", "'mask' is given twice in the query; join names with commas"),
        ("?mask=fr", None, 404, "unknown_mask", f"unknown mask 'fr'; this server has {KNOWN}"),
        ("", "fr", 404, "unknown_mask", f"unknown mask 'fr'; this server has {KNOWN}"),
        ("?mask=zh,fr", None, 404, "unknown_mask", f"unknown mask 'fr'; this server has {KNOWN}"),
        ("?mask=zh", "fr", 404, "unknown_mask", f"unknown mask 'fr'; this server has {KNOWN}"),
        ("?mask=broken", None, 409, "invalid_mask", f"mask 'broken' cannot be used: {BROKEN}"),
        ("?mask=zh,broken", None, 409, "invalid_mask", f"mask 'broken' cannot be used: {BROKEN}"),
        (
            "?mask=",
            None,
            400,
            "malformed_mask",
            "mask '' is malformed; expected a name, or names joined with commas",
        ),
        (
            "",
            "zh,",
            400,
            "malformed_mask",
            "mask 'zh,' is malformed; expected a name, or names joined with commas",
        ),
        (
            "?mask=zh@100,zh@99,zh@98",
            None,
            400,
            "malformed_mask",
            "mask 'zh@100,zh@99,zh@98': scales that may multiply to 9.7e+05, expected at most 10000",
        ),
        ("?mask=none,zh", None, 400, "malformed_mask", "mask 'none,zh' joins 'none' with other masks"),
    ],
)
async def test_a_mask_that_cannot_be_used(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    route: str,
    body: dict[str, Any],
    query: str,
    mask: str | None,
    status: int,
    code: str,
    message: str,
) -> None:
    response = await client.post(route + query, json=body if mask is None else {**body, "mask": mask})
    assert response.status_code == status
    assert error_of(response) == {"code": code, "message": message, "param": "mask"}
    assert engine.calls == []
    assert (await client.post(route, json=body)).status_code == 200


MALFORMED: list[tuple[str, Any, str | None]] = [
    ("/generate", {}, "prompt"),
    ("/generate", {"prompt": None}, "prompt"),
    ("/generate", {"prompt": 1}, "prompt"),
    ("/generate", {"prompt": ""}, "prompt"),
    ("/generate", {"prompt": []}, "prompt"),
    ("/generate", {"prompt": ["a", 1]}, "prompt.1"),
    ("/generate", {"prompt": ["a", ""]}, "prompt.1"),
    ("/generate", {"prompt": ["a"] * 1025}, "prompt"),
    ("/generate", {"prompt": "a", "promt": "b"}, "promt"),
    ("/generate", {"prompt": "a", "max_tokens": "3"}, "max_tokens"),
    ("/generate", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ("/generate", {"prompt": "a", "max_tokens": 2.5}, "max_tokens"),
    ("/generate", {"prompt": "a", "max_tokens": True}, "max_tokens"),
    ("/generate", {"prompt": "a", "max_tokens": 10**30}, "max_tokens"),
    ("/generate", {"prompt": "a", "temperature": -0.1}, "temperature"),
    ("/generate", {"prompt": "a", "temperature": "hot"}, "temperature"),
    ("/generate", {"prompt": "a", "top_p": 0}, "top_p"),
    ("/generate", {"prompt": "a", "top_p": 1.1}, "top_p"),
    ("/generate", {"prompt": "a", "seed": -1}, "seed"),
    ("/generate", {"prompt": "a", "seed": 2**63}, "seed"),
    ("/generate", {"prompt": "a", "stop": ""}, "stop"),
    ("/generate", {"prompt": "a", "stop": ["x", 1]}, "stop.1"),
    ("/generate", {"prompt": "a", "stop": ["x"] * 17}, "stop"),
    ("/generate", {"prompt": "a", "logprobs": -1}, "logprobs"),
    ("/generate", {"prompt": "a", "logprobs": 21}, "logprobs"),
    ("/generate", {"prompt": "a", "logprobs": True}, "logprobs"),
    ("/generate", {"prompt": "a", "stream": "yes"}, "stream"),
    ("/generate", {"prompt": "a", "mask": ["zh"]}, "mask"),
    ("/generate", ["a"], None),
    ("/generate", "a", None),
    ("/generate", None, None),
    ("/score", {}, None),
    ("/score", {"text": None}, None),
    ("/score", {"text": "a"}, "text"),
    ("/score", {"text": []}, "text"),
    ("/score", {"text": ["a", 1]}, "text.1"),
    ("/score", {"text": ["a"] * 1025}, "text"),
    ("/score", {"text": ["a"], "context": "b"}, None),
    ("/score", {"text": ["a"], "continuations": ["b"]}, None),
    ("/score", {"text": ["a"], "context": "b", "continuations": ["c"]}, None),
    ("/score", {"context": "b"}, None),
    ("/score", {"continuations": ["b"]}, None),
    ("/score", {"context": "a", "continuations": []}, "continuations"),
    ("/score", {"context": "a", "continuations": ["b", ""]}, "continuations.1"),
    ("/score", {"context": ["a"], "continuations": ["b"]}, "context"),
    ("/score", {"context": "a", "continuations": ["b"] * 1025}, "continuations"),
    ("/score", {"text": ["a"], "max_tokens": 1}, "max_tokens"),
]


@pytest.mark.parametrize(("route", "body", "param"), MALFORMED, ids=lambda value: str(value)[:60])
async def test_malformed_bodies(
    client: httpx.AsyncClient, engine: FakeEngine, route: str, body: Any, param: str | None
) -> None:
    response = await client.post(route, json=body)
    assert response.status_code == 422
    error = error_of(response)
    assert (error["code"], error["param"]) == ("malformed_body", param)
    if param is not None:
        assert error["message"].startswith(f"{param}: ")
    assert "constrained" not in error["message"]
    assert engine.calls == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt: List should have at least 1 item"),
        (["a"] * 1025, "prompt: List should have at most 1024 items"),
        ("", "prompt: String should have at least 1 character"),
        (["a", 1], "prompt.1: Input should be a valid string"),
    ],
    ids=["none", "too many", "empty", "number"],
)
async def test_of_several_forms_the_nearest_is_explained(client: httpx.AsyncClient, prompt: Any, message: str) -> None:
    assert error_of(await client.post("/generate", json={"prompt": prompt}))["message"].startswith(message)


@pytest.mark.parametrize("route", ["/generate", "/score"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"not json",
        b"\xff\xfe\xfd",
        b'{"prompt": "\xff", "text": ["\xff"]}',
        b'{"prompt": "\\ud800"}',
        b'{"text": ["\\ud800"]}',
        b'{"context": "\\ud800", "continuations": ["a"]}',
        b'{"prompt": "a", "text": ["a"], "\\ud800": 1}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda content: repr(content[:40]),
)
async def test_bodies_that_are_no_text(
    client: httpx.AsyncClient, engine: FakeEngine, route: str, content: bytes
) -> None:
    response = await client.post(route, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 422
    assert error_of(response)["code"] == "malformed_body"
    assert engine.calls == []


async def test_a_forgotten_content_type_is_explained(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/x-www-form-urlencoded"}
    response = await client.post("/generate", content=b'{"prompt": "a"}', headers=headers)
    assert response.status_code == 422
    assert "Content-Type: application/json" in error_of(response)["message"]


async def test_masks_are_listed(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = (await client.get("/masks")).json()
    assert [mask["name"] for mask in answer["masks"]] == sorted(NEURONS)
    assert answer["masks"][0] == {
        "name": "attnlrp-en",
        "digest": engine.library.masks["attnlrp-en"].mask.digest,
        "neurons": 2,
        "language": "en",
        "method": "attnlrp",
        "budget": 0.25,
    }
    assert answer["invalid"] == [{"name": "broken", "reason": BROKEN}]
    assert answer["default_method"] == "attnlrp"


@pytest.mark.parametrize("name", ["attnlrp-zh", "zh"])
async def test_one_mask(client: httpx.AsyncClient, engine: FakeEngine, name: str) -> None:
    answer = (await client.get(f"/masks/{name}")).json()
    assert answer["name"] == "attnlrp-zh"
    assert answer["neurons_per_layer"] == [2, 0]
    assert answer["parameters"] == {"seed": 1}
    assert answer["fingerprint"] == FINGERPRINT.model_dump(mode="json")
    assert answer["created_by"] == f"crane-serve {crane_serve.__version__}"
    assert (await client.get(f"/masks/{answer['digest']}")).json() == answer


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [
        ("fr", 404, "unknown_mask"),
        ("none", 404, "unknown_mask"),
        ("zh,vi", 404, "unknown_mask"),
        ("%FF", 404, "unknown_mask"),
        ("broken", 409, "invalid_mask"),
    ],
)
async def test_a_mask_that_is_not_there(client: httpx.AsyncClient, name: str, status: int, code: str) -> None:
    response = await client.get(f"/masks/{name}")
    assert response.status_code == status
    assert error_of(response)["code"] == code


async def test_health_and_readiness(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    ready = await client.get("/ready")
    assert ready.status_code == 200
    assert ready.json() == {
        "status": "ready",
        "model": "tiny",
        "version": crane_serve.__version__,
        "fingerprint": FINGERPRINT.model_dump(mode="json"),
        "max_model_tokens": 512,
        "kv_cache_tokens": 4096,
        "prompt_start": [0],
        "text_start": 0,
    }
    engine.is_dead = True
    dead = await client.get("/ready")
    assert dead.status_code == 503
    assert error_of(dead) == {"code": "engine_dead", "message": "the engine has died", "param": None}
    assert (await client.get("/health")).json() == {"status": "ok"}


async def test_unexpected_errors_are_logged_and_not_shown(
    client: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.error = RuntimeError("/home/someone/secret")
    with caplog.at_level(logging.ERROR, logger="crane.api"):
        response = await client.post("/score", json={"text": ["a"]})
    assert response.status_code == 500
    message = "unexpected error; see the server's log"
    assert error_of(response) == {"code": "internal_error", "message": message, "param": None}
    assert "/home/someone/secret" in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("POST", "/masks/a/b", 404, "not_found"),
        ("GET", "/generate", 405, "method_not_allowed"),
        ("PATCH", "/masks/zh", 405, "method_not_allowed"),
    ],
)
async def test_unknown_routes_and_methods(
    client: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    response = await client.request(method, path)
    assert response.status_code == status
    assert error_of(response)["code"] == code
    assert ("allow" in response.headers) == (status == 405)


async def test_openapi_documents_the_one_shape_of_errors(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    assert set(document["paths"]) == {
        "/generate",
        "/score",
        "/languages",
        "/evaluation",
        "/masks",
        "/masks/{name}",
        "/masks/{name}/neurons",
        "/masks/{name}/file",
        "/health",
        "/ready",
        "/metrics",
    }
    assert {"ErrorAnswer", "ErrorBody"} <= set(document["components"]["schemas"])
    assert "HTTPValidationError" not in document["components"]["schemas"]
    answer = document["paths"]["/generate"]["post"]["responses"]["200"]
    assert set(answer["content"]) == {"application/json", "text/event-stream"}
    for path in ("/generate", "/score"):
        responses = document["paths"][path]["post"]["responses"]
        assert {"400", "404", "409", "422", "503"} <= set(responses)
        for status in ("400", "404", "409", "422", "503"):
            schema = responses[status]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorAnswer"}


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/docs/oauth2-redirect"])
async def test_no_page_runs_scripts_from_elsewhere(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.get(path)).status_code == 404


async def test_the_engine_lives_as_long_as_the_application(engine: FakeEngine) -> None:
    started = []

    async def start() -> FakeEngine:
        started.append(engine)
        return engine

    app: FastAPI = create_app(start)  # type: ignore[arg-type]
    assert started == []
    async with app.router.lifespan_context(app):
        assert started == [engine]
        assert not engine.stopped
    assert engine.stopped


@pytest.mark.parametrize("route", ["/generate", "/score"])
@pytest.mark.parametrize("query", ["?masks=zh", "?Mask=zh", "?mask=zh&temperature=0"])
async def test_a_query_parameter_that_is_not_the_mask_is_refused(
    client: httpx.AsyncClient, engine: FakeEngine, route: str, query: str
) -> None:
    response = await client.post(f"{route}{query}", json={"prompt": "x"} if route == "/generate" else {"text": ["x"]})
    assert response.status_code == 422
    assert response.json()["error"]["param"] in query
    assert engine.calls == []
