import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from crane_serve.engine.vllm_routes import CARRYING, MaskGuard, guard, refusal

XARGS = {"vllm_xargs": {"crane_mask": "zh", "crane_positions": "generated"}}
SCHEMA = {"type": "object", "properties": {"crane_height": {"type": "number"}, "mask": {"type": "string"}}}


def form(**fields: str) -> tuple[bytes, str]:
    parts = [
        f'--B\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields.items()
    ]
    file = '--B\r\nContent-Disposition: form-data; name="file"; filename="crane_mask.wav"\r\n\r\ncrane\r\n--B--\r\n'
    return ("".join(parts) + file).encode(), "multipart/form-data; boundary=B"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *((path, XARGS) for path, place in CARRYING.items() if place == ("vllm_xargs",)),
        ("/v1/completions/", XARGS),
        ("/inference/v1/generate", {"sampling_params": {"extra_args": XARGS["vllm_xargs"]}}),
        ("/v1/completions", {**XARGS, "use_beam_search": False}),
        # What somebody writes about cranes and masks is no request for a mask.
        ("/v1/completions", {"prompt": 'A crane. {"crane_mask": "zh"}', "user": "mask"}),
        ("/v1/chat/completions", {**XARGS, "tools": [{"type": "function", "function": {"parameters": SCHEMA}}]}),
        ("/v1/chat/completions", {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}),
        ("/v1/messages", {"messages": [{"content": [{"type": "tool_use", "input": {"crane_mask": 1}}]}]}),
        ("/tokenize", {"prompt": "crane", "chat_template_kwargs": {"mask": 1}}),
    ],
)
def test_what_vllm_carries_and_what_asks_for_no_mask_passes(path: str, body: object) -> None:
    assert refusal(path, "timeout=3&user=mask", json.dumps(body).encode()) is None


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"vllm_xargs": {"crane_activations": "x"}}),
        ("/inference/v1/generate", {"sampling_params": {"extra_args": {"crane_activations": {"key": "x"}}}}),
    ],
)
def test_activations_that_no_route_returns_are_refused(path: str, body: object) -> None:
    assert "no route of vLLM returns activations" in str(refusal(path, "", json.dumps(body).encode()))


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/v1/completions", {"crane_mask": "zh"}, "'crane_mask'"),
        ("/v1/completions", {"mask": "zh"}, "'mask'"),
        ("/v1/completions", {"vllm_xargs": {"mask": "zh"}}, "'vllm_xargs.mask'"),
        ("/v1/completions", {"masks": "zh"}, "'masks'"),
        ("/v1/completions", {"maks": "zh"}, "'maks'"),
        ("/v1/completions", {"Neuron_Mask": "zh"}, "'Neuron_Mask'"),
        ("/v1/completions", {**XARGS, "positions": "all"}, "'positions'"),
        ("/v1/completions", {"position": "all"}, "'position'"),
        ("/v1/completions", {"metadata": {"language_mask": "zh"}}, "'metadata.language_mask'"),
        ("/v1/embeddings", {"masks": "zh"}, "/v1/embeddings cannot"),
        ("/v1/completions", {"vllm_xargs": {"Crane_Mask": "zh"}}, "'vllm_xargs.Crane_Mask'"),
        ("/v1/completions", {"vllm_xargs": {"x": [{"crane_mask": "zh"}]}}, "'vllm_xargs.x.0.crane_mask'"),
        ("/v1/completions", {"extra_body": XARGS}, "'extra_body.vllm_xargs.crane_"),
        ("/v1/completions", {"sampling_params": {"extra_args": {"crane_mask": "zh"}}}, "'sampling_params.extra_args"),
        ("/v1/completions", {**XARGS, "use_beam_search": True}, "beam search"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "crane_positions": "all"}]}, "crane_positions"),
        ("/inference/v1/generate", XARGS, "sampling_params.extra_args.crane_mask"),
        ("/generative_scoring", XARGS, "/generative_scoring cannot"),
        ("/invocations", XARGS, "/invocations cannot"),
        ("/v1/embeddings", [XARGS], "/v1/embeddings cannot"),
        ("/anything/else", {"mask": None}, "'mask'"),
    ],
)
def test_a_mask_that_would_be_ignored_is_refused_by_name(path: str, body: object, named: str) -> None:
    reason = refusal(path, "", json.dumps(body).encode())
    assert reason is not None
    assert named in reason


