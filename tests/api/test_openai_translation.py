"""The OpenAI-compatible routes over a recording application in vLLM's place: what reaches it, and what never does."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crane_serve.common.masks import MaskTableFull, Positions, ResolvedMask, StoredMask
from crane_serve.engine.openai_app import answering_as, public_name
from crane_serve.service.api.context import RequestContext, context_of
from crane_serve.service.api.errors import install_error_handlers
from crane_serve.service.api.gate import Gate
from crane_serve.service.api.openai import ROUTES, OpenAIRoutes
from tests.api.fake_engine import FakeEngine, library

COMPLETION = {"model": "tiny", "prompt": "Hi", "max_tokens": 3}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
TOKENS = {"token_ids": [0, 5], "sampling_params": {"max_tokens": 1}}


class Recorder:
    """In vLLM's place: keeps what it gets, and how the service stands meanwhile."""

    def __init__(self, engine: FakeEngine, gate: Gate) -> None:
        self._engine, self._gate = engine, gate
        self.answer: ASGIApp = JSONResponse({"answered": "by vLLM"})
        self.scopes: list[Scope] = []
        self.contents: list[bytes] = []
        self.rows: list[int] = []
        self.sequences: list[int] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        assert (message["type"], message["more_body"]) == ("http.request", False)
        self.scopes.append(scope)
        self.contents.append(message["body"])
        self.rows.append(self._engine.mask_rows_used)
        self.sequences.append(self._gate.sequences)
        await self.answer(scope, receive, send)

    @property
    def body(self) -> Any:
        (content,) = self.contents
        return json.loads(content)

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        (scope,) = self.scopes
        return list(scope["headers"])


class Front:
    """What middleware makes in front of the routes: a context, and the end of its admission."""

    def __init__(self, app: FastAPI, gate: Gate) -> None:
        self._app, self._gate = app, gate
        self.scope: Scope = {}
        self.context = RequestContext("-")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self.context = scope, context_of(scope)
        try:
            await self._app(scope, receive, send)
        finally:
            self._gate.leave(self.context)


@pytest.fixture
def gate() -> Gate:
    return Gate(max_sequences=100, max_requests_per_key=10)


@pytest.fixture
def vllm(engine: FakeEngine, gate: Gate) -> Recorder:
    recorder = Recorder(engine, gate)
    engine.openai = recorder
    return recorder


@pytest.fixture
def front(engine: FakeEngine, gate: Gate) -> Front:
    app = FastAPI()
    app.state.engine, app.state.gate = engine, gate
    install_error_handlers(app)
    app.router.default = OpenAIRoutes()
    return Front(app, gate)


@pytest_asyncio.fixture
async def http(front: Front, vllm: Recorder) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(front, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://crane") as client:
        yield client


def carried(expression: str, positions: Positions = Positions.ALL) -> dict[str, str]:
    resolved = library().resolve(expression)
    assert resolved is not None
    return {"crane_mask": resolved.wire, "crane_positions": str(positions)}


def code_of(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"], error["param"]


WAYS: list[tuple[str, dict[str, Any]]] = [
    ("?mask=zh", {}),
    ("", {"mask": "zh"}),
    ("", {"model": "tiny:zh"}),
    ("", {"vllm_xargs": {"crane_mask": "attnlrp-zh"}}),
    ("?mask=attnlrp-zh", {"mask": "zh", "model": "tiny:zh", "vllm_xargs": {"crane_mask": "zh"}}),
]


@pytest.mark.parametrize("positions", [None, "all", "prompt", "generated", "prompt[-4:]+generated[:16]+until=2,3"])
@pytest.mark.parametrize(("query", "named"), WAYS)
async def test_each_way_to_name_a_mask_is_the_same_request_to_vllm(
    http: httpx.AsyncClient, vllm: Recorder, front: Front, query: str, named: dict, positions: str | None
) -> None:
    asked, meant = {} if positions is None else {"positions": positions}, Positions.parse(positions or "all")
    answer = await http.post(f"/v1/completions{query}", json={**COMPLETION, **named, **asked})
    assert (answer.status_code, answer.json()) == (200, {"answered": "by vLLM"})
    assert vllm.body == {**COMPLETION, "vllm_xargs": carried("zh", meant)}
    assert (b"content-length", str(len(vllm.contents[0])).encode()) in vllm.headers
    assert [name for name, _ in vllm.headers].count(b"content-length") == 1
    assert vllm.scopes[0]["query_string"] == b""
    assert front.context.mask is not None
    assert front.context.mask.name == "attnlrp-zh"
    assert front.context.mask.positions == meant
    assert front.scope["crane_route"] == "/v1/completions"


@pytest.mark.parametrize(
    ("query", "body"),
    [
        ("?mask=zh&positions=prompt", {}),
        ("?mask=zh", {"positions": "prompt"}),
        ("?positions=prompt", {"mask": "zh"}),
        ("?positions=prompt", {"model": "tiny:zh", "positions": "prompt"}),
        ("", {"mask": "zh", "vllm_xargs": {"crane_positions": "prompt"}}),
        ("?positions=prompt", {"positions": "prompt", "vllm_xargs": {"crane_mask": "zh", "crane_positions": "prompt"}}),
    ],
)
async def test_each_place_for_positions(http: httpx.AsyncClient, vllm: Recorder, query: str, body: dict) -> None:
    assert (await http.post(f"/v1/completions{query}", json={**COMPLETION, **body})).status_code == 200
    assert vllm.body["vllm_xargs"] == carried("zh", Positions.PROMPT)


@pytest.mark.parametrize(
    ("query", "body"),
    [
        ("?mask=zh&positions=prompt[-4:]+generated[:16]+until=7,3", {}),  # a plus of a query is a space
        ("?mask=zh&positions=prompt%5B-4%3A%5D%2Bgenerated%5B%3A16%5D%2Buntil%3D3%2C7", {}),
        ("?mask=zh", {"positions": "prompt[-4:]+generated[0:16]+until=3,7,3"}),
        (
            "?positions=prompt[-4:]+generated[:16]+until=3,7",
            {"mask": "zh", "positions": "prompt[-4:] generated[:16] until=7,3"},
        ),
        ("", {"vllm_xargs": {"crane_mask": "zh", "crane_positions": "prompt[-4:]+generated[:16]+until=7,3"}}),
    ],
)
async def test_each_place_for_windows_gives_vllm_their_canonical_form(
    http: httpx.AsyncClient, vllm: Recorder, query: str, body: dict
) -> None:
    assert (await http.post(f"/v1/completions{query}", json={**COMPLETION, **body})).status_code == 200
    assert vllm.body["vllm_xargs"]["crane_positions"] == "prompt[-4:]+generated[:16]+until=3,7"
    assert vllm.body["vllm_xargs"] == carried("zh", Positions.parse("prompt[-4:]+generated[:16]+until=3,7"))


@pytest.mark.parametrize("expression", ["zh,vi", "zh@0.5", "lape-zh"])
async def test_expressions_travel_by_content(http: httpx.AsyncClient, vllm: Recorder, expression: str) -> None:
    await http.post("/v1/completions", json={**COMPLETION, "model": f"tiny:{expression}"})
    assert vllm.body == {**COMPLETION, "vllm_xargs": carried(expression)}


async def test_other_arguments_are_kept(http: httpx.AsyncClient, vllm: Recorder) -> None:
    body = {**COMPLETION, "prompt": "Hi 港", "top_p": 0.1, "vllm_xargs": {"session_id": "s"}, "mask": "zh"}
    await http.post("/v1/completions?api-version=1", content=json.dumps(body))
    del body["mask"]
    assert vllm.body == {**body, "vllm_xargs": {"session_id": "s", **carried("zh")}}
    assert vllm.scopes[0]["query_string"] == b"api-version=1"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions/batch", {"model": "tiny", "messages": [CHAT["messages"]] * 2}),
        ("/v1/responses", {"model": "tiny", "input": "Hi"}),
        ("/v1/messages", {**CHAT, "max_tokens": 3}),
        ("/v1/completions/render", COMPLETION),
        ("/v1/chat/completions/render", CHAT),
        ("/v1/responses/render", {"model": "tiny", "input": "Hi"}),
        ("/v1/messages/render", {**CHAT, "max_tokens": 3}),
    ],
)
async def test_each_route_that_runs_under_a_mask(
    http: httpx.AsyncClient, vllm: Recorder, path: str, body: dict
) -> None:
    assert (await http.post(f"{path}?mask=zh", json=body)).status_code == 200
    assert vllm.body == {**body, "vllm_xargs": carried("zh")}
    assert vllm.scopes[0]["path"] == path
    assert vllm.rows == [0 if path.endswith("/render") else 1], "what runs has a row"


