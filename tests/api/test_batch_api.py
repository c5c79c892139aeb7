"""POST /generate/batch and /score/batch over a fake engine: lines in, lines out, and what happens when a side fails."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from clients import AsyncCraneClient, CraneClient, GenerateItem
from crane_serve.common.masks import ResolvedMask
from crane_serve.engine.service import RejectedRequest, Sampling, Step
from crane_serve.service.api import batch
from crane_serve.service.api.app import create_app
from crane_serve.service.api.context import RequestContext
from crane_serve.service.api.errors import ApiError
from crane_serve.service.settings import ApiSettings
from tests.api.fake_engine import NEURONS, FakeEngine

NDJSON = {"content-type": "application/x-ndjson"}
END = {"done": True}


class CountingEngine(FakeEngine):
    """Knows how many sequences ran at most at once, and refuses to encode what holds `refused`."""

    def __init__(self) -> None:
        super().__init__()
        self.most_running = 0
        self.refused = "too long"
        self.encodings = 0

    async def encode(self, texts: Sequence[str]) -> list[list[int]]:
        self.encodings += 1
        if any(self.refused in text for text in texts):
            raise RejectedRequest("a text is too long")
        return await super().encode(texts)

    async def generate(
        self, prompt_ids: list[int], sampling: Sampling, mask: ResolvedMask | None, *, stream: bool
    ) -> AsyncGenerator[Step]:
        async for step in super().generate(prompt_ids, sampling, mask, stream=stream):
            self.most_running = max(self.most_running, self.running)
            yield step


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()


def service(engine: FakeEngine, **settings: Any) -> FastAPI:
    async def start() -> FakeEngine:
        return engine

    app = create_app(start, ApiSettings(playground=False, **settings))  # type: ignore[arg-type]
    app.state.engine = engine  # no server starts it in these tests
    return app


@pytest.fixture
def app(engine: CountingEngine) -> FastAPI:
    return service(engine)


def ndjson(lines: Sequence[Any]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def parsed(content: bytes) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The answers in the order of the lines, and the last line."""
    assert content.endswith(b"\n")
    *answers, end = [json.loads(line) for line in content.splitlines()]
    assert [answer["index"] for answer in sorted(answers, key=lambda answer: answer["index"])] == [*range(len(answers))]
    return sorted(answers, key=lambda answer: answer["index"]), end


async def ask(app: FastAPI, route: str, content: bytes, headers: dict[str, str] = NDJSON) -> httpx.Response:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://crane") as client:
        return await client.post(route, content=content, headers=headers)


class Call:
    """An ASGI call whose both directions the test holds in its hands.

    Pieces of the input are taken from `input` (None ends it, an exception is raised); `output` has what was sent. While
    `reads` is not set, the client takes nothing.
    """

    def __init__(self, app: FastAPI, path: str = "/generate/batch") -> None:
        self.input: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self.output: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.reads = asyncio.Event()
        self.reads.set()
        self.gone = asyncio.Event()
        self.received = 0
        self.context = RequestContext("test")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/x-ndjson")],
            "crane": self.context,
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))
        self._ended = False
        self._rest = b""

    async def _receive(self) -> dict[str, Any]:
        if not self._ended:
            waits = [asyncio.create_task(self.input.get()), asyncio.create_task(self.gone.wait())]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            taken = waits[0].result() if waits[0].done() else None
            for wait in waits:
                wait.cancel()
            if isinstance(taken, Exception):
                raise taken
            if not self.gone.is_set():
                self._ended = taken is None
                self.received += len(taken or b"")
                return {"type": "http.request", "body": taken or b"", "more_body": taken is not None}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.reads.wait()
        self.output.put_nowait(message)

    def write(self, *lines: Any, end: bool = False) -> None:
        self.input.put_nowait(ndjson(lines))
        if end:
            self.input.put_nowait(None)

    async def line(self) -> dict[str, Any]:
        """The next line of the answer."""
        while b"\n" not in self._rest:
            message = await asyncio.wait_for(self.output.get(), timeout=10)
            self._rest += message.get("body", b"")
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def lines(self) -> list[dict[str, Any]]:
        """All further lines; the call must end."""
        await asyncio.wait_for(self.task, timeout=10)
        while not self.output.empty():
            self._rest += self.output.get_nowait().get("body", b"")
        return [json.loads(line) for line in self._rest.splitlines()]