@pytest.mark.parametrize(
    "body",
    [
        b'{"vllm_xargs": {"crane_mask": "zh"}, "vllm_xargs": {}}',
        b'{"vllm_xargs": {"crane_mask": "zh", "crane_mask": "vi"}}',
        b'{"\\u0063rane_mask": "zh"}',
        b'{"M\\u0041SK": "zh"}',
        b'{"\\u0070ositions": "all"}',
        b'{"cr\\u0061ne_mask": "zh"}',
        '{"crane_mask": "zh"}'.encode("utf-16"),
        '{"crane_mask": "zh"}'.encode("utf-32-be"),
        b'\xef\xbb\xbf{"crane_mask": "zh"}',
        b'{"crane": ' + b"[" * 100_000,
    ],
)
def test_a_mask_in_an_odd_encoding_is_still_seen(body: bytes) -> None:
    assert refusal("/v1/completions", "", body) is not None


@pytest.mark.parametrize(
    "query", ["mask=zh", "masks=zh", "masked=1", "positions=all", "a=b&MASK", "crane_mask=zh", "crane%5Fpositions=all"]
)
def test_query_parameters_that_ask_for_a_mask_are_refused(query: str) -> None:
    reason = refusal("/v1/completions", query, b"")
    assert reason is not None
    assert "query parameter" in reason


def test_forms_are_searched_but_not_their_files() -> None:
    path = "/v1/audio/transcriptions"
    assert refusal(path, "", *form(prompt="the crane", vllm_xargs='{"seed": 1}')) is None
    for fields in (
        {"crane_mask": "zh"},
        {"vllm_xargs": json.dumps(XARGS["vllm_xargs"])},
        {"vllm_xargs[crane_mask]": "zh"},
    ):
        assert "cannot run under a mask" in str(refusal(path, "", *form(**fields)))


def test_what_is_no_json_is_left_to_vllm() -> None:
    assert refusal("/v1/completions", "", b'{"crane_mask": ') is None
    assert refusal("/v1/completions", "", b"crane_mask=zh") is None


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(await request.body())


async def count(request: Request) -> StreamingResponse:
    async def numbers() -> AsyncIterator[str]:
        for number in range(3):
            yield f"{number}\n"
            await asyncio.sleep(0.2)

    return StreamingResponse(numbers())


async def talk(websocket: WebSocket) -> None:
    await websocket.accept()
    try:
        while True:
            await websocket.send_text(await websocket.receive_text())
    except WebSocketDisconnect:
        pass


def toy_app(**options: bool) -> Starlette:
    routes = [Route(path, echo, methods=["POST"]) for path in ("/v1/completions", "/generative_scoring")]
    app = Starlette(routes=[*routes, Route("/count", count), WebSocketRoute("/v1/realtime", talk)])
    guard(app, **options)
    return app


def test_a_refusal_has_the_shape_of_vllms_errors() -> None:
    answer = TestClient(toy_app()).post("/generative_scoring", json=XARGS)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("BadRequestError", "crane_mask", 400)
    assert "/generative_scoring" in error["message"]


@pytest.mark.parametrize("content", [b"", b"\x00\xffcrane", json.dumps(XARGS).encode(), b"x" * 5_000_000])
def test_bodies_reach_the_app_as_they_were_sent(content: bytes) -> None:
    assert TestClient(toy_app()).post("/v1/completions", content=content).content == content