@pytest.mark.parametrize("sampling", [{"max_tokens": 1}, {"extra_args": {"crane_mask": "zh"}}, {"extra_args": None}])
async def test_tokens_in_tokens_out_carries_the_mask_in_its_sampling_parameters(
    http: httpx.AsyncClient, vllm: Recorder, sampling: dict
) -> None:
    await http.post("/inference/v1/generate?mask=zh", json={**TOKENS, "sampling_params": sampling})
    assert vllm.body == {**TOKENS, "sampling_params": {**sampling, "extra_args": carried("zh")}}


@pytest.mark.parametrize(
    ("query", "body"),
    [
        ("?mask=none", {}),
        ("", {"mask": "none"}),
        ("", {"mask": None}),
        ("", {"model": "tiny:none"}),
        ("", {"vllm_xargs": {"crane_mask": "none"}}),
        ("?mask=none&positions=prompt", {"mask": "none"}),
    ],
)
async def test_asking_for_no_mask_runs_unmasked(
    http: httpx.AsyncClient, vllm: Recorder, front: Front, query: str, body: dict
) -> None:
    assert (await http.post(f"/v1/completions{query}", json={**COMPLETION, **body})).status_code == 200
    left = vllm.body
    assert left.pop("vllm_xargs", {}) == {}
    assert left == COMPLETION
    assert (front.context.mask, vllm.rows) == (None, [0])


async def test_what_names_no_mask_reaches_vllm_byte_for_byte(http: httpx.AsyncClient, vllm: Recorder) -> None:
    content = b'{ "model":"tiny",\n "prompt": "\\u6e2f", "temperature": 1e-1, "user": NaN }'
    assert (await http.post("/v1/completions?beta=true", content=content)).status_code == 200
    assert vllm.contents == [content]
    assert vllm.scopes[0]["query_string"] == b"beta=true"
    assert (b"content-length", str(len(content)).encode()) in vllm.headers


@pytest.mark.parametrize("model", ["other", "other:zh", "Tiny:zh", "tiny", "", None, 5])
async def test_another_models_name_is_for_vllm_to_refuse(
    http: httpx.AsyncClient, vllm: Recorder, front: Front, model: Any
) -> None:
    await http.post("/v1/completions", json={**COMPLETION, "model": model})
    assert vllm.body == {**COMPLETION, "model": model}
    assert front.context.mask is None


async def test_every_name_of_the_model_takes_a_mask(
    http: httpx.AsyncClient, vllm: Recorder, engine: FakeEngine
) -> None:
    engine.model_names = ("tiny", "tiny:1b")
    for model, base, mask in [("tiny:1b:zh", "tiny:1b", "zh"), ("tiny:vi", "tiny", "vi")]:
        await http.post("/v1/completions", json={**COMPLETION, "model": model})
        assert json.loads(vllm.contents[-1]) == {**COMPLETION, "model": base, "vllm_xargs": carried(mask)}
    await http.post("/v1/completions", json={**COMPLETION, "model": "tiny:1b"})
    assert json.loads(vllm.contents[-1]) == {**COMPLETION, "model": "tiny:1b"}