async def settled() -> None:
    """Until nothing moves any more, by all that can be seen: many passes of the loop."""
    for _ in range(5000):
        await asyncio.sleep(0)


async def test_thousands_of_lines_each_under_its_own_mask(app: FastAPI, engine: CountingEngine) -> None:
    masks = [None, "none", *NEURONS, "zh,vi", "zh@0.5"]
    wanted = [masks[index % len(masks)] for index in range(3000)]
    lines = [
        {"id": f"line {index}", "prompt": f"text {index}", "max_tokens": 1 + index % 4, "mask": mask}
        for index, mask in enumerate(wanted)
    ]
    response = await ask(app, "/generate/batch", ndjson(lines))
    assert (response.status_code, response.headers["content-type"]) == (200, "application/x-ndjson")
    assert "content-length" not in response.headers
    answers, end = parsed(response.content)
    assert end == {**END, "lines": 3000, "failed": 0}
    for index, answer in enumerate(answers):
        resolved = engine.library.resolve(wanted[index])
        used = answer["answer"]["mask"]
        assert (answer["id"], answer["status"]) == (f"line {index}", 200)
        assert answer["answer"]["outputs"][0]["text"] == "abcd"[: 1 + index % 4]
        assert (used and used["name"]) == (resolved and resolved.name)
    prompts = {tuple(engine.tokenizer(line["prompt"])["input_ids"]): line["mask"] for line in lines}
    for call in engine.calls:
        resolved = engine.library.resolve(prompts[tuple(call.token_ids)])
        assert (call.mask and call.mask.wire) == (resolved and resolved.wire)
    assert 64 < engine.most_running <= batch.WINDOW
    assert engine.encodings < 300
    assert app.state.gate.sequences == 0


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/generate", {"prompt": "hi", "max_tokens": 3, "logprobs": 1, "mask": "zh", "positions": "prompt"}),
        ("/generate", {"prompt": "hi", "max_tokens": 1}),
        ("/score", {"text": ["a", "bc", ""], "mask": "vi"}),
        ("/score", {"context": "ab ", "continuations": ["c", "de"]}),
    ],
)
async def test_a_line_is_answered_as_a_request_of_its_own(app: FastAPI, route: str, body: dict[str, Any]) -> None:
    alone = (await ask(app, route, json.dumps(body).encode(), {"content-type": "application/json"})).json()
    answers, end = parsed((await ask(app, f"{route}/batch", ndjson([{**body, "id": 7}, body]))).content)
    assert answers == [
        {"index": 0, "id": 7, "status": 200, "answer": alone},
        {"index": 1, "id": None, "status": 200, "answer": alone},
    ]
    assert end["failed"] == 0


