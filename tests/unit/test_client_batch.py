"""Batches of the clients against a server made of functions: order, retries, and answers that break off."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest

from clients import AsyncCraneClient, CraneClient, CraneError, RetryPolicy
from clients import batch as batch_module
from clients.answers import GenerationResult

FAST = RetryPolicy(attempts=3, first_wait_s=0.001, longest_wait_s=0.01)
FULL = {"code": "queue_full", "message": "full", "param": None, "type": "rate_limit_error"}
DEAD = {"code": "engine_dead", "message": "it has died", "param": None, "type": "service_unavailable_error"}

Lines = list[dict[str, Any]]


def answer(index: int, line: dict[str, Any]) -> dict[str, Any]:
    outputs = [{"index": 0, "text": line["prompt"].upper(), "finish_reason": "length"}]
    return {"index": index, "id": line.get("id"), "status": 200, "answer": {"model": "m", "outputs": outputs}}


def failure(index: int, status: int, error: dict[str, Any] = FULL) -> dict[str, Any]:
    return {"index": index, "id": None, "status": status, "error": error}


def end(lines: Lines) -> dict[str, Any]:
    return {"done": True, "lines": len(lines), "failed": sum("error" in line for line in lines)}


def all_well(lines: Lines) -> Lines:
    answers = [answer(index, line) for index, line in enumerate(lines)][::-1]
    return [*answers, end(answers)]


class Server:
    """Answers the nth call by the nth of `turns` (lines -> answers, or an error), the last one for ever."""

    def __init__(self, *turns: Callable[[Lines], Lines] | httpx.Response | Exception) -> None:
        self.turns = turns
        self.calls: list[Lines] = []
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        lines = [json.loads(line) for line in request.content.splitlines()]
        self.requests.append(request)
        self.calls.append(lines)
        turn = self.turns[min(len(self.calls), len(self.turns)) - 1]
        if isinstance(turn, Exception):
            raise turn
        if isinstance(turn, httpx.Response):
            return httpx.Response(turn.status_code, content=turn.content, headers=turn.headers)
        content = b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in turn(lines))

        class Pieces(httpx.SyncByteStream, httpx.AsyncByteStream):
            def __iter__(self) -> Iterator[bytes]:
                yield from (content[start : start + 7] for start in range(0, len(content), 7))

            async def __aiter__(self) -> AsyncIterator[bytes]:
                for piece in self:
                    yield piece

        return httpx.Response(200, stream=Pieces())


class Outcome:
    """What a batch gave before it ended, and the error it ended with."""

    def __init__(self) -> None:
        self.results: list[GenerationResult] = []
        self.error: CraneError | None = None

    def text(self, index: int) -> str:
        (result,) = [result for result in self.results if result.index == index]
        return result.result.outputs[0].text


def items(count: int) -> Any:
    return [{"prompt": f"p{index}", "id": f"#{index}", "max_tokens": 1, "mask": None} for index in range(count)]


async def run(server: Server, asked: Any, *, awaiting: bool) -> Outcome:
    outcome = Outcome()
    transport = httpx.MockTransport(server)
    try:
        if awaiting:
            async with AsyncCraneClient("http://crane.test", retries=FAST, transport=transport) as client:
                async for result in client.generate_batch(asked):
                    outcome.results.append(result)
        else:
            with CraneClient("http://crane.test", retries=FAST, transport=transport) as blocking:
                for result in blocking.generate_batch(asked):
                    outcome.results.append(result)
    except CraneError as error:
        outcome.error = error
    return outcome


both = pytest.mark.parametrize("awaiting", [False, True], ids=["blocking", "awaiting"])


@both
async def test_results_have_the_positions_of_their_items(awaiting: bool) -> None:
    server = Server(all_well)
    outcome = await run(server, items(5), awaiting=awaiting)
    assert outcome.error is None
    assert [(result.index, result.id) for result in outcome.results] == [(i, f"#{i}") for i in (4, 3, 2, 1, 0)]
    assert [outcome.text(index) for index in range(5)] == ["P0", "P1", "P2", "P3", "P4"]
    request = server.requests[0]
    assert (request.method, request.url.path) == ("POST", "/generate/batch")
    assert request.headers["content-type"] == "application/x-ndjson"
    assert server.calls == [items(5)]


@both
async def test_large_batches_are_cut(awaiting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(all_well)
    outcome = await run(server, iter(items(4500)), awaiting=awaiting)
    assert [len(lines) for lines in server.calls] == [2000, 2000, 500]
    assert sorted(result.index for result in outcome.results) == [*range(4500)]
    assert outcome.text(4321) == "P4321"
    monkeypatch.setattr(batch_module, "MOST_BYTES", 100)
    large = Server(all_well)
    await run(large, [{"prompt": "x" * 200}, {"prompt": "a"}, {"prompt": "b"}], awaiting=awaiting)
    assert [len(lines) for lines in large.calls] == [1, 2]


@both
async def test_a_failed_item_is_a_result(awaiting: bool) -> None:
    error = {"code": "unknown_mask", "message": "no such mask", "param": "mask", "type": "not_found_error"}

    def one_wrong(lines: Lines) -> Lines:
        answers = [answer(0, lines[0]), failure(1, 404, error)]
        return [*answers, end(answers)]

    server = Server(one_wrong)
    outcome = await run(server, items(2), awaiting=awaiting)
    assert outcome.error is None
    with pytest.raises(CraneError, match="no such mask") as caught:
        outcome.text(1)
    raised = caught.value
    assert (raised.status, raised.code, raised.param, raised.type) == (404, "unknown_mask", "mask", "not_found_error")
    assert len(server.calls) == 1


@both
@pytest.mark.parametrize("status", [429, 503])
async def test_items_that_were_put_off_are_asked_again(awaiting: bool, status: int) -> None:
    def half(lines: Lines) -> Lines:
        answers = [failure(index, status) if index % 2 else answer(index, line) for index, line in enumerate(lines)]
        return [*answers, end(answers)]

    server = Server(half, all_well)
    outcome = await run(server, items(4), awaiting=awaiting)
    assert [[line["prompt"] for line in lines] for lines in server.calls] == [["p0", "p1", "p2", "p3"], ["p1", "p3"]]
    assert [outcome.text(index) for index in range(4)] == ["P0", "P1", "P2", "P3"]
    assert (outcome.error, len(outcome.results)) == (None, 4)


@both
async def test_what_stays_put_off_is_a_result_in_the_end(awaiting: bool) -> None:
    def never(lines: Lines) -> Lines:
        answers = [failure(index, 429) for index in range(len(lines))]
        return [*answers, end(answers)]

    server = Server(never)
    outcome = await run(server, items(2), awaiting=awaiting)
    assert len(server.calls) == 3
    assert outcome.error is None
    assert [(result.index, result.status) for result in outcome.results] == [(0, 429), (1, 429)]


BROKEN: list[tuple[str, Callable[[Lines], Lines]]] = [
    ("cut off", lambda lines: all_well(lines)[:1]),
    ("not done", lambda lines: [all_well(lines)[0], {"done": False, "lines": 1, "failed": 0, "error": DEAD}]),
    ("ended from outside", lambda lines: [all_well(lines)[0], {"error": DEAD}]),
]


@both
@pytest.mark.parametrize("broken", [turn for _, turn in BROKEN], ids=[name for name, _ in BROKEN])
async def test_an_answer_that_breaks_off_is_asked_for_again(awaiting: bool, broken: Callable[[Lines], Lines]) -> None:
    server = Server(broken, all_well)
    outcome = await run(server, items(3), awaiting=awaiting)
    assert [len(lines) for lines in server.calls] == [3, 2]
    assert outcome.error is None
    assert [outcome.text(index) for index in range(3)] == ["P0", "P1", "P2"]
    server = Server(lambda lines: broken(lines)[1:])
    outcome = await run(server, items(3), awaiting=awaiting)
    assert len(server.calls) == 3
    assert outcome.error is not None
    assert outcome.error.code in {"connection_lost", "engine_dead"}


@both
@pytest.mark.parametrize(
    ("refusal", "calls", "code"),
    [
        (httpx.Response(429, json={"error": FULL}), 2, None),
        (httpx.ConnectError("refused"), 2, None),
        (httpx.Response(401, json={"error": {**FULL, "code": "missing_api_key"}}), 1, "missing_api_key"),
        (httpx.Response(429, json={"error": FULL}, headers={"Retry-After": "3600"}), 1, "queue_full"),
        (httpx.ReadTimeout(""), 1, "read_timeout"),
    ],
)
async def test_refused_calls(awaiting: bool, refusal: httpx.Response | Exception, calls: int, code: str | None) -> None:
    server = Server(refusal, all_well)
    outcome = await run(server, items(2), awaiting=awaiting)
    assert len(server.calls) == calls
    assert (outcome.error and outcome.error.code) == code
    assert len(outcome.results) == (0 if code else 2)


@both
@pytest.mark.parametrize(
    "lines",
    [
        [{"index": 5, "status": 200, "answer": {"model": "m", "outputs": []}}],
        [{"index": -1, "status": 200, "answer": {"model": "m", "outputs": []}}],
        [{"index": 0, "status": 200, "answer": {"model": "m", "outputs": []}}] * 2,
        [{"index": 0, "status": 200}],
        [{"index": "x", "status": 200}],
        [{"something": "else"}],
        [{"done": True, "lines": 0, "failed": 0}],
    ],
    ids=["beyond", "negative", "twice", "empty", "no number", "other", "too few"],
)
async def test_answers_that_are_none(awaiting: bool, lines: Lines) -> None:
    server = Server(lambda _: lines)
    outcome = await run(server, items(1), awaiting=awaiting)
    assert outcome.error is not None
    assert outcome.error.code == "invalid_answer"
    assert len(server.calls) == 1


async def test_scores() -> None:
    def scored(lines: Lines) -> Lines:
        scores = [{"logprob": -1.5, "tokens": 1, "bytes": 1}]
        return [*({"index": i, "status": 200, "answer": {"scores": scores}} for i in range(len(lines))), end([])]

    server = Server(scored)
    with CraneClient("http://crane.test", retries=FAST, transport=httpx.MockTransport(server)) as client:
        results = list(client.score_batch([{"text": ["a"], "mask": "zh"}, {"context": "a", "continuations": ["b"]}]))
    assert [result.result.scores[0].logprob for result in results] == [-1.5, -1.5]
    assert server.calls == [[{"text": ["a"], "mask": "zh"}, {"context": "a", "continuations": ["b"]}]]
    assert server.requests[0].url.path == "/score/batch"


async def test_a_batch_that_is_left_frees_its_slot() -> None:
    transport = httpx.MockTransport(Server(all_well))
    async with AsyncCraneClient("http://crane.test", concurrency=1, transport=transport) as client:
        for _ in range(2):
            results = client.generate_batch(items(3))
            assert (await anext(results)).index == 2
            await results.aclose()


def test_nothing_is_asked_for_no_items() -> None:
    server = Server(all_well)
    with CraneClient("http://crane.test", transport=httpx.MockTransport(server)) as client:
        assert list(client.generate_batch([])) == []
    assert server.calls == []