@pytest.mark.parametrize(
    ("query", "body"),
    [
        ("?mask=zh", {"mask": "vi"}),
        ("?mask=zh", {"mask": "none"}),
        ("?mask=none", {"model": "tiny:zh"}),
        ("", {"mask": "zh", "model": "tiny:vi"}),
        ("", {"mask": "zh", "vllm_xargs": {"crane_mask": "vi"}}),
        ("", {"model": "tiny:zh", "vllm_xargs": {"crane_mask": "zh@0.5"}}),
        ("?mask=zh&mask=zh", {}),
    ],
)
async def test_two_masks_are_refused(http: httpx.AsyncClient, vllm: Recorder, query: str, body: dict) -> None:
    answer = await http.post(f"/v1/completions{query}", json={**COMPLETION, **body})
    assert code_of(answer) == (400, "mask_conflict", "mask")
    assert vllm.contents == []


@pytest.mark.parametrize(
    ("query", "body"),
    [
        ("?positions=all", {"mask": "zh", "positions": "prompt"}),
        ("", {"mask": "zh", "positions": "prompt", "vllm_xargs": {"crane_positions": "all"}}),
        ("?mask=zh&positions=all&positions=all", {}),
        ("?mask=zh&positions=generated[:3]", {"positions": "generated[:4]"}),
        ("?positions=all+until=3", {"model": "tiny:zh", "positions": "all"}),
        ("?positions=prompt[-4:]", {}),
        ("?positions=prompt", {}),
        ("", {"positions": "all"}),
        ("", {"vllm_xargs": {"crane_positions": "all"}}),
    ],
)
async def test_two_positions_or_positions_alone_are_refused(
    http: httpx.AsyncClient, vllm: Recorder, query: str, body: dict
) -> None:
    answer = await http.post(f"/v1/completions{query}", json={**COMPLETION, **body})
    assert code_of(answer) == (400, "mask_conflict", "positions")
    assert vllm.contents == []


@pytest.mark.parametrize(
    ("query", "body", "refused"),
    [
        ("?masks=zh", {}, (422, "malformed_query", "masks")),
        ("?Mask=zh", {}, (422, "malformed_query", "Mask")),
        ("?crane_mask=zh", {}, (422, "malformed_query", "crane_mask")),
        ("", {"Mask": "zh"}, (422, "malformed_body", "Mask")),
        ("", {"crane_mask": "zh"}, (422, "malformed_body", "crane_mask")),
        ("", {"mask": "zh", "POSITIONS": "all"}, (422, "malformed_body", "POSITIONS")),
        ("", {"mask": 5}, (422, "malformed_body", "mask")),
        ("", {"mask": ["zh"]}, (422, "malformed_body", "mask")),
        ("", {"mask": "zh", "positions": 1}, (422, "malformed_body", "positions")),
        ("", {"mask": "zh", "positions": "some"}, (422, "malformed_body", "positions")),
        ("?mask=zh&positions=some", {}, (422, "malformed_body", "positions")),
        ("?mask=zh&positions=generated[-4:]", {}, (422, "malformed_body", "positions")),
        ("?mask=zh&positions=", {}, (422, "malformed_body", "positions")),
        ("?mask=zh&until=3", {}, (422, "malformed_query", "until")),
        ("", {"mask": "zh", "positions": {"prompt": [0, 4]}}, (422, "malformed_body", "positions")),
        ("", {"model": "tiny:zh", "positions": "all;until=3"}, (422, "malformed_body", "positions")),
        ("", {"vllm_xargs": {"crane_mask": "zh", "crane_positions": "x"}}, (422, "malformed_body", "positions")),
        ("", {"vllm_xargs": {"crane_mask": 5}}, (422, "malformed_body", "crane_mask")),
        ("?mask=zh", {"vllm_xargs": "x"}, (422, "malformed_body", "vllm_xargs")),
        ("?mask=", {}, (400, "malformed_mask", "mask")),
        ("", {"model": "tiny:"}, (400, "malformed_mask", "mask")),
        ("", {"model": "tiny:zh,none"}, (400, "malformed_mask", "mask")),
        ("?mask=zh@x", {}, (400, "malformed_mask", "mask")),
        ("?mask=fr", {}, (404, "unknown_mask", "mask")),
        ("", {"model": "tiny:fr"}, (404, "unknown_mask", "mask")),
        ("?mask=broken", {}, (409, "invalid_mask", "mask")),
        ("?mask=zh", {"use_beam_search": True}, (400, "beam_search", "use_beam_search")),
    ],
)
async def test_what_cannot_be_meant_never_reaches_vllm(
    http: httpx.AsyncClient, vllm: Recorder, gate: Gate, query: str, body: dict, refused: tuple[int, str, str]
) -> None:
    answer = await http.post(f"/v1/completions{query}", json={**COMPLETION, **body})
    assert code_of(answer) == refused
    assert (vllm.contents, gate.sequences) == ([], 0)


MISSPELT = (
    "masks",
    "maks",
    "Mask",
    "mask_name",
    "neuron_mask",
    "language_mask",
    "position",
    "crane",
    "neurons",
    "language",
)
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
    "/v1/chat/completions/batch": {"model": "tiny", "messages": [CHAT["messages"]]},
    "/v1/responses": {"model": "tiny", "input": "Hi"},
    "/v1/messages": {**CHAT, "max_tokens": 3},
    "/inference/v1/generate": TOKENS,
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [5]},
    "/v1/messages/count_tokens": {"messages": CHAT["messages"]},
}
BODIES |= {
    f"{path}/render": BODIES[path]
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
}


def test_every_route_with_a_body_has_a_case() -> None:
    assert set(BODIES) == {path for path, method in ROUTES.items() if method == "POST"}