async def run(app: MaskGuard | Starlette, chunks: list[bytes], path: str = "/v1/completions") -> list[dict]:
    """The messages of the answer to a body that comes in chunks."""
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": []}
    sent: list[dict] = []
    incoming = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    incoming.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> dict:
        return incoming.pop(0) if incoming else {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_a_mask_is_seen_across_chunks(size: int) -> None:
    body = json.dumps({"prompt": "x" * 100, "crane_mask": "zh"})
    for encoded in (body.encode(), body.encode("utf-32-le")):
        chunks = [encoded[start : start + size] for start in range(0, len(encoded), size)]
        assert (await run(toy_app(), chunks))[0]["status"] == 400
    harmless = json.dumps({"prompt": "x" * 100}).encode()
    chunks = [harmless[start : start + size] for start in range(0, len(harmless), size)]
    answer = await run(toy_app(), chunks)
    assert (answer[0]["status"], answer[1]["body"]) == (200, harmless)


async def test_the_app_hears_of_a_client_that_leaves() -> None:
    heard = []

    async def app(scope: dict, receive, send) -> None:
        heard.extend([(await receive())["type"], (await receive())["type"], (await receive())["type"]])

    await run(MaskGuard(app), [b"{}"])
    assert heard == ["http.request", "http.request", "http.disconnect"]


async def test_a_stream_stays_a_stream() -> None:
    times = []

    async def send(message: dict) -> None:
        if message.get("body"):
            times.append(time.monotonic())

    async def receive() -> dict:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "GET", "path": "/count", "query_string": b"", "headers": []}
    await toy_app()(scope, receive, send)
    assert len(times) == 3
    assert times[2] - times[0] > 0.3


def test_queries_are_refused_unless_another_app_translates_them() -> None:
    assert TestClient(toy_app()).post("/v1/completions?mask=zh").status_code == 400
    app = toy_app(query=False)
    guard(app, query=False)  # replaces the first
    assert [middleware.cls for middleware in app.user_middleware] == [MaskGuard]
    assert TestClient(app).post("/v1/completions?mask=zh").is_success
    assert TestClient(app).post("/v1/completions?mask=zh", json={"mask": "zh"}).status_code == 400


def test_the_guard_can_be_replaced_when_the_app_is_already_built() -> None:
    app = toy_app()
    app.middleware_stack = app.build_middleware_stack()
    guard(app, query=False)
    assert TestClient(app).post("/v1/completions?mask=zh").is_success


def test_under_a_mount_the_route_counts() -> None:
    client = TestClient(Starlette(routes=[Mount("/vllm", toy_app())]))
    assert client.post("/vllm/v1/completions", json=XARGS).is_success
    assert client.post("/vllm/generative_scoring", json=XARGS).status_code == 400


def test_a_websocket_is_closed_when_it_asks_for_a_mask() -> None:
    client = TestClient(toy_app())
    with client.websocket_connect("/v1/realtime") as socket:
        socket.send_text('{"type": "session.update"}')
        assert socket.receive_text() == '{"type": "session.update"}'
        socket.send_text('{"type": "session.update", "session": {"crane_mask": "zh"}}')
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_text()
    assert closed.value.code == 1008
    assert "crane_mask" in closed.value.reason
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/realtime?mask=zh"):
        pass