BAD: list[tuple[bytes, int, str, str | None, Any]] = [
    (b"not json", 422, "malformed_body", None, None),
    (b'{"prompt": "\xff"}', 422, "malformed_body", None, None),
    (b'{"prompt": "\\ud800"}', 422, "malformed_body", None, None),
    (b"[" * 10_000, 422, "malformed_body", None, None),
    (b'["a"]', 422, "malformed_body", None, None),
    (b"{}", 422, "malformed_body", "prompt", None),
    (b'{"id": 3, "promt": "a", "prompt": "a"}', 422, "malformed_body", "promt", 3),
    (b'{"id": "x", "prompt": ["a", "b"]}', 422, "malformed_body", "prompt", "x"),
    (b'{"id": "x", "prompt": "a", "stream": true}', 422, "malformed_body", "stream", "x"),
    (b'{"id": true, "prompt": "a"}', 422, "malformed_body", "id", None),
    (b'{"id": [1], "prompt": "a"}', 422, "malformed_body", "id", None),
    (b'{"prompt": "a", "temperature": NaN}', 422, "malformed_body", "temperature", None),
    (b'{"prompt": "a", "temperature": 1e999}', 422, "malformed_body", "temperature", None),
    (b'{"prompt": "a", "max_tokens": "1"}', 422, "malformed_body", "max_tokens", None),
    (b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", 422, "malformed_body", None, None),
    (b'{"id": 1, "prompt": "a", "mask": "fr"}', 404, "unknown_mask", "mask", 1),
    (b'{"id": 1, "prompt": "a", "mask": "broken"}', 409, "invalid_mask", "mask", 1),
    (b'{"id": 1, "prompt": "a", "mask": "zh,"}', 400, "malformed_mask", "mask", 1),
    (b'{"id": 1, "prompt": "a", "positions": "prompt"}', 400, "mask_conflict", "positions", 1),
    (b'{"id": 1, "prompt": "this is too long"}', 400, "rejected_request", None, 1),
]


@pytest.mark.parametrize(("line", "status", "code", "param", "name"), BAD, ids=lambda value: repr(value)[:40])
async def test_a_bad_line_fails_alone(
    app: FastAPI, engine: CountingEngine, line: bytes, status: int, code: str, param: str | None, name: Any
) -> None:
    good = b'{"prompt": "a", "max_tokens": 1}'
    answers, end = parsed((await ask(app, "/generate/batch", b"\n".join([good, line, good]))).content)
    assert [answer["status"] for answer in answers] == [200, status, 200]
    assert (answers[1]["id"], answers[1]["error"]["code"], answers[1]["error"]["param"]) == (name, code, param)
    assert sorted(answers[1]["error"]) == ["code", "message", "param", "type"]
    assert end == {**END, "lines": 3, "failed": 1}
    assert len(engine.calls) == 2


async def test_the_querys_mask_is_for_lines_that_name_none(app: FastAPI, engine: CountingEngine) -> None:
    lines = [{"text": ["a"]}, {"text": ["a"], "mask": "attnlrp-zh"}, {"text": ["a"], "mask": "vi"}]
    lines += [{"text": ["a"], "mask": "none"}]
    answers, end = parsed((await ask(app, "/score/batch?mask=zh", ndjson(lines))).content)
    assert [answer["status"] for answer in answers] == [200, 200, 400, 400]
    assert {answer["answer"]["mask"]["name"] for answer in answers[:2]} == {"attnlrp-zh"}
    assert answers[2]["error"]["code"] == "mask_conflict"
    assert end["failed"] == 2
    assert len(engine.calls) == 2


async def test_the_querys_positions(app: FastAPI) -> None:
    lines = [{"prompt": "a", "mask": "zh"}, {"prompt": "a"}, {"prompt": "a", "mask": "zh", "positions": "all"}]
    answers, _ = parsed((await ask(app, "/generate/batch?positions=prompt", ndjson(lines))).content)
    assert answers[0]["answer"]["mask"]["positions"] == "prompt"
    assert [answer["status"] for answer in answers] == [200, 400, 400]


@pytest.mark.parametrize("size", [1, 3, 64])
async def test_the_input_may_be_cut_anywhere(app: FastAPI, size: int) -> None:
    content = '\r\n\n{"text": ["á"]}\r\n  \n{"text": ["b"]}\n\n\n{"text": ["ç"]}'.encode()
    call = Call(app, "/score/batch")
    for start in range(0, len(content), size):
        call.input.put_nowait(content[start : start + size])
    call.input.put_nowait(None)
    *answers, end = await call.lines()
    assert sorted(answer["index"] for answer in answers) == [0, 1, 2]
    assert [answer["answer"]["scores"][0]["bytes"] for answer in sorted(answers, key=lambda a: a["index"])] == [2, 1, 2]
    assert end == {**END, "lines": 3, "failed": 0}


async def test_nothing_is_answered_with_an_end(app: FastAPI) -> None:
    response = await ask(app, "/generate/batch", b"\n\n")
    assert response.content == b'{"done":true,"lines":0,"failed":0}\n'


async def test_a_line_is_answered_before_the_next_is_written(app: FastAPI) -> None:
    call = Call(app)
    for index in range(3):
        call.write({"prompt": "a", "max_tokens": 1, "id": index})
        assert (await call.line())["id"] == index
    call.input.put_nowait(None)
    assert await call.lines() == [{**END, "lines": 3, "failed": 0}]


async def test_a_client_that_writes_all_before_it_reads(app: FastAPI, engine: CountingEngine) -> None:
    call = Call(app)
    call.reads.clear()
    for index in range(2000):
        call.write({"prompt": "a", "max_tokens": 1, "id": index})
    call.input.put_nowait(None)
    while not call.input.empty():  # the server reads on although nobody takes its answers
        await asyncio.sleep(0)
    await settled()
    assert len(engine.calls) == batch.WINDOW
    assert app.state.gate.sequences == 0
    call.reads.set()
    *answers, end = await call.lines()
    assert sorted(answer["id"] for answer in answers) == [*range(2000)]
    assert end["done"] is True


async def test_reading_stops_when_the_buffer_is_full(engine: CountingEngine) -> None:
    app = service(engine, max_batch_buffer_bytes=10_000)
    engine.wait_after_tokens = 0
    call = Call(app)
    for _ in range(2000):
        call.write({"prompt": "a" * 100, "max_tokens": 1})
    await settled()
    length = len(ndjson([{"prompt": "a" * 100, "max_tokens": 1}]))
    started = batch.WINDOW * length
    assert started < call.received <= started + 10_000 + 2 * length
    assert engine.running == batch.WINDOW
    call.gone.set()
    call.task.cancel()
    await asyncio.gather(call.task, return_exceptions=True)
    assert (engine.running, app.state.gate.sequences) == (0, 0)


async def test_a_line_that_is_too_long_is_skipped(engine: CountingEngine) -> None:
    app = service(engine, max_body_bytes=1024)
    long = ndjson([{"prompt": "a" * 5000, "id": "long"}])
    call = Call(app)
    call.write({"prompt": "a", "max_tokens": 1})
    for start in range(0, len(long), 100):
        call.input.put_nowait(long[start : start + 100])
    call.write({"prompt": "b", "max_tokens": 1}, end=True)
    *answers, end = await call.lines()
    first, skipped, last = sorted(answers, key=lambda answer: answer["index"])
    assert (first["status"], last["status"]) == (200, 200)
    assert (skipped["status"], skipped["error"]["code"], skipped["id"]) == (413, "line_too_long", None)
    assert skipped["error"]["message"] == "a line may have 1024 bytes at most"
    assert end == {**END, "lines": 3, "failed": 1}


@pytest.mark.parametrize("route", ["/generate/batch", "/score/batch"])
async def test_a_batch_waits_while_the_engine_is_full(route: str) -> None:
    class SlowScores(CountingEngine):
        scoring = 0

        async def score(self, token_ids: list[int], mask: ResolvedMask | None) -> Any:
            self.scoring += 1
            self.most_running = max(self.most_running, self.scoring)
            await asyncio.sleep(0)
            try:
                return await super().score(token_ids, mask)
            finally:
                self.scoring -= 1

    engine = SlowScores()
    app = service(engine, max_sequences=5)
    lines: list[Any] = [{"prompt": "a", "max_tokens": 5}] * 40
    if route == "/score/batch":
        lines = [{"text": ["a", "b", "c", "d", "e", "f", "g", "h"]}] * 20
    answers, end = parsed((await ask(app, route, ndjson(lines))).content)
    assert {answer["status"] for answer in answers} == {200}
    assert end["failed"] == 0
    assert engine.most_running == 5
    assert app.state.gate.sequences == 0


async def test_single_requests_are_answered_beside_a_batch(app: FastAPI, engine: CountingEngine) -> None:
    engine.wait_after_tokens = 1
    call = Call(app)
    call.write(*[{"prompt": "a", "max_tokens": 2}] * 5000)
    await settled()
    assert app.state.gate.sequences == engine.running == batch.WINDOW
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    single = await ask(app, "/generate", body, {"content-type": "application/json"})
    assert single.status_code == 200
    call.gone.set()
    assert await call.lines() == []


@pytest.mark.parametrize("when", ["reading", "all read", "cancelled", "stopped reading"])
async def test_a_client_that_goes_frees_the_engine(app: FastAPI, engine: CountingEngine, when: str) -> None:
    engine.wait_after_tokens = None if when == "stopped reading" else 1
    call = Call(app)
    if when == "stopped reading":
        call.reads.clear()
    call.write(*[{"prompt": "a", "max_tokens": 2**30 if when != "stopped reading" else 1}] * 300, end=when != "reading")
    await settled()
    if when == "cancelled":
        call.task.cancel()
        await asyncio.gather(call.task, return_exceptions=True)
    else:
        call.gone.set()
        assert await call.lines() == []
    assert engine.running == 0
    assert engine.aborted == (0 if when == "stopped reading" else batch.WINDOW)
    assert app.state.gate.sequences == call.context.sequences == 0


async def test_an_engine_that_dies_ends_the_call(app: FastAPI, engine: CountingEngine) -> None:
    call = Call(app)
    call.write({"prompt": "a", "max_tokens": 1})
    assert (await call.line())["status"] == 200
    engine.is_dead = True
    call.write(*[{"prompt": "a", "max_tokens": 1, "id": 1}] * 500)  # and the input does not end
    *answers, end = await call.lines()
    assert [answer["status"] for answer in answers] == [503] * 500
    assert {(answer["error"]["code"], answer["id"]) for answer in answers} == {("engine_dead", 1)}
    assert (end["done"], end["lines"], end["failed"], end["error"]["code"]) == (False, 501, 500, "engine_dead")


async def test_unforeseen_errors_are_lines_without_details(app: FastAPI, engine: CountingEngine) -> None:
    engine.error, engine.error_after_tokens = RuntimeError("a secret path"), 1
    lines = [{"prompt": "a", "max_tokens": 2}, {"prompt": "a", "max_tokens": 1}]
    answers, end = parsed((await ask(app, "/generate/batch", ndjson(lines))).content)
    assert [answer["status"] for answer in answers] == [500, 200]
    assert answers[0]["error"]["message"] == "unexpected error; see the server's log"
    assert end == {**END, "lines": 2, "failed": 1}
    assert engine.running == 0


SLOW = ApiError(408, "body_too_slow", "the body came too slowly")


async def test_an_input_that_breaks_off_is_told_at_the_end(app: FastAPI) -> None:
    call = Call(app)
    call.write({"prompt": "a", "max_tokens": 1})
    call.input.put_nowait(b'{"prompt": ')
    call.input.put_nowait(SLOW)
    answer, end = await call.lines()
    assert (answer["index"], answer["status"]) == (0, 200)
    assert (end["done"], end["lines"], end["failed"], end["error"]["code"]) == (False, 1, 0, "body_too_slow")


async def test_an_input_that_never_comes_is_an_http_error(app: FastAPI) -> None:
    call = Call(app)
    call.input.put_nowait(SLOW)
    await asyncio.wait_for(call.task, timeout=10)
    assert call.output.get_nowait()["status"] == 408
    assert json.loads(call.output.get_nowait()["body"])["error"]["code"] == "body_too_slow"


@pytest.mark.parametrize("route", ["/generate/batch", "/score/batch"])
@pytest.mark.parametrize(
    ("query", "headers", "status", "code"),
    [
        ("", {"content-type": "application/json"}, 415, "unsupported_media_type"),
        ("", {}, 415, "unsupported_media_type"),
        ("?mask=fr", NDJSON, 404, "unknown_mask"),
        ("?mask=zh&mask=zh", NDJSON, 400, "mask_conflict"),
        ("?msk=zh", NDJSON, 422, "malformed_body"),
    ],
)
async def test_refusals_are_http_errors(
    app: FastAPI, engine: CountingEngine, route: str, query: str, headers: dict[str, str], status: int, code: str
) -> None:
    response = await ask(app, route + query, b'{"prompt": "a"}', headers)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert engine.calls == []
    assert app.state.gate.sequences == 0


async def test_jsonl_is_the_same(app: FastAPI) -> None:
    response = await ask(app, "/score/batch", b'{"text": ["a"]}', {"content-type": "Application/JSONL; charset=utf-8"})
    assert parsed(response.content)[1]["lines"] == 1


async def test_a_full_or_dead_engine_is_an_http_error(engine: CountingEngine) -> None:
    app = service(engine, max_sequences=1)
    app.state.gate.admit(RequestContext("other"), 1)
    response = await ask(app, "/generate/batch", b'{"prompt": "a"}')
    assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
    assert "retry-after" in response.headers
    engine.is_dead = True
    response = await ask(app, "/generate/batch", b'{"prompt": "a"}')
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead")


async def test_the_description_can_be_resolved(app: FastAPI) -> None:
    document = app.openapi()
    for name in ("generate", "score"):
        route = document["paths"][f"/{name}/batch"]["post"]
        assert list(route["responses"]["200"]["content"]) == ["application/x-ndjson"]
        assert list(route["responses"]["415"]["content"]) == ["application/json"]
        assert sorted(route["requestBody"]["content"]) == ["application/jsonl", "application/x-ndjson"]
    text = json.dumps(document)
    references = {part.split('"')[0] for part in text.split('"$ref": "#/components/schemas/')[1:]}
    assert references <= document["components"]["schemas"].keys()
    assert "$defs" not in text


@asynccontextmanager
async def listening(app: FastAPI) -> AsyncIterator[str]:
    """The application behind uvicorn, on a port of this machine."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="error"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await serving


async def test_the_clients_over_a_socket(app: FastAPI, engine: CountingEngine) -> None:
    padding = "x" * 1000  # the whole is more than what sockets hold
    items: list[GenerateItem] = [
        {"prompt": f"{index} {padding}", "max_tokens": 1, "logprobs": 20, "mask": "zh", "id": index}
        for index in range(3000)
    ]
    async with listening(app) as address:
        with CraneClient(address) as client:
            results = await asyncio.to_thread(lambda: list(client.generate_batch(items)))
        async with AsyncCraneClient(address) as async_client:
            results += [result async for result in async_client.generate_batch(items)]
    assert sorted(result.index for result in results) == sorted([*range(3000)] * 2)
    assert all(result.id == result.index and result.result.outputs[0].text == "a" for result in results)
    assert len(engine.calls) == 6000


async def test_a_socket_that_closes_frees_the_engine(app: FastAPI, engine: CountingEngine) -> None:
    engine.wait_after_tokens = 1
    async with listening(app) as address:
        _, port = address.rsplit(":", 1)
        _, writer = await asyncio.open_connection("127.0.0.1", int(port))
        writer.write(
            b"POST /generate/batch HTTP/1.1\r\nHost: crane\r\nContent-Type: application/x-ndjson\r\n"
            b'Content-Length: 100000\r\n\r\n{"prompt": "a", "max_tokens": 2}\n'
        )
        while not engine.running:
            await asyncio.sleep(0.01)
        writer.close()
        while engine.running:
            await asyncio.sleep(0.01)
    assert engine.aborted == 1
    assert app.state.gate.sequences == 0