@pytest.mark.parametrize("path", BODIES)
async def test_a_misspelt_mask_in_the_body_never_runs_unmasked(
    http: httpx.AsyncClient, vllm: Recorder, gate: Gate, path: str
) -> None:
    for name in MISSPELT:
        answer = await http.post(path, json={**BODIES[path], name: "zh"})
        assert code_of(answer) == (422, "malformed_body", name)
        assert name in answer.json()["error"]["message"]
    assert (vllm.contents, gate.sequences) == ([], 0)
    assert (await http.post(path, json=BODIES[path])).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"vllm_xargs": {"mask": "zh"}}, "vllm_xargs.mask"),
        ("/v1/completions", {"vllm_xargs": {"crane_masks": "zh"}}, "vllm_xargs.crane_masks"),
        ("/v1/completions", {"vllm_xargs": {"Crane_Mask": "zh"}}, "vllm_xargs.Crane_Mask"),
        ("/v1/completions", {"vllm_xargs": {"crane_mask": "zh", "positions": "all"}}, "vllm_xargs.positions"),
        ("/v1/completions", {"vllm_xargs": {"x": [{"crane_mask": "zh"}]}}, "vllm_xargs.x.0.crane_mask"),
        ("/v1/completions", {"metadata": {"mask": "zh"}}, "metadata.mask"),
        ("/v1/responses", {"metadata": {"language_mask": "zh"}}, "metadata.language_mask"),
        ("/v1/messages", {"metadata": {"MAKS": "zh"}}, "metadata.MAKS"),
        ("/v1/completions", {"extra_body": {"mask": "zh"}}, "extra_body"),
        ("/v1/completions", {"extra_args": {"crane_mask": "zh"}}, "extra_args"),
        ("/v1/completions", {"sampling_params": {"extra_args": {"crane_mask": "zh"}}}, "sampling_params"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "crane_mask": "zh"}]}, "messages.0.crane_mask"),
        ("/inference/v1/generate", {"vllm_xargs": {"crane_mask": "zh"}}, "vllm_xargs.crane_mask"),
        ("/inference/v1/generate", {"sampling_params": {"mask": "zh"}}, "sampling_params.mask"),
        ("/inference/v1/generate", {"sampling_params": {"language": "zh"}}, "sampling_params.language"),
        (
            "/inference/v1/generate",
            {"sampling_params": {"extra_args": {"masks": "zh"}}},
            "sampling_params.extra_args.masks",
        ),
    ],
)
async def test_a_mask_in_a_wrong_place_of_the_body_never_runs_unmasked(
    http: httpx.AsyncClient, vllm: Recorder, path: str, body: dict, param: str
) -> None:
    assert code_of(await http.post(path, json={**BODIES[path], **body})) == (422, "malformed_body", param)
    assert vllm.contents == []


@pytest.mark.parametrize(
    ("body", "hint"),
    [
        ({"masks": "zh"}, "'mask'"),
        ({"position": "all"}, "'positions'"),
        ({"max_token": 3}, "'max_tokens'"),
        ({"neuron_mask": "zh"}, "'mask'"),
        ({"vllm_xargs": {"maks": "zh"}}, "'mask'"),
    ],
)
async def test_a_field_that_nobody_has_is_answered_with_the_nearest_one(
    http: httpx.AsyncClient, body: dict, hint: str
) -> None:
    message = (await http.post("/v1/completions", json={**COMPLETION, **body})).json()["error"]["message"]
    assert message.endswith(hint) or f"{hint}?" in message or f"{hint}," in message


@pytest.mark.parametrize(
    ("body", "refused"),
    [
        ({"best_of": 3}, "best_of"),
        ({"num_beams": 10}, "num_beams"),
        ({"logits_processors": ["x"]}, "logits_processors"),
        ({"guided_json": {}}, "guided_json"),
        ({"best_of": 1, "num_beams": None}, None),
        ({"metadata": {"run": "7"}, "store": False, "service_tier": "auto", "max_new_tokens": 5}, None),
        ({"vllm_xargs": {"session_id": "s", "window": 3}}, None),
    ],
)
async def test_what_vllm_drops_is_refused_where_it_matters(
    http: httpx.AsyncClient, vllm: Recorder, body: dict, refused: str | None
) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = await http.post(path, json={**BODIES[path], **body})
        if refused is None:
            assert answer.status_code == 200
        else:
            assert code_of(answer) == (422, "malformed_body", refused)


@pytest.mark.parametrize("name", ["x-mask", "X-Crane-Mask", "mask", "crane-positions"])
async def test_a_mask_in_a_header_never_runs_unmasked(
    http: httpx.AsyncClient, vllm: Recorder, client: httpx.AsyncClient, name: str
) -> None:
    for caller, path, body in [
        (http, "/v1/completions", COMPLETION),
        (client, "/generate", {"prompt": "Hi"}),
        (client, "/score", {"text": ["Hi"]}),
    ]:
        answer = await caller.post(path, json=body, headers={name: "zh"})
        assert code_of(answer) == (422, "malformed_header", name.lower())
    assert vllm.contents == []