# Every route of a real app of vLLM's, built without an engine, in a process whose imports are in the given order.
IN_VLLM = """
import asyncio, importlib.util, json, sys
from types import SimpleNamespace

first = sys.argv[1]
if first == "vllm":
    from vllm.entrypoints.openai.api_server import build_app
    import vllm.entrypoints.generate.beam_search.offline
    import vllm.entrypoints.launchers.run_batch
from crane_serve.engine import vllm_routes
vllm_routes.install()
if first == "plugin":
    assert "vllm.entrypoints.launchers.app" not in sys.modules
    from vllm.entrypoints.openai.api_server import build_app
    import vllm.entrypoints.generate.beam_search.offline
    import vllm.entrypoints.launchers.run_batch
    vllm_routes.install()

from vllm.utils.argparse_utils import FlexibleArgumentParser
from starlette.testclient import TestClient
place = "common" if importlib.util.find_spec("vllm.entrypoints.common.cli_args") else "launchers"
make_arg_parser = importlib.import_module(f"vllm.entrypoints.{place}.cli_args").make_arg_parser
args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", "x", "--enable-scale-out", "--api-key", "k"])
app = build_app(args, ("generate", "transcription", "realtime"), None)
client = TestClient(app)
answers = {}
for route in app.routes:
    if "POST" in (getattr(route, "methods", None) or ()):
        path = route.path.replace("{response_id}", "r")
        answer = client.post(path, json={"crane_mask": "zh"}, headers={"authorization": "Bearer k"})
        answers[path] = [answer.status_code, answer.text]
unauthorised = client.post("/v1/completions", json={"crane_mask": "zh"}).status_code

from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
from vllm.entrypoints.launchers import run_batch
from vllm.renderers.inputs.preprocess import parse_dec_only_prompt
from vllm.sampling_params import BeamSearchParams

def error(call, *arguments):
    try:
        result = call(*arguments)
        return asyncio.run(result) if asyncio.iscoroutine(result) else repr(result)
    except ValueError as error:
        return str(error)

params = BeamSearchParams(beam_width=2, max_tokens=2)
params.extra_args = {"crane_mask": "zh"}
lines = {
    name: json.dumps({"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": body})
    for name, body in json.loads(sys.argv[2]).items()
}
print(json.dumps({
    "answers": answers,
    "unauthorised": unauthorised,
    "beam": error(BeamSearchOfflineMixin.beam_search, None, ["x"], params),
    "prompt": error(parse_dec_only_prompt, {"prompt": "x", "crane_mask": "zh"}),
    "good prompt": error(parse_dec_only_prompt, {"prompt": "x"}),
    "lines": {name: error(run_batch.BatchRequestInput.model_validate_json, line) for name, line in lines.items()},
}))
"""


@pytest.mark.engine  # starts none, but takes as long
@pytest.mark.parametrize("first", ["vllm", "plugin"])
def test_every_route_of_vllm_is_guarded_whatever_is_imported_first(first: str, tmp_path) -> None:
    chat = {"messages": [{"role": "user", "content": "a crane"}]}
    lines = json.dumps({"plain": chat, "good": {**chat, **XARGS}, "bad": {**chat, "crane_mask": "zh"}})
    command = [sys.executable, "-c", IN_VLLM, first, lines]
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}  # more routes
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(CARRYING) <= set(result["answers"]), "CARRYING names a route that vLLM does not have"
    assert len(result["answers"]) > len(CARRYING) + 30
    for path, (status, text) in result["answers"].items():
        assert status == 400, (path, text)
        assert "'crane_mask'" in text, (path, text)
        assert ("would be ignored" if path in CARRYING else f"{path} cannot run under a mask") in text
    assert result["unauthorised"] == 401  # who may not ask at all learns nothing about masks
    assert "beam search cannot be masked" in result["beam"]
    assert "'crane_mask' would be ignored in a prompt" in result["prompt"]
    assert result["good prompt"] == "{'prompt': 'x'}"
    assert "request 'b' of the batch: 'crane_mask' would be ignored" in result["lines"]["bad"]
    for name in ("plain", "good"):
        assert "custom_id='b'" in result["lines"][name]


async def test_the_guard_costs_little() -> None:
    async def app(scope: dict, receive, send) -> None:
        await receive()

    guarded, body = MaskGuard(app), json.dumps({"prompt": "x" * 2000}).encode()
    start = time.perf_counter()
    for _ in range(1000):
        await run(guarded, [body])
    assert time.perf_counter() - start < 1.0  # below a millisecond each, with the client's share; measured 0.03 ms
