"""POST /generate over a fake engine: answers, streams, and what happens when either side fails."""

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from crane_serve.common.masks import MaskTableFull, Positions
from crane_serve.common.masks.positions import PATTERN
from crane_serve.engine.answers import EngineBusy, EngineDead, FailedRequest, RejectedRequest, Sampling
from crane_serve.engine.asked_activations import AskedActivations
from crane_serve.engine.service import EngineService
from tests.api.fake_engine import FakeEngine
from tests.tokenizer_kinds import ENDING, KINDS, Kind


def events(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line if line == "data: [DONE]" else json.loads(line.removeprefix("data: ")) for line in lines]


async def test_one_prompt(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    response = await client.post("/generate", json={"prompt": "hi", "max_tokens": 3})
    assert response.status_code == 200
    assert response.json() == {
        "model": "tiny",
        "mask": None,
        "outputs": [
            {
                "index": 0,
                "text": "abc",
                "finish_reason": "length",
                "prompt_tokens": 3,
                "completion_tokens": 3,
                "logprobs": None,
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6},
    }
    assert engine.calls[0].token_ids == engine.tokenizer("hi")["input_ids"]
    assert engine.calls[0].stream is False


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("kind", "add_bos", "before"),
    [
        ("llama", "auto", [0]),
        ("llama", True, [0]),
        ("llama", False, []),
        ("gpt2", "auto", []),
        ("gpt2", True, [0]),
        ("qwen chat", "auto", []),
        ("qwen chat", True, [0]),
        ("glm", "auto", [1, 2]),
        ("bert", "auto", [0]),  # and nothing behind the prompt
        ("t5", "auto", []),
    ],
)
async def test_what_stands_before_a_prompt(
    client: httpx.AsyncClient, engine: FakeEngine, kind: str, add_bos: bool | str, before: list[int], stream: bool
) -> None:
    engine.tokenizer, engine.configured_bos = (KINDS | ENDING)[kind].tokenizer(), (KINDS | ENDING)[kind].configured
    body = {"prompt": "hi", "max_tokens": 1, "add_bos": add_bos, "stream": stream}
    response = await client.post("/generate", json=body)
    assert engine.calls[0].token_ids == [*before, *engine.tokenizer("hi", add_special_tokens=False)["input_ids"]]
    last = events(response)[-2] if stream else response.json()
    assert last["usage"]["prompt_tokens"] == last["outputs"][0]["prompt_tokens"] == len(before) + 2


@pytest.mark.parametrize("add_bos", ["auto", True, False])
@pytest.mark.parametrize("kind", ["llama", "gemma", "opt", "bert", "gpt2"])
async def test_a_prompt_that_brings_bos_has_one(
    client: httpx.AsyncClient, engine: FakeEngine, kind: str, add_bos: bool | str
) -> None:
    engine.tokenizer = (KINDS | ENDING)[kind].tokenizer()
    prompt = f"{engine.tokenizer.bos_token}Hà Nội"
    await client.post("/generate", json={"prompt": prompt, "max_tokens": 1, "add_bos": add_bos})
    token_ids = engine.calls[0].token_ids
    assert token_ids[0] == engine.tokenizer.bos_token_id
    assert token_ids[1:] == engine.tokenizer("Hà Nội", add_special_tokens=False)["input_ids"]


async def test_a_start_token_that_the_model_lacks_is_named(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.tokenizer = Kind(("<x>",), None, None).tokenizer()
    response = await client.post("/generate", json={"prompt": "hi", "add_bos": True, "stream": True})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "no_start_token", "add_bos")


async def test_several_prompts_keep_their_order(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = (await client.post("/generate", json={"prompt": ["a", "bcd", "ef"], "max_tokens": 2})).json()
    assert [(output["index"], output["prompt_tokens"]) for output in answer["outputs"]] == [(0, 2), (1, 4), (2, 3)]
    assert answer["usage"] == {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15}
    assert sorted(len(call.token_ids) for call in engine.calls) == [2, 3, 4]


@pytest.mark.parametrize(
    ("body", "sampling"),
    [
        ({}, Sampling(max_tokens=128, temperature=1.0, top_p=1.0, seed=None, stop=(), logprobs=None)),
        (
            {"max_tokens": 1, "temperature": 0, "top_p": 0.5, "seed": 7, "stop": "x", "logprobs": 2},
            Sampling(max_tokens=1, temperature=0.0, top_p=0.5, seed=7, stop=("x",), logprobs=2),
        ),
        (
            {"stop": ["x", "y"], "logprobs": 0, "mask": None, "seed": None},
            Sampling(max_tokens=128, temperature=1.0, top_p=1.0, seed=None, stop=("x", "y"), logprobs=0),
        ),
        (
            {"temperature": 0, "repetition_penalty": 1.1},
            Sampling(
                max_tokens=128, temperature=0.0, top_p=1.0, seed=None, stop=(), logprobs=None, repetition_penalty=1.1
            ),
        ),
    ],
)
async def test_parameters_reach_the_engine(
    client: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any], sampling: Sampling
) -> None:
    assert (await client.post("/generate", json={"prompt": "hi", **body})).status_code == 200
    assert engine.calls[0].sampling == sampling


async def test_without_one_there_is_no_repetition_penalty(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post("/generate", json={"prompt": "hi"})
    assert engine.calls[0].sampling.repetition_penalty == 1.0


@pytest.mark.parametrize("penalty", ["0", "-1.1", "10.5", "NaN", "1e999", "null", "true", '"1.1"'])
async def test_bad_repetition_penalties_are_refused(
    client: httpx.AsyncClient, engine: FakeEngine, penalty: str
) -> None:
    content = f'{{"prompt": "hi", "repetition_penalty": {penalty}}}'
    response = await client.post("/generate", content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (422, "repetition_penalty")
    assert engine.calls == []


async def test_the_engine_service_hands_the_repetition_penalty_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import SamplingParams

    given: list[dict[str, Any]] = []

    async def run(self: EngineService, token_ids: list[int], parameters: dict[str, Any], mask: None) -> Any:
        given.append(parameters)
        for _ in ():
            yield

    monkeypatch.setattr(EngineService, "_run", run)
    sampling = Sampling(max_tokens=1, temperature=0.0, top_p=1.0, seed=None, stop=(), logprobs=None)
    nothing: Any = None
    engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=4))
    for one in (sampling, replace(sampling, repetition_penalty=1.1)):
        service = object.__new__(EngineService)
        service._engine, service._activations = engine, AskedActivations(nothing, nothing, nothing)
        assert [step async for step in service.generate([1], one, None, stream=False)] == []
    assert [SamplingParams(**parameters).repetition_penalty for parameters in given] == [1.0, 1.1]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_mask_reaches_the_engine(client: httpx.AsyncClient, engine: FakeEngine, stream: bool) -> None:
    response = await client.post("/generate?mask=zh", json={"prompt": ["a", "b"], "max_tokens": 1, "stream": stream})
    answer = events(response)[-2] if stream else response.json()
    stored = engine.library.masks["attnlrp-zh"]
    content = {"digest": stored.mask.digest, "neurons": 2}
    assert answer["mask"] == {"name": "attnlrp-zh", **content, "positions": "all"}
    assert [call.mask.wire for call in engine.calls if call.mask] == [stored.mask.digest] * 2


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "prompt[-4:]", "all+until=3"])
@pytest.mark.parametrize("where", ["query", "body", "both"])
async def test_positions_reach_the_engine(
    client: httpx.AsyncClient, engine: FakeEngine, positions: str, where: str
) -> None:
    query = {} if where == "body" else {"positions": positions}
    body = {} if where == "query" else {"positions": positions}
    response = await client.post("/generate", params={"mask": "zh", **query}, json={"prompt": "hi", **body})
    assert response.json()["mask"]["positions"] == positions
    assert engine.calls[0].mask.positions == Positions.parse(positions)


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_have_the_canonical_form_of_positions(
    client: httpx.AsyncClient, engine: FakeEngine, stream: bool
) -> None:
    body = {"prompt": "hi", "positions": "prompt[-4:]+generated[0:16]+until=7,3", "stream": stream}
    query = "mask=zh&positions=prompt[-4:]+generated[:16]+until=3,7"  # in which a plus is a space
    response = await client.post(f"/generate?{query}", json=body)
    answer = events(response)[-2] if stream else response.json()
    assert answer["mask"]["positions"] == "prompt[-4:]+generated[:16]+until=3,7"
    assert engine.calls[0].mask.positions == Positions((-4, None), (0, 16), (3, 7))