@pytest.mark.parametrize(
    ("path", "name", "most"), [("/v1/chat/completions", "messages", 4096), ("/v1/responses", "input", 256)]
)
async def test_a_field_that_takes_vllm_long_has_a_bound(
    http: httpx.AsyncClient, vllm: Recorder, path: str, name: str, most: int
) -> None:
    parts = [{"content": [{}]}] * (most // 3)
    assert (await http.post(path, json={"model": "tiny", name: parts})).status_code == 200
    answer = await http.post(path, json={"model": "tiny", name: [*parts, {}, {}]})
    assert code_of(answer) == (413, "body_too_complex", name)
    assert f"more than {most} objects and lists" in answer.json()["error"]["message"]
    assert len(vllm.contents) == 1


async def test_stop_strings_have_a_bound(http: httpx.AsyncClient, vllm: Recorder) -> None:
    assert (await http.post("/v1/completions", json={**COMPLETION, "stop": ["a"] * 64})).status_code == 200
    answer = await http.post("/v1/completions", json={**COMPLETION, "stop": ["a"] * 65})
    assert code_of(answer) == (422, "malformed_body", "stop")


async def test_a_long_name_is_not_sent_back_whole(http: httpx.AsyncClient, vllm: Recorder) -> None:
    for body in ({"x" * 100_000: 1}, {"vllm_xargs": {"x" * 100_000: {"crane": 1}}}, {"x" * 100_000: "\ud800"}):
        answer = await http.post("/v1/completions", content=json.dumps({**COMPLETION, **body}))
        assert (answer.status_code, len(answer.content) < 1000) == (422, True)


async def test_data_is_no_parameter(http: httpx.AsyncClient, vllm: Recorder) -> None:
    schema = {"type": "object", "properties": {"mask": {"type": "string"}, "crane_height": {"type": "number"}}}
    tools = [{"type": "function", "function": {"name": "put_on", "parameters": schema}}]
    answer = await http.post("/v1/chat/completions", json={**CHAT, "tools": tools, "user": "mask"})
    assert answer.status_code == 200


async def test_a_route_that_vllm_was_started_without_is_not_found(
    http: httpx.AsyncClient, vllm: Recorder, engine: FakeEngine
) -> None:
    del engine.openai_fields["/inference/v1/generate"]
    assert code_of(await http.post("/inference/v1/generate", json=TOKENS)) == (404, "not_found", None)
    assert vllm.contents == []


@pytest.mark.parametrize(
    ("path", "body", "param", "position"),
    [
        ("/v1/completions", {"prompt": "Hi \ud800"}, "prompt", 4),
        ("/v1/completions", {"prompt": ["a", "\udfffb"]}, "prompt.1", 1),
        ("/v1/completions", {"stop": ["a", "ab\udc00"]}, "stop.1", 3),
        ("/v1/completions", {"model": "tiny:zh\ud800"}, "model", 8),
        ("/v1/completions", {"vllm_xargs": {"x\ud800": 1}}, "vllm_xargs", 2),
        ("/v1/completions", {"\ud800": 1}, None, 1),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content", 1),
        ("/v1/messages", {"system": "\ud800"}, "system", 1),
        ("/v1/responses", {"input": "\ud800"}, "input", 1),
        ("/tokenize", {"prompt": "\ud800"}, "prompt", 1),
    ],
)
async def test_a_lone_surrogate_is_said_with_its_place(
    http: httpx.AsyncClient, vllm: Recorder, path: str, body: dict, param: str | None, position: int
) -> None:
    answer = await http.post(path, content=json.dumps({**BODIES[path], **body}))
    assert code_of(answer) == (422, "malformed_body", param)
    message = answer.json()["error"]["message"]
    assert "lone surrogate" in message
    assert message.endswith(f"at character {position}")
    assert vllm.contents == []


@pytest.mark.parametrize("depth", [1, 400])
async def test_checking_a_body_takes_time_in_proportion_to_its_size(http: httpx.AsyncClient, depth: int) -> None:
    async def seconds(parts: int) -> float:
        items = ",".join(['"\\ud83d\\ude00 mask",{"a":[]},5'] * parts)  # so that it is examined as a whole
        content = f'{{"model": "tiny", "prompt": {"[" * depth}{items}{"]" * depth}}}'
        start = time.process_time()
        assert (await http.post("/v1/completions/render", content=content)).status_code == 200
        return time.process_time() - start

    await seconds(10)
    short, long = [min([await seconds(parts) for _ in range(3)]) for parts in (2_000, 16_000)]
    assert long < 24 * short  # eight times as long; by its square it would be 64
    names = ",".join(f'"mask{number}": 1' for number in range(50_000))
    start = time.process_time()
    assert (await http.post("/v1/completions", content=f"{{{names}}}")).status_code == 422
    assert (await http.post("/v1/completions", content=f'{{{names}, "mask5": 1}}')).status_code == 400
    assert time.process_time() - start < 10


async def test_an_unknown_mask_is_answered_with_what_there_is(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/completions", json={**COMPLETION, "model": "tiny:fr"})
    assert answer.json()["error"]["message"] == (
        "unknown mask 'fr'; this server has attnlrp-en, attnlrp-vi, attnlrp-zh, lape-zh"
    )


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"mask=zh", b"[]", b'"zh"', b"null", b'{"model": "tiny"', b"\xff", b"[" * 100_000),
        *(b'{"model": "tiny", "top_k": 18446744073709551616}', b'{"model": "tiny", "seed": -9223372036854775809}'),
        *(b'{"mask": "zh", "mask": null}', b'{"vllm_xargs": {"crane_mask": "zh", "crane_mask": "vi"}}'),
    ],
)
async def test_bodies_that_are_no_json_object_are_refused(
    http: httpx.AsyncClient, vllm: Recorder, content: bytes
) -> None:
    answer = await http.post("/v1/completions", content=content)
    assert code_of(answer) == (400, "malformed_body", None)
    assert vllm.contents == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "Hi"}),
        ("/detokenize", {"tokens": [5]}),
        ("/v1/messages/count_tokens", {"messages": CHAT["messages"]}),
    ],
)
async def test_routes_that_run_no_model_take_a_mask_only_in_its_name(
    http: httpx.AsyncClient, vllm: Recorder, front: Front, path: str, body: dict
) -> None:
    assert (await http.post(path, json={"model": "tiny:zh", **body})).status_code == 200
    assert vllm.body == {"model": "tiny", **body}
    assert (front.context.mask, vllm.rows, vllm.sequences) == (None, [0], [0])
    for query, asked in (("?mask=zh", {}), ("?mask=none", {}), ("", {"mask": "zh"}), ("?positions=all", {})):
        answer = await http.post(path + query, json={"model": "tiny", **body, **asked})
        assert code_of(answer)[:2] == (400, "mask_conflict")
    assert code_of(await http.post(path, json={"model": "tiny:fr", **body})) == (404, "unknown_mask", "mask")
    assert len(vllm.contents) == 1


