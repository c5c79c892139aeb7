"""Masks in the body, over a fake engine and a recording application in vLLM's place: allowed, refused, and counted."""

import json
import logging
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from crane_serve.common.masks import InlineMask, Positions
from crane_serve.service.api.gate import MAX_MASK_CHARACTERS
from tests.api.fake_engine import FINGERPRINT, FakeEngine

SIZES = FINGERPRINT.intermediate_sizes
OFF: dict[str, Any] = {"neurons": {"1": [3, 0], "0": [5]}}
MASK = InlineMask.read(OFF, SIZES)
GENERATE = ("/generate", {"prompt": "Hi", "max_tokens": 2})
SCORE = ("/score", {"text": ["Hi"]})
COMPLETION = ("/v1/completions", {"model": "tiny", "prompt": "Hi", "max_tokens": 2})
CHAT = ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]})
own_routes = pytest.mark.parametrize(("route", "body"), [GENERATE, SCORE])
every_route = pytest.mark.parametrize(("route", "body"), [GENERATE, SCORE, COMPLETION, CHAT])


class Vllm:
    """In vLLM's place: keeps the bodies that it gets."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.bodies.append(json.loads((await receive())["body"]))
        await JSONResponse({"answered": "by vLLM"})(scope, receive, send)


@pytest.fixture
def vllm(engine: FakeEngine) -> Vllm:
    engine.openai = Vllm()
    return engine.openai


@pytest_asyncio.fixture
async def http(client: httpx.AsyncClient, engine: FakeEngine, vllm: Vllm) -> httpx.AsyncClient:
    engine.library.allows_inline = True
    return client


def error_of(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


@own_routes
async def test_an_answer_names_what_it_ran_under(
    http: httpx.AsyncClient, engine: FakeEngine, route: str, body: dict[str, Any]
) -> None:
    answer = await http.post(route, json={**body, "mask": OFF})
    assert answer.status_code == 200
    used = {"name": "inline", "digest": MASK.digest, "neurons": 3, "positions": "all"}
    assert answer.json()["mask"] == used
    assert (answer.headers["x-crane-mask"], answer.headers["x-crane-mask-digest"]) == ("inline", MASK.digest)
    asked = engine.calls[0].mask
    assert asked is not None
    assert asked.wire == MASK.wire


@pytest.mark.parametrize(("route", "body"), [COMPLETION, CHAT])
@pytest.mark.parametrize("positions", [None, "generated"])
async def test_vllm_gets_the_whole_mask_where_it_takes_one(
    http: httpx.AsyncClient, vllm: Vllm, route: str, body: dict[str, Any], positions: str | None
) -> None:
    asked = {"mask": OFF} if positions is None else {"mask": OFF, "positions": positions}
    answer = await http.post(route, json={**body, **asked})
    assert (answer.status_code, answer.headers["x-crane-mask-digest"]) == (200, MASK.digest)
    carried = {"crane_mask": MASK.wire, "crane_positions": positions or "all"}
    assert vllm.bodies == [{**body, "vllm_xargs": carried}]


async def test_what_vllms_own_server_takes_is_taken_here(http: httpx.AsyncClient, vllm: Vllm) -> None:
    route, body = COMPLETION
    text = f"neurons:{json.dumps(OFF)}"
    answer = await http.post(route, json={**body, "vllm_xargs": {"crane_mask": text}, "mask": OFF})
    assert answer.status_code == 200
    assert vllm.bodies[0]["vllm_xargs"]["crane_mask"] == MASK.wire
    for wrong in ("", "[", "null", '"none"', '"zh"', "{}", '{"neurons":{"0":[9]}}'):
        answer = await http.post(route, json={**body, "vllm_xargs": {"crane_mask": f"neurons:{wrong}"}})
        assert error_of(answer) == (400, "malformed_mask", "mask")
    assert len(vllm.bodies) == 1


@every_route
async def test_it_is_off_unless_allowed(
    client: httpx.AsyncClient, engine: FakeEngine, vllm: Vllm, route: str, body: dict[str, Any]
) -> None:
    answer = await client.post(route, json={**body, "mask": OFF})
    assert error_of(answer) == (403, "inline_masks_off", "mask")
    assert "--inline-masks (CRANE_INLINE_MASKS=1)" in answer.json()["error"]["message"]
    assert engine.calls == vllm.bodies == []
    assert (await client.post(route, json={**body, "mask": "zh"})).status_code == 200


@every_route
@pytest.mark.parametrize("mask", ["zh", "none", "lape-zh,vi"])
async def test_a_name_beside_it_contradicts_it(
    http: httpx.AsyncClient, engine: FakeEngine, vllm: Vllm, route: str, body: dict[str, Any], mask: str
) -> None:
    answer = await http.post(f"{route}?mask={mask}", json={**body, "mask": OFF})
    assert error_of(answer) == (400, "mask_conflict", "mask")
    assert answer.json()["error"]["message"] == f"the query says mask={mask}, the body an object"
    assert engine.calls == vllm.bodies == []


@every_route
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({}, "'neurons' holds something else than layers"),
        ({"neurons": {"0": [6]}}, "layer 0: 6 is no neuron, expected whole numbers from 0 to 5"),
        ({"neurons": {"2": [0]}}, 'layer \'2\' is none of the model\'s, expected "0" to "1"'),
        ({"neurons": {"0": [1, 1]}}, "layer 0: neuron 1 is listed twice"),
        ({"neurons": {"0": [True]}}, "layer 0: True is no neuron"),
        ({**OFF, "scale": 10_001}, "'scale' is 10001, expected a number of at most 10000"),
        ({**OFF, "scale": "0"}, "'scale' is '0', expected a number"),
        ({**OFF, "output": {}}, "unknown field 'output'"),
        ({"neurons": {"0": list(range(100_000))}}, "'neurons' lists 100000, expected 1 to 16384"),
    ],
)
async def test_what_is_no_mask_is_one_clear_error(
    http: httpx.AsyncClient, engine: FakeEngine, vllm: Vllm, route: str, body: dict[str, Any], mask: Any, message: str
) -> None:
    answer = await http.post(route, json={**body, "mask": mask})
    assert error_of(answer) == (400, "malformed_mask", "mask")
    said = answer.json()["error"]["message"]
    assert said.startswith(f"mask in the body: {message}")
    assert len(said) < 200
    assert engine.calls == vllm.bodies == []


@every_route
@pytest.mark.parametrize("number", ["1e400", "NaN", "-Infinity", "1" * 5000])
async def test_a_number_that_is_none_is_refused(
    http: httpx.AsyncClient, engine: FakeEngine, vllm: Vllm, route: str, body: dict[str, Any], number: str
) -> None:
    for mask in (f'{{"neurons": {{"0": [1]}}, "scale": {number}}}', f'{{"neurons": {{"0": [{number}]}}}}'):
        content = json.dumps(body)[:-1] + f', "mask": {mask}}}'
        answer = await http.post(route, content=content, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 422)
        assert answer.json()["error"]["code"] in ("malformed_mask", "malformed_body")
    assert engine.calls == vllm.bodies == []


@every_route
@pytest.mark.parametrize("mask", ['{"neurons": {"0": [1], "0": [2]}}', '"zh", "mask": "vi"', '"none", "mask": "vi"'])
async def test_of_two_values_for_one_name_none_is_taken(
    http: httpx.AsyncClient, engine: FakeEngine, vllm: Vllm, route: str, body: dict[str, Any], mask: str
) -> None:
    content = json.dumps(body)[:-1] + f', "mask": {mask}}}'
    answer = await http.post(route, content=content, headers={"content-type": "application/json"})
    assert error_of(answer)[1] == "malformed_body"
    assert "is given twice" in answer.json()["error"]["message"]
    assert engine.calls == vllm.bodies == []


@every_route
async def test_a_body_that_is_nested_without_end_is_refused(
    http: httpx.AsyncClient, route: str, body: dict[str, Any]
) -> None:
    content = json.dumps(body)[:-1] + f', "mask": {{"neurons": {"[" * 5000}{"]" * 5000}}}}}'
    answer = await http.post(route, content=content, headers={"content-type": "application/json"})
    assert error_of(answer)[:2] == (413, "body_too_complex")


@pytest.mark.parametrize("mask", [5, [OFF], True])
@every_route
async def test_only_a_text_or_an_object_is_a_mask(
    http: httpx.AsyncClient, route: str, body: dict[str, Any], mask: Any
) -> None:
    answer = await http.post(route, json={**body, "mask": mask})
    assert error_of(answer) == (422, "malformed_body", "mask")


@every_route
async def test_a_query_and_a_models_name_hold_names_only(
    http: httpx.AsyncClient, engine: FakeEngine, vllm: Vllm, route: str, body: dict[str, Any]
) -> None:
    text = f"neurons:{json.dumps(OFF)}"
    asked = [http.post(route, params={"mask": text}, json=body), http.post(route, json={**body, "mask": text})]
    if "model" in body:
        asked.append(http.post(route, json={**body, "model": f"tiny:{text}"}))
    for request in asked:
        answer = await request
        assert error_of(answer) == (400, "malformed_mask", "mask")
        assert "an object in the body" in answer.json()["error"]["message"]
    assert engine.calls == vllm.bodies == []


async def test_positions_are_for_it_as_for_a_name(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    route, body = GENERATE
    answer = await http.post(f"{route}?positions=prompt", json={**body, "mask": OFF})
    assert answer.json()["mask"]["positions"] == "prompt"
    asked = engine.calls[0].mask
    assert asked is not None
    assert asked.positions == Positions.PROMPT


async def test_neither_the_log_nor_the_metrics_hold_its_neurons(
    http: httpx.AsyncClient, app: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        for neuron in range(5):
            for route, body in (GENERATE, SCORE, COMPLETION):
                answer = await http.post(route, json={**body, "mask": {"neurons": {"1": [neuron]}}})
                assert answer.status_code == 200
        await http.post(GENERATE[0], json={**GENERATE[1], "mask": {"neurons": {"1": [77]}}})
    lines = [record for record in caplog.records if record.name == "crane.access"]
    assert {record.mask for record in lines[:-1]} == {"inline"}  # type: ignore[attr-defined]
    assert not any("neurons" in str(vars(record)) for record in caplog.records)
    metrics = (await http.get("/metrics")).text
    assert 'crane_requests_total{mask="inline",route="/generate",status="200"} 5.0' in metrics
    assert "neurons" not in metrics
    assert MASK.digest not in metrics


async def test_what_a_request_multiplies_is_bounded(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Each sequence carries the mask into the engine."""
    large = {"neurons": {"0": list(range(6)), "1": list(range(5))}}
    engine.library.fingerprint = FINGERPRINT.model_copy(update={"intermediate_sizes": (16_384, 5)})
    huge = {"neurons": {"0": list(range(16_384))}}
    wire = InlineMask.read(huge, (16_384, 5)).wire
    most = MAX_MASK_CHARACTERS // len(wire)
    assert 100 < most < 1000
    route, body = GENERATE
    for mask, prompts, expected in ((huge, most, 200), (huge, most + 1, 400), (large, 1024, 200)):
        answer = await http.post(route, json={**body, "prompt": ["x"] * prompts, "max_tokens": 1, "mask": mask})
        assert answer.status_code == expected
        if expected == 400:
            assert error_of(answer) == (400, "too_many_sequences", "mask")


async def test_the_description_says_what_it_may_be(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    for name in ("GenerateRequest", "ScoreRequest"):
        kinds = document["components"]["schemas"][name]["properties"]["mask"]["anyOf"]
        assert [kind["type"] for kind in kinds] == ["string", "object", "null"]
        assert kinds[1]["required"] == ["neurons"]