async def test_the_description_has_the_pattern_of_positions(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    (in_query,) = (each for each in document["paths"]["/generate"]["post"]["parameters"] if each["name"] == "positions")
    in_body = schemas["GenerateRequest"]["properties"]["positions"]
    for described in (in_query["schema"], in_body):
        assert described["anyOf"] == [{"type": "string", "pattern": PATTERN}, {"type": "null"}]
    assert schemas["MaskUsed"]["properties"]["positions"]["pattern"] == PATTERN


@pytest.mark.parametrize(
    ("query", "body", "status", "message"),
    [
        ({"mask": "zh", "positions": "prompt"}, {"positions": "all"}, 400, "the query says positions=prompt"),
        ({"positions": "prompt"}, {}, 400, "positions=prompt without a mask"),
        ({"mask": "zh", "positions": "all until=3"}, {"positions": "all"}, 400, "the query says positions=all+until=3"),
        ({"positions": "prompt[:4]"}, {}, 400, "positions=prompt[:4] without a mask"),
        ({"mask": "zh"}, {"positions": "first"}, 422, "positions: 'first': expected 'all', 'prompt', 'generated', a"),
        ({"mask": "zh", "positions": "first"}, {}, 422, "positions: 'first': expected 'all', 'prompt', 'generated', a"),
        ({"mask": "zh"}, {"positions": "generated[-1:]"}, 422, "positions: 'generated[-1:]': expected 'all', 'prompt'"),
        ({"mask": "zh"}, {"positions": "all+until=" + "1," * 40}, 422, "positions: 'all+until=1,1,1,1"),
        ({"mask": "zh"}, {"positions": ["all"]}, 422, "positions: Input should be a valid string"),
    ],
)
async def test_bad_positions_are_refused(
    client: httpx.AsyncClient, engine: FakeEngine, query: dict, body: dict, status: int, message: str
) -> None:
    response = await client.post("/generate", params=query, json={"prompt": "hi", **body})
    assert response.status_code == status
    assert response.json()["error"]["message"].startswith(message)
    assert engine.calls == []


async def test_scores_have_no_positions(client: httpx.AsyncClient) -> None:
    response = await client.post("/score", params={"mask": "zh", "positions": "prompt"}, json={"text": ["hi"]})
    assert response.status_code == 422


async def test_a_full_table_is_a_429_that_says_when_to_come_back(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.error = MaskTableFull("256 other masks are in use")
    response = await client.post("/generate?mask=zh", json={"prompt": "hi"})
    assert (response.status_code, response.json()["error"]["code"]) == (429, "mask_table_full")
    assert int(response.headers["retry-after"]) > 0


async def test_logprobs_are_given_per_token(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    token_id = engine.tokenizer("a", add_special_tokens=False)["input_ids"][0]
    answer = (await client.post("/generate", json={"prompt": "hi", "max_tokens": 2, "logprobs": 1})).json()
    first, second = answer["outputs"][0]["logprobs"]
    assert first == {
        "token_id": token_id,
        "token": "a",
        "logprob": -0.5,
        "top": [{"token_id": token_id, "token": "a", "logprob": -0.5}],
    }
    assert second["token"] == "b"


async def test_stream_of_one_prompt(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {"prompt": "hi", "max_tokens": 3, "stream": True, "logprobs": 0}
    *deltas, answer, done = events(await client.post("/generate", json=body))
    assert [(delta["index"], delta["text"], delta["finish_reason"]) for delta in deltas] == [
        (0, "a", None),
        (0, "b", None),
        (0, "c", "length"),
    ]
    assert [delta["logprobs"][0]["token"] for delta in deltas] == ["a", "b", "c"]
    assert answer["outputs"] == [
        {
            "index": 0,
            "text": "",
            "finish_reason": "length",
            "prompt_tokens": 3,
            "completion_tokens": 3,
            "logprobs": None,
        }
    ]
    assert answer["usage"]["total_tokens"] == 6
    assert done == "data: [DONE]"
    assert engine.calls[0].stream is True


async def test_stream_of_several_prompts(client: httpx.AsyncClient) -> None:
    body = {"prompt": ["a", "b", "c"], "max_tokens": 100, "stream": True}
    *deltas, answer, done = events(await client.post("/generate", json=body))
    texts = ["", "", ""]
    for delta in deltas:
        texts[delta["index"]] += delta["text"]
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == 100
    assert [output["completion_tokens"] for output in answer["outputs"]] == [100] * 3
    assert done == "data: [DONE]"


TYPES = {400: "invalid_request_error", 500: "server_error", 503: "service_unavailable_error"}
ERRORS = [
    (RejectedRequest("the prompt is too long"), 400, "rejected_request", "the prompt is too long"),
    (EngineDead("the engine has died"), 503, "engine_dead", "the engine has died"),
    (EngineBusy("generation is paused"), 503, "engine_busy", "generation is paused"),
    (FailedRequest("the engine failed"), 500, "request_failed", "the engine failed"),
    (RuntimeError("a secret path"), 500, "internal_error", "unexpected error; see the server's log"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "code", "message"), ERRORS)
async def test_an_error_before_the_first_token_is_an_http_error(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    stream: bool,
    error: Exception,
    status: int,
    code: str,
    message: str,
) -> None:
    engine.error = error
    response = await client.post("/generate", json={"prompt": ["a", "b"], "stream": stream})
    assert response.status_code == status
    assert response.json() == {"error": {"code": code, "message": message, "param": None, "type": TYPES[status]}}
    assert response.headers.get("Retry-After") == ("1" if status == 503 else None)
    assert engine.running == 0


@pytest.mark.parametrize(("error", "status", "code", "message"), ERRORS)
async def test_an_error_in_a_stream_is_its_last_event(
    client: httpx.AsyncClient, engine: FakeEngine, error: Exception, status: int, code: str, message: str
) -> None:
    engine.error, engine.error_after_tokens = error, 2
    response = await client.post("/generate", json={"prompt": "a", "stream": True})
    *deltas, last = events(response)
    assert response.status_code == 200
    assert [delta["text"] for delta in deltas] == ["a", "b"]
    assert last == {"error": {"code": code, "message": message, "param": None, "type": TYPES[status]}}


async def test_the_failure_of_one_prompt_stops_the_others(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.error, engine.error_after_tokens = RejectedRequest("too long"), 2
    response = await client.post("/generate", json={"prompt": ["a", "b", "c"], "max_tokens": 1000})
    assert response.status_code == 400
    assert (engine.running, engine.aborted) == (0, 3)


async def test_after_a_failure_the_next_request_is_answered(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for stream in (False, True):
        engine.error = RuntimeError("broken")
        await client.post("/generate", json={"prompt": "a", "stream": stream})
        engine.error = None
        assert (await client.post("/generate", json={"prompt": "a", "max_tokens": 1})).status_code == 200


async def test_a_dead_engine_is_an_error(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.is_dead = True
    response = await client.post("/generate", json={"prompt": "a"})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_dead"


class Caller:
    """An ASGI client that hangs up after some events, and may read slowly: `httpx` reads whole answers only."""

    def __init__(self, app: FastAPI, body: dict[str, Any], *, hang_up_after: int, reads_on: bool = True) -> None:
        self._app = app
        self._body = json.dumps(body).encode()
        self._left = hang_up_after
        self._reads_on = reads_on
        self._sent = False
        self._gone = asyncio.Event()

    async def call(self) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/generate",
            "raw_path": b"/generate",
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
        }
        await asyncio.wait_for(self._app(scope, self._receive, self._send), timeout=10)

    async def _receive(self) -> dict[str, Any]:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            self._left -= 1
            if self._left <= 0:
                self._gone.set()
                if not self._reads_on:
                    await asyncio.Event().wait()
        await asyncio.sleep(0)


@pytest.mark.parametrize("reads_on", [True, False], ids=["gone", "stopped reading"])
@pytest.mark.parametrize("wait_after_tokens", [1, 200, None], ids=["first token", "later", "endless"])
@pytest.mark.parametrize("prompts", [1, 3])
async def test_a_client_that_hangs_up_frees_the_engine(
    app: FastAPI, engine: FakeEngine, reads_on: bool, wait_after_tokens: int | None, prompts: int
) -> None:
    engine.wait_after_tokens = wait_after_tokens
    body = {"prompt": ["a"] * prompts, "max_tokens": 2**30, "stream": True}
    await Caller(app, body, hang_up_after=1, reads_on=reads_on).call()
    for _ in range(10):
        await asyncio.sleep(0)
    assert (engine.running, engine.aborted) == (0, prompts)