@pytest.mark.parametrize(
    "model", ["tiny", "org/tiny", "tiny:zh", "tiny:attnlrp-zh", "tiny:none", "tiny:vi,zh@0.5", "org/tiny:lape-zh"]
)
async def test_each_name_that_a_request_may_have_is_a_model(
    http: httpx.AsyncClient, vllm: Recorder, engine: FakeEngine, front: Front, model: str
) -> None:
    engine.model_names = ("tiny", "org/tiny")
    for written in (model, quote(model, safe="")):
        assert (await http.get(f"/v1/models/{written}")).status_code == 200
    assert [scope["path"] for scope in vllm.scopes] == [f"/v1/models/{model}"] * 2
    assert front.scope["crane_route"] == "/v1/models/{model}"
    assert code_of(await http.get(f"/v1/models/{quote(model)}?mask=zh")) == (400, "mask_conflict", "mask")
    answer = await http.delete(f"/v1/models/{quote(model)}")
    assert (answer.headers["allow"], code_of(answer)) == ("GET", (405, "method_not_allowed", None))


@pytest.mark.parametrize(
    "model", ["other", "tiny:fr", "tiny:broken", "tiny:zh@x", "tiny:", "other:zh", "TINY", "", "ế"]
)
async def test_no_other_is(http: httpx.AsyncClient, vllm: Recorder, model: str) -> None:
    answer = await http.get(f"/v1/models/{quote(model, safe='')}")
    assert code_of(answer) == (404, "model_not_found", "model")
    assert "tiny, tiny:en, tiny:vi, tiny:zh, tiny:lape-zh" in answer.json()["error"]["message"]
    assert vllm.scopes == []


async def test_a_long_name_of_a_model_is_not_sent_back_whole(http: httpx.AsyncClient) -> None:
    answer = await http.get(f"/v1/models/{'x' * 50_000}")
    assert (answer.status_code, len(answer.content) < 1000) == (404, True)


async def test_models_come_and_go_with_their_masks(http: httpx.AsyncClient, vllm: Recorder, engine: FakeEngine) -> None:
    stored = engine.library.get("zh")
    await engine.put_mask(StoredMask("attnlrp-fr", stored.mask, stored.info))
    assert (await http.get("/v1/models/tiny:fr")).status_code == 200
    await engine.remove_mask("attnlrp-fr")
    assert (await http.get("/v1/models/tiny:fr")).status_code == 404


async def test_a_path_behind_a_mask_in_the_address_is_not_the_page(http: httpx.AsyncClient) -> None:
    for answer in (await http.get("/?mask=vi/tokenizer_info"), await http.post("/?mask=vi/tokenize", json={})):
        assert code_of(answer) == (422, "malformed_query", "mask")
        assert "MODEL:MASK" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/models", "/tokenizer_info", "/version"])
async def test_what_is_only_read(http: httpx.AsyncClient, vllm: Recorder, front: Front, gate: Gate, path: str) -> None:
    gate.closed = True
    assert (await http.get(path)).status_code == 200
    assert (vllm.contents, front.scope["crane_route"]) == ([b""], path)
    assert code_of(await http.get(f"{path}?mask=zh")) == (400, "mask_conflict", "mask")
    assert code_of(await http.get(f"{path}?after=x")) == (422, "malformed_query", "after")
    answer = await http.post(path, json={})
    assert (answer.headers["allow"], code_of(answer)) == ("GET", (405, "method_not_allowed", None))


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/invocations", "/ping", "/load", "/scale_elastic_ep", "/v1/load_lora_adapter", "/sleep", "/pooling"),
        *("/v1/completions/", "/V1/completions", "/v1//completions", "/v1/embeddings"),
        *("/v1/responses/resp_1", "/generative_scoring", "/openapi.json/x", "/start_profile", "/collective_rpc"),
    ],
)
async def test_nothing_else_of_vllm_can_be_reached(
    http: httpx.AsyncClient, vllm: Recorder, front: Front, path: str
) -> None:
    for method in ("GET", "POST"):
        assert code_of(await http.request(method, path, json={})) == (404, "not_found", None)
    assert vllm.contents == []
    assert "crane_route" not in front.scope


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_other_methods_are_told_which_is_allowed(http: httpx.AsyncClient, vllm: Recorder, method: str) -> None:
    answer = await http.request(method, "/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert vllm.contents == []


async def test_websockets_are_closed(front: Front, vllm: Recorder) -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": [], "query_string": b"", "subprotocols": []}
    await front(scope, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]
    assert vllm.scopes == []


@pytest.mark.parametrize(
    ("path", "body", "sequences"),
    [
        ("/v1/completions", {"prompt": "one text"}, 1),
        ("/v1/completions", {"prompt": ["a", "b", "c"]}, 3),
        ("/v1/completions", {"prompt": [1, 2, 3]}, 1),
        ("/v1/completions", {"prompt": [[1, 2], [3]]}, 2),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 4}, 8),
        ("/v1/completions", {"prompt": ["a", "b"], "n": "4"}, 8),
        ("/v1/completions", {"prompt": ["a", "b"], "n": "4.0"}, 8),
        ("/v1/completions", {"prompt": [1.0, 2.0], "n": 4.0}, 4),
        ("/v1/completions", {"prompt": "a", "prompt_embeds": ["x", "y"]}, 3),
        ("/v1/completions", {"prompt": "a", "n": None}, 1),
        ("/v1/completions", {"prompt": [], "n": -3}, 1),
        ("/v1/completions", {"n": "x"}, 1),
        ("/v1/chat/completions", {"n": 3}, 3),
        ("/v1/chat/completions/batch", {"messages": [[], [], []]}, 3),
        ("/v1/responses", {"input": ["a", "b"]}, 1),
        ("/v1/messages", {"messages": []}, 1),
        ("/inference/v1/generate", {"token_ids": [1, 2], "sampling_params": {"n": 2}}, 2),
        ("/inference/v1/generate", {"token_ids": [1, 2], "n": 5}, 1),
        ("/v1/completions/render", {"prompt": ["a", "b"]}, 0),
        ("/tokenize", {"prompt": "a"}, 0),
    ],
)
async def test_sequences_are_counted_while_vllm_answers(
    http: httpx.AsyncClient, vllm: Recorder, gate: Gate, path: str, body: dict, sequences: int
) -> None:
    assert (await http.post(path, json=body)).status_code == 200
    assert vllm.sequences == [sequences]
    assert gate.sequences == 0


