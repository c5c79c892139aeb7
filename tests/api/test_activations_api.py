"""`activations` in the bodies of /generate and /score over a fake engine."""

import base64
import json
from typing import Any

import httpx
import numpy as np
import pytest

from crane_serve.engine.activations import ActivationRequest, ActivationsBusy, Reduction
from crane_serve.service.api.activations import MAX_LISTED
from tests.api.fake_engine import FakeEngine


def expected(layer: int, neurons: list[int], positions: range) -> list[Any]:
    """Values of the fake engine, by token."""
    return [pytest.approx([layer + n / 10 + 100 * at for n in neurons]) for at in positions]


async def test_generate_shows_all_tokens_but_the_last(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {"prompt": "hi", "max_tokens": 3, "activations": {"layers": [1], "neurons": {"0": [5, 2]}}}
    response = await client.post("/generate", json=body)
    assert response.status_code == 200
    seen = response.json()["outputs"][0]["activations"]
    assert seen == {
        "first": 0,
        "tokens": 5,  # three of the prompt, and two of three generated ones
        "layers": [
            {"layer": 0, "neurons": [5, 2], "values": expected(0, [5, 2], range(5))},
            {"layer": 1, "neurons": None, "values": expected(1, [0, 1, 2, 3, 4], range(5))},
        ],
    }
    assert engine.calls[0].activations == ActivationRequest({0: (5, 2), 1: None})


async def test_answers_to_others_have_no_such_field(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    generated = (await client.post("/generate", json={"prompt": "hi", "max_tokens": 3})).json()
    assert "activations" not in generated["outputs"][0]
    assert "activations" not in (await client.post("/score", json={"text": ["hi"]})).json()
    assert [call.activations for call in engine.calls] == [None, None]


async def test_a_stream_ends_with_them(client: httpx.AsyncClient) -> None:
    body = {"prompt": "hi", "max_tokens": 2, "stream": True, "activations": {"neurons": {"1": [4]}, "first": 2}}
    lines = (await client.post("/generate", json=body)).text.strip().split("\n\n")
    *deltas, answer = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert all("activations" not in delta for delta in deltas)
    layers = [{"layer": 1, "neurons": [4], "values": expected(1, [4], range(2, 4))}]
    assert answer["outputs"][0]["activations"] == {"first": 2, "tokens": 2, "layers": layers}


@pytest.mark.parametrize("return_tokens", [False, True])
async def test_score_shows_all_tokens_of_a_text(client: httpx.AsyncClient, return_tokens: bool) -> None:
    body = {"text": ["hi"], "return_tokens": return_tokens, "activations": {"layers": [0], "first": 1}}
    answer = (await client.post("/score", json=body)).json()
    layers = [{"layer": 0, "neurons": None, "values": expected(0, list(range(6)), range(1, 3))}]
    assert answer["activations"] == {"first": 1, "tokens": 2, "layers": layers}
    without = (await client.post("/score", json={"text": ["hi"], "return_tokens": return_tokens})).json()
    assert answer["scores"] == without["scores"]


@pytest.mark.parametrize(("end", "read"), [(2, 2), (3, 3), (9, 3)])
async def test_the_last_token_of_a_text_is_read_if_it_is_shown(
    client: httpx.AsyncClient, engine: FakeEngine, end: int, read: int
) -> None:
    body = {"text": ["hi"], "activations": {"layers": [0], "first": 1, "end": end}, "return_prompts": True}
    answer = (await client.post("/score", json=body)).json()
    assert answer["activations"]["tokens"] == min(end, 3) - 1
    assert [len(prompt) for prompt in answer["prompts"]] == [read] == [len(engine.calls[0].token_ids)]
    assert answer["scores"] == (await client.post("/score", json={"text": ["hi"]})).json()["scores"]


async def test_reductions_and_base64(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    wanted = {"layers": [0], "reduce": ["mean", "max"], "encoding": "base64"}
    answer = (await client.post("/score", json={"context": "a", "continuations": ["b"], "activations": wanted})).json()
    [layer] = answer["activations"]["layers"]
    assert layer.keys() == {"layer", "neurons", "mean", "max"}
    values = np.frombuffer(base64.b64decode(layer["max"]), dtype="<f4")
    assert values == pytest.approx([100 + n / 10 for n in range(6)])
    assert engine.calls[0].activations.reductions == (Reduction.MEAN, Reduction.MAX)


@pytest.mark.parametrize(
    ("path", "body", "wanted", "code", "message"),
    [
        ("/generate", {"prompt": ["a", "b"]}, {"layers": [0]}, "malformed_activations", "found 2 sequences"),
        ("/score", {"text": ["a", "b"]}, {"layers": [0]}, "malformed_activations", "found 2 sequences"),
        ("/score", {"text": ["abc"], "truncate": 1}, {"layers": [0]}, "malformed_activations", "no token is left"),
        ("/score", {"text": [""]}, {"layers": [0]}, "malformed_activations", "no token is left"),
        (
            "/score",
            {"context": "a", "continuations": ["bc", "de"]},
            {"layers": [0]},
            "malformed_activations",
            "found 2 sequences",
        ),
        ("/generate", {"prompt": "a"}, {}, "malformed_activations", "expected 'layers', 'neurons' or both"),
        (
            "/generate",
            {"prompt": "a"},
            {"layers": [2]},
            "malformed_activations",
            "layer 2: the model has the layers 0 to 1",
        ),
        *(
            ("/score", {"text": ["a"]}, {"neurons": {name: [0]}}, "malformed_activations", f"{name!r} is no layer")
            for name in ("-1", "a", "01", "1\n", "")
        ),
        ("/generate", {"prompt": "a"}, {"layers": [1, 1]}, "malformed_activations", "layer 1 is asked for twice"),
        (
            "/generate",
            {"prompt": "a"},
            {"layers": [1], "neurons": {"1": [0]}},
            "malformed_activations",
            "layer 1 is in 'layers' and in 'neurons'",
        ),
        (
            "/generate",
            {"prompt": "a"},
            {"neurons": {"1": [5]}},
            "malformed_activations",
            "layer 1, neuron 5: expected 0 to 4",
        ),
        (
            "/generate",
            {"prompt": "a"},
            {"neurons": {"1": [3, 3]}},
            "malformed_activations",
            "a neuron is asked for twice",
        ),
        ("/generate", {"prompt": "a"}, {"layers": [0], "first": 2}, "malformed_activations", "within the prompt's 2"),
        ("/generate", {"prompt": "a"}, {"layers": [0], "end": 0}, "malformed_activations", "an end behind it"),
        ("/generate", {"prompt": "a"}, {"layers": [0], "reduce": ["none", "max"]}, "malformed_activations", "reduce"),
        ("/generate", {"prompt": "a"}, {"layers": [0], "reduce": ["max", "max"]}, "malformed_activations", "reduce"),
    ],
)
async def test_what_cannot_be_shown_is_refused(
    client: httpx.AsyncClient, path: str, body: dict, wanted: dict, code: str, message: str
) -> None:
    response = await client.post(path, json={**body, "activations": wanted})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, "activations")
    assert message in error["message"]


@pytest.mark.parametrize(
    "wanted",
    [
        {"layers": [-1]},
        {"layers": ["a"]},
        {"layers": 1},
        {"neurons": {"1": []}},
        {"neurons": {"1": [0.5]}},
        {"neurons": [1]},
        {"layers": [0], "reduce": "median"},
        {"layers": [0], "reduce": []},
        {"layers": [0], "encoding": "hex"},
        {"layers": [0], "tokens": 3},
        [0],
    ],
)
async def test_a_malformed_wish_is_a_malformed_body(client: httpx.AsyncClient, engine: FakeEngine, wanted: Any) -> None:
    response = await client.post("/generate", json={"prompt": "a", "activations": wanted})
    assert (response.status_code, response.json()["error"]["code"]) == (422, "malformed_body")
    assert response.json()["error"]["param"].startswith("activations")
    assert not engine.calls


async def test_more_values_than_lists_may_have_need_base64(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    tokens = MAX_LISTED // 11 + 1
    engine.max_model_tokens = 2 * tokens
    body = {"prompt": "a" * tokens, "max_tokens": 1, "activations": {"layers": [0, 1]}}
    response = await client.post("/generate", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "too_many_activations")
    assert f"expected at most {MAX_LISTED}, or encoding 'base64'" in error["message"]
    body["activations"]["encoding"] = "base64"
    answer = (await client.post("/generate", json=body)).json()["outputs"][0]["activations"]
    assert answer["tokens"] == tokens + 1


async def test_a_server_without_activations_says_how_to_have_them(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.has_activations = False
    for path, body in (("/generate", {"prompt": "a"}), ("/score", {"text": ["ab"]})):
        response = await client.post(path, json={**body, "activations": {"layers": [0]}})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "activations_off", "activations")


async def test_too_many_at_once_is_temporary(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.error = ActivationsBusy("16 requests are asking for activations; wait for one to end")
    response = await client.post("/generate", json={"prompt": "a", "activations": {"layers": [0]}})
    assert (response.status_code, response.json()["error"]["code"]) == (429, "activations_busy")
    assert response.headers["Retry-After"] == "1"