MUCH = 2**40


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("/v1/completions", {"prompt": ["a"] * 1024, "n": 16384}, "too_many_sequences"),
        ("/v1/completions", {"prompt": ["a"] * 101}, "too_many_sequences"),
        ("/v1/completions", {"prompt": [[1]] * 51, "n": "2.0"}, "too_many_sequences"),
        ("/v1/chat/completions", {"messages": [], "n": 101}, "too_many_sequences"),
        ("/v1/chat/completions/batch", {"messages": [[]] * 51, "n": 2}, "too_many_sequences"),
        ("/inference/v1/generate", {"sampling_params": {"n": 101}}, "too_many_sequences"),
        ("/v1/completions", {"logprobs": MUCH}, "too_many_logprobs"),
        ("/v1/completions", {"prompt": ["a"] * 2, "logprobs": -1}, "too_many_logprobs"),
        ("/v1/completions", {"prompt": ["a"] * 100, "prompt_logprobs": 205}, "too_many_logprobs"),
        ("/v1/chat/completions", {"n": 100, "top_logprobs": "205"}, "too_many_logprobs"),
        ("/v1/completions", {"prompt": ["a"], "n": 100, "use_beam_search": True}, None),
        ("/v1/completions", {"prompt": ["a"] * 2, "n": 50, "use_beam_search": True, "logprobs": 204}, None),
        ("/v1/completions", {"prompt": ["a"], "logprobs": -1}, None),
    ],
)
async def test_what_is_asked_for_together_is_bounded(
    http: httpx.AsyncClient, vllm: Recorder, engine: FakeEngine, path: str, body: dict, code: str | None
) -> None:
    engine.openai_fields[path][""] |= {"top_logprobs", "prompt_logprobs"}
    answer = await http.post(path, json={"model": "tiny", **body})
    assert answer.json().get("error", {}).get("code") == code
    assert (answer.status_code, len(vllm.contents)) == ((400, 0) if code else (200, 1))


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
async def test_a_closed_gate_and_a_full_queue_are_said(
    http: httpx.AsyncClient, vllm: Recorder, gate: Gate, path: str
) -> None:
    busy = RequestContext("busy")
    gate.admit(busy, 100)
    answer = await http.post(path, json=COMPLETION)
    assert (code_of(answer), answer.headers["retry-after"]) == ((429, "queue_full", None), "1")
    gate.leave(busy)
    gate.closed = True
    assert code_of(await http.post(path, json=COMPLETION)) == (503, "shutting_down", None)
    assert vllm.contents == []


async def test_a_row_is_held_until_the_last_byte(
    http: httpx.AsyncClient, vllm: Recorder, engine: FakeEngine, gate: Gate
) -> None:
    held = []

    async def events() -> AsyncIterator[bytes]:
        for _ in range(3):
            await asyncio.sleep(0)
            held.append((engine.mask_rows_used, gate.sequences))
            yield b"data: {}\n\n"

    vllm.answer = StreamingResponse(events(), media_type="text/event-stream")
    answer = await http.post("/v1/completions?mask=zh", json={**COMPLETION, "prompt": ["a", "b"], "stream": True})
    assert answer.content == b"data: {}\n\n" * 3
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert (vllm.rows, held) == ([1], [(1, 2)] * 3)
    assert (engine.mask_rows_used, gate.sequences) == (0, 0)


async def test_stream_events_are_passed_on_as_they_come(front: Front, vllm: Recorder) -> None:
    received = asyncio.Event()

    async def events() -> AsyncIterator[bytes]:
        yield b"data: first\n\n"
        await received.wait()
        yield b"data: second\n\n"

    vllm.answer = StreamingResponse(events(), media_type="text/event-stream")
    parts: list[bytes] = []

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body" and message["body"]:
            parts.append(message["body"])
            received.set()

    async with asyncio.timeout(30):
        await front(http_scope(), Once(json.dumps({**COMPLETION, "mask": "zh"}).encode()), send)
    assert parts == [b"data: first\n\n", b"data: second\n\n"]


async def test_a_stream_that_begins_with_a_refusal_is_an_error(http: httpx.AsyncClient, vllm: Recorder) -> None:
    error = {"message": "no such token", "type": "BadRequestError", "param": None, "code": 400}

    async def events(*contents: object) -> AsyncIterator[str]:
        for content in contents:
            yield f"data: {json.dumps(content)}\n\n"

    vllm.answer = StreamingResponse(events({"error": error}), media_type="text/event-stream")
    answer = await http.post("/v1/completions", json={**COMPLETION, "stream": True})
    assert (answer.status_code, answer.json()) == (400, {"error": error})
    for contents in ([{"text": "a"}, {"error": error}], [{"error": {**error, "code": "later"}}], [{"error": None}], []):
        vllm.answer = StreamingResponse(events(*contents), media_type="text/event-stream")
        answer = await http.post("/v1/completions", json={**COMPLETION, "stream": True})
        assert (answer.status_code, answer.text.count("data: ")) == (200, len(contents))


def http_scope(path: str = "/v1/completions") -> Scope:
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
    return {**scope, "asgi": {"version": "3.0", "spec_version": "2.4"}}


class Once:
    """`receive` that gives a body in pieces, then waits for `gone`."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = list(pieces)
        self.gone = asyncio.Event()

    async def __call__(self) -> Message:
        if self._pieces:
            piece = self._pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(self._pieces)}
        await self.gone.wait()
        return {"type": "http.disconnect"}


@pytest.mark.parametrize("mask", ["zh", None])
async def test_vllm_sees_the_body_once_and_then_that_the_client_has_gone(
    front: Front, vllm: Recorder, engine: FakeEngine, gate: Gate, mask: str | None
) -> None:
    content = json.dumps({**COMPLETION, "mask": mask}).encode()
    receive = Once(content[:5], content[5:])
    waiting, seen = asyncio.Event(), []

    async def answer(scope: Scope, vllm_receive: Receive, send: Send) -> None:
        waiting.set()
        seen.append(await vllm_receive())

    vllm.answer = answer
    request = asyncio.create_task(front(http_scope(), receive, _refuse))
    async with asyncio.timeout(30):
        await waiting.wait()
        assert (gate.sequences, engine.mask_rows_used) == (1, mask is not None)
        receive.gone.set()
        await request
    assert (vllm.body["prompt"], seen) == ("Hi", [{"type": "http.disconnect"}])
    assert (gate.sequences, engine.mask_rows_used) == (0, 0)


async def test_a_client_that_goes_before_its_body_is_whole_asks_for_nothing(front: Front, vllm: Recorder) -> None:
    messages: list[Message] = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Message:
        return messages.pop(0)

    await front(http_scope(), receive, _refuse)
    assert vllm.contents == []


async def _refuse(message: Message) -> None:
    raise AssertionError(f"nothing is to be sent, but {message['type']} was")


async def test_a_cancelled_request_gives_back_what_it_held(
    front: Front, vllm: Recorder, engine: FakeEngine, gate: Gate
) -> None:
    waiting = asyncio.Event()

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        waiting.set()
        await asyncio.Event().wait()

    vllm.answer = answer
    content = json.dumps({**COMPLETION, "mask": "zh"}).encode()
    request = asyncio.create_task(front(http_scope(), Once(content), _refuse))
    async with asyncio.timeout(30):
        await waiting.wait()
    assert (gate.sequences, engine.mask_rows_used) == (1, 1)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert (gate.sequences, engine.mask_rows_used) == (0, 0)


async def test_a_full_mask_table_is_a_429(
    http: httpx.AsyncClient, vllm: Recorder, engine: FakeEngine, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def full(mask: ResolvedMask | None) -> Any:
        if mask is not None:
            raise MaskTableFull(f"mask {mask.name}: 1 others are in use")
        yield

    monkeypatch.setattr(engine, "row", full)
    answer = await http.post("/v1/completions?mask=zh", json=COMPLETION)
    assert (code_of(answer), answer.headers["retry-after"]) == ((429, "mask_table_full", "mask"), "1")
    assert (vllm.contents, gate.sequences) == ([], 0)
    assert (await http.post("/v1/completions", json=COMPLETION)).status_code == 200


@pytest.mark.parametrize(
    ("status", "dead", "expected"), [(500, True, 503), (500, False, 500), (503, False, 503), (400, True, 400)]
)
async def test_what_fails_because_the_engine_has_died_says_so(
    http: httpx.AsyncClient, vllm: Recorder, engine: FakeEngine, status: int, dead: bool, expected: int
) -> None:
    error = {"error": {"message": "vLLM's", "type": "InternalServerError", "param": None, "code": status}}
    vllm.answer = JSONResponse(error, status_code=status)
    engine.is_dead = dead
    answer = await http.post("/v1/completions", json=COMPLETION)
    if expected == status:
        assert (answer.status_code, answer.json()) == (status, error)
    else:
        assert code_of(answer) == (503, "engine_dead", None)
        assert "vLLM's" not in answer.text


DEAD = '{"message":"the engine has died","type":"service_unavailable_error","param":null,"code":"engine_dead"}'


@pytest.mark.parametrize(
    ("path", "body", "last"),
    [
        ("/v1/completions", COMPLETION, f'data: {{"error":{DEAD}}}\n\n'),
        ("/v1/chat/completions", CHAT, f'data: {{"error":{DEAD}}}\n\n'),
        ("/v1/messages", CHAT, f'event: error\ndata: {{"error":{DEAD},"type":"error"}}\n\n'),
        ("/v1/responses", {"model": "tiny"}, f'event: error\ndata: {{"error":{DEAD},"type":"error"}}\n\n'),
    ],
)
@pytest.mark.parametrize("fails", [False, True])
async def test_a_stream_ends_with_the_death_of_the_engine(
    http: httpx.AsyncClient, vllm: Recorder, engine: FakeEngine, path: str, body: Any, last: str, fails: bool
) -> None:
    async def events() -> AsyncIterator[str]:
        yield "data: 1\n\n"
        engine.is_dead = True
        if fails:
            raise RuntimeError("vLLM's")
        yield "data: vLLM's\n\n"
        yield "data: [DONE]\n\n"

    vllm.answer = StreamingResponse(events(), media_type="text/event-stream")
    answer = await http.post(path, json=body)
    assert (answer.status_code, answer.text) == (200, f"data: 1\n\n{last}")


async def test_a_stream_that_fails_on_a_living_engine_is_broken_off(http: httpx.AsyncClient, vllm: Recorder) -> None:
    async def events() -> AsyncIterator[str]:
        yield "data: 1\n\n"
        raise RuntimeError("vLLM's")

    vllm.answer = StreamingResponse(events(), media_type="text/event-stream")
    assert (await http.post("/v1/completions", json=COMPLETION)).text == "data: 1\n\n"


async def test_answers_name_the_model_that_was_asked_for(
    http: httpx.AsyncClient, vllm: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def spy(model: str | None) -> Any:
        asked.append(model)
        return answering_as(model)

    monkeypatch.setattr("crane_serve.service.api.openai.answering_as", spy)
    for model in ("tiny", "tiny:zh", "tiny:none", "other:zh"):
        await http.post("/v1/completions", json={**COMPLETION, "model": model})
    await http.post("/v1/completions?mask=zh", json=COMPLETION)
    assert asked == [None, "tiny:zh", "tiny:none", None, None]


def test_a_mask_is_listed_by_its_language_where_that_means_it() -> None:
    masks = library()
    assert {name: public_name(masks, name) for name in masks.masks} == {
        "attnlrp-en": "en",
        "attnlrp-vi": "vi",
        "attnlrp-zh": "zh",
        "lape-zh": "lape-zh",
    }
    masks.invalid = {"en": "unreadable"}
    assert public_name(masks, "attnlrp-en") == "attnlrp-en"
