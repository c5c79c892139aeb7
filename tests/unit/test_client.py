"""The clients against a server made of functions: retries, errors, streams, concurrency."""

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import httpx
import pytest

from clients import AsyncCraneClient, CraneClient, CraneError, RetryPolicy
from clients.answers import Token

ROOT = Path(__file__).parents[2]
FAST = RetryPolicy(attempts=3, first_wait_s=0.001, longest_wait_s=5.0)
ENGLISH = {"name": "attnlrp-en", "digest": "d1", "neurons": 12}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
GENERATION = {
    "model": "gemma",
    "mask": ENGLISH,
    "outputs": [
        {"index": 0, "text": " world", "finish_reason": "length", "prompt_tokens": 3, "completion_tokens": 2, "new": 1}
    ],
    "usage": USAGE,
}
READY = {"status": "ready", "model": "gemma", "fingerprint": {"layers": 18}, "version": "0.1.0"}

Handler = Callable[[httpx.Request], httpx.Response]


def refusal(status: int, code: str = "overloaded", headers: dict[str, str] | None = None) -> httpx.Response:
    error = {"error": {"code": code, "message": f"refused with {status}", "param": "mask"}}
    return httpx.Response(status, json=error, headers=headers)


class Script:
    """Answers requests with the given steps, the last one for ever, and keeps the requests."""

    def __init__(self, *steps: httpx.Response | Exception) -> None:
        self.steps = list(steps)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        step = self.steps[min(len(self.requests), len(self.steps)) - 1]
        if isinstance(step, Exception):
            raise step
        return httpx.Response(step.status_code, content=step.content, headers=step.headers)


def blocking(handler: Handler, retries: RetryPolicy = FAST) -> CraneClient:
    return CraneClient("http://crane.test", retries=retries, transport=httpx.MockTransport(handler))


def awaiting(handler: Handler, concurrency: int = 4) -> AsyncCraneClient:
    transport = httpx.MockTransport(handler)
    return AsyncCraneClient("http://crane.test", concurrency=concurrency, retries=FAST, transport=transport)


def test_generate_sends_only_what_was_given_and_types_the_answer() -> None:
    script = Script(httpx.Response(200, json=GENERATION))
    with blocking(script) as client:
        answer = client.generate(["Hello"], mask="zh,vi", max_tokens=2, temperature=0.0)
    request = script.requests[0]
    assert request.url.path == "/generate"
    assert dict(request.url.params) == {"mask": "zh,vi"}
    assert json.loads(request.content) == {"prompt": ["Hello"], "max_tokens": 2, "temperature": 0.0}
    assert answer.outputs[0].text == " world"
    assert answer.mask is not None
    assert (answer.mask.digest, answer.usage.total_tokens) == ("d1", 5)


def test_a_mask_itself_is_sent_in_the_body() -> None:
    mask = {"neurons": {"12": [3, 17]}, "scale": 0.5}
    scores = {"mask": ENGLISH, "scores": [{"logprob": -1.0, "tokens": 1, "bytes": 2}], "usage": USAGE}
    script = Script(httpx.Response(200, json=GENERATION), httpx.Response(200, json=scores))
    with blocking(script) as client:
        client.generate("Hello", mask=mask)
        client.score_text("Hello", mask=mask)
    bodies = [json.loads(request.content) for request in script.requests]
    assert bodies == [{"prompt": "Hello", "mask": mask}, {"text": ["Hello"], "mask": mask}]
    assert not any(request.url.query for request in script.requests)


def test_scores() -> None:
    scores = [
        {"logprob": -7.5, "tokens": 3, "bytes": 11},
        {
            "logprob": -1.0,
            "tokens": 1,
            "bytes": 2,
            "is_greedy": True,
            "token_logprobs": [{"token_id": 5, "token": " a", "logprob": -1.0}],
        },
    ]
    script = Script(httpx.Response(200, json={"mask": None, "scores": scores, "usage": USAGE}))
    with blocking(script) as client:
        answer = client.score_text("one text")
        client.score_continuations("context", (" a", " b"), mask="en", return_tokens=True)
    assert answer.scores[0].token_logprobs is None
    assert answer.scores[1].token_logprobs == (Token(token_id=5, token=" a", logprob=-1.0),)
    assert [score.is_greedy for score in answer.scores] == [None, True]
    assert answer.scores[0].logprob == -7.5
    assert json.loads(script.requests[0].content) == {"text": ["one text"]}
    assert "mask" not in script.requests[0].url.params
    assert json.loads(script.requests[1].content) == {
        "context": "context",
        "continuations": [" a", " b"],
        "return_tokens": True,
    }


@pytest.mark.parametrize(
    ("status", "headers"),
    [(301, {"Location": "https://elsewhere/login"}), (302, {"Location": "/x"}), (304, {}), (100, {})],
)
def test_only_2xx_is_success(status: int, headers: dict[str, str]) -> None:
    with blocking(Script(*[httpx.Response(status, headers=headers, text="<html>")] * 3)) as client:
        for ask in (client.health, lambda: client.delete_mask("zh"), lambda: client.mask_file("zh")):
            with pytest.raises(CraneError) as caught:
                ask()
            assert (caught.value.status, caught.value.code) == (status, f"http_{status}")
            assert headers.get("Location", "") in caught.value.message


def test_masks_ready_and_health() -> None:
    summary = {**ENGLISH, "language": "en", "method": "attnlrp", "budget": 0.01}
    answers = {
        "/masks": {"masks": [summary], "invalid": [{"name": "old", "reason": "corrupt"}], "default_method": "attnlrp"},
        "/masks/en": {**summary, "layers": [1, 2]},
        "/ready": READY,
        "/health": {"status": "ok"},
    }
    with blocking(lambda request: httpx.Response(200, json=answers[request.url.path])) as client:
        listing = client.masks()
        assert (listing.masks[0].budget, listing.invalid[0].reason, listing.default_method) == (
            0.01,
            "corrupt",
            "attnlrp",
        )
        mask = client.mask("en")
        assert mask.name == "attnlrp-en"
        assert mask.model_extra == {"layers": [1, 2]}
        assert client.ready().fingerprint == {"layers": 18}
        assert client.health().status == "ok"


def test_mask_names_cannot_leave_their_path() -> None:
    script = Script(httpx.Response(404, json={"detail": "Not Found"}))
    with blocking(script) as client, pytest.raises(CraneError, match="Not Found"):
        client.mask("../health?x")
    assert script.requests[0].url.raw_path == b"/masks/..%2Fhealth%3Fx"


@pytest.mark.parametrize(
    "failure",
    [
        refusal(503),
        refusal(429),
        httpx.ConnectError("refused"),
        httpx.ConnectTimeout(""),
        httpx.RemoteProtocolError(""),
    ],
    ids=["503", "429", "connect error", "connect timeout", "server hung up"],
)
async def test_transient_failures_are_tried_again(failure: httpx.Response | Exception) -> None:
    ready = httpx.Response(200, json=READY)
    script = Script(failure, failure, ready)
    with blocking(script) as client:
        assert client.ready().model == "gemma"
    assert len(script.requests) == 3
    script = Script(failure, failure, ready)
    async with awaiting(script) as async_client:
        assert (await async_client.ready()).model == "gemma"
    assert len(script.requests) == 3


def test_retry_after_is_waited_out() -> None:
    script = Script(refusal(429, headers={"Retry-After": "0.3"}), httpx.Response(200, json=READY))
    start = time.monotonic()
    with blocking(script) as client:
        client.ready()
    assert 0.3 <= time.monotonic() - start < 1.5


def test_retry_after_may_be_a_date() -> None:
    past = format_datetime(datetime.now(UTC) - timedelta(hours=1))
    script = Script(refusal(503, headers={"Retry-After": past}), httpx.Response(200, json=READY))
    with blocking(script) as client:
        assert client.ready().status == "ready"


def test_a_retry_after_beyond_patience_is_an_error_at_once() -> None:
    script = Script(refusal(503, headers={"Retry-After": "3600"}))
    with blocking(script) as client, pytest.raises(CraneError) as caught:
        client.ready()
    assert len(script.requests) == 1
    assert caught.value.retry_after_s == 3600


def test_gives_up_after_the_last_attempt() -> None:
    script = Script(refusal(503, "engine_dead"))
    with blocking(script) as client, pytest.raises(CraneError) as caught:
        client.score_text("text")
    error = caught.value
    assert len(script.requests) == 3
    assert (error.status, error.code, error.message, error.param) == (503, "engine_dead", "refused with 503", "mask")


def test_an_unreachable_server_is_named_without_credentials() -> None:
    script = Script(httpx.ConnectError("refused"))
    transport = httpx.MockTransport(script)
    with (
        CraneClient("http://me:hidden@crane.test:81/base", retries=FAST, transport=transport) as client,
        pytest.raises(CraneError, match=r"http://crane\.test:81/base: refused") as caught,
    ):
        client.ready()
    assert (caught.value.status, caught.value.code) == (None, "connection_failed")
    assert "hidden" not in str(caught.value)
    assert script.requests[0].url.path == "/base/ready"


@pytest.mark.parametrize(("status", "code"), [(400, "mask_conflict"), (404, "unknown_mask"), (422, "invalid_body")])
async def test_refusals_are_final(status: int, code: str) -> None:
    script = Script(refusal(status, code))
    with blocking(script) as client, pytest.raises(CraneError, match=code) as caught:
        client.generate("text", mask="xx")
    assert len(script.requests) == 1
    assert caught.value.status == status
    async with awaiting(script) as async_client:
        with pytest.raises(CraneError, match=code):
            await async_client.generate("text", mask="xx")
    assert len(script.requests) == 2


def test_read_timeouts_are_not_repeated() -> None:
    script = Script(httpx.ReadTimeout(""))
    with blocking(script) as client, pytest.raises(CraneError, match="read timeout"):
        client.score_text("text")
    assert len(script.requests) == 1


@pytest.mark.parametrize(
    "response",
    [
        httpx.Response(200, text="<html>hello</html>"),
        httpx.Response(200, json={"scores": [{"logprob": None, "tokens": 1, "bytes": 1}]}),
        httpx.Response(200, json={"something": "else"}),
    ],
    ids=["html", "no number", "other fields"],
)
def test_other_answers_are_errors(response: httpx.Response) -> None:
    with (
        blocking(Script(response)) as client,
        pytest.raises(CraneError, match="score did not answer"),
    ):
        client.score_text("text")


def test_waiting_for_a_server_ends() -> None:
    late = Script(httpx.ConnectError("refused"), httpx.ReadTimeout(""), refusal(503), httpx.Response(200, json=READY))
    with blocking(late) as client:
        assert client.wait_until_ready(10).model == "gemma"
    with blocking(Script(httpx.ConnectError("refused"))) as client, pytest.raises(CraneError, match="refused"):
        client.wait_until_ready(0.2)


@pytest.mark.parametrize("server", ["localhost:8000", "ftp://host", "http://", "http://host:port", ""])
def test_server_addresses_are_checked(server: str) -> None:
    with pytest.raises(ValueError, match="expected one like http://127"):
        CraneClient(server)


def test_impossible_settings() -> None:
    with pytest.raises(ValueError, match="concurrency is 0"):
        AsyncCraneClient(concurrency=0)
    with pytest.raises(ValueError, match="attempts is 0"):
        RetryPolicy(attempts=0)


async def test_concurrency_is_bounded() -> None:
    under_way = most = 0

    async def slow(_: httpx.Request) -> httpx.Response:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.005)
        under_way -= 1
        return httpx.Response(200, json=READY)

    transport = httpx.MockTransport(slow)
    async with AsyncCraneClient("http://crane.test", concurrency=5, transport=transport) as client:
        await asyncio.gather(*(client.ready() for _ in range(40)))
    assert most == 5


async def test_items_under_mixed_masks_run_side_by_side_and_fail_alone() -> None:
    attempts: Counter[str] = Counter()

    def serve(request: httpx.Request) -> httpx.Response:
        mask = request.url.params.get("mask", "none")
        attempts[mask] += 1
        if mask == "nowhere":
            return refusal(404, "unknown_mask")
        if attempts[mask] == 1:
            return refusal(429, "queue_full")
        return httpx.Response(200, json={**GENERATION, "mask": {**ENGLISH, "name": mask}})

    async with awaiting(serve) as client:
        requests = [client.generate("a", mask=mask) for mask in ("en", "nowhere", "zh,vi")]
        first, failed, last = await asyncio.gather(*requests, return_exceptions=True)
    assert isinstance(failed, CraneError)
    assert failed.code == "unknown_mask"
    assert [answer.mask.name for answer in (first, last)] == ["en", "zh,vi"]  # type: ignore[union-attr]
    assert attempts == {"en": 2, "nowhere": 1, "zh,vi": 2}


def event(payload: object) -> bytes:
    return f"data: {json.dumps(payload, ensure_ascii=False)}\n\n".encode()


PIECES = ["Xin ", "chào\u2028", "thế\u0085giới", " 你好\n"]
END = {**GENERATION, "outputs": [{"index": 0, "finish_reason": "length", "prompt_tokens": 3, "completion_tokens": 2}]}


def stream_of(*events: bytes, size: int = 7) -> Handler:
    """Serves events cut into pieces of `size` bytes, through the middle of characters and lines."""
    content = b"".join(events)

    class Pieces(httpx.SyncByteStream, httpx.AsyncByteStream):
        def __iter__(self):  # type: ignore[no-untyped-def]
            yield from (content[start : start + size] for start in range(0, len(content), size))

        async def __aiter__(self):  # type: ignore[no-untyped-def]
            for piece in self:
                yield piece

    return lambda _: httpx.Response(200, stream=Pieces())


def deltas_and_end() -> list[bytes]:
    deltas = [event({"index": 0, "text": piece, "finish_reason": None}) for piece in PIECES]
    return [b": comment\n\n", *deltas, event(END), b"data: [DONE]\n\n"]


@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_streams(size: int) -> None:
    with blocking(stream_of(*deltas_and_end(), size=size)) as client, client.generate_stream("Hi", mask="en") as stream:
        assert stream.end is None
        assert [delta.text for delta in stream] == PIECES
        assert stream.end is not None
        assert stream.end.usage.total_tokens == 5
    async with awaiting(stream_of(*deltas_and_end(), size=size)) as async_client:
        async_stream = await async_client.generate_stream("Hi")
        assert [delta.text async for delta in async_stream] == PIECES
        assert async_stream.end is not None
        assert async_stream.end.outputs[0].finish_reason == "length"


async def test_an_error_inside_a_stream_is_raised() -> None:
    broken = event({"error": {"code": "engine_dead", "message": "the engine died", "param": None}})
    handler = stream_of(deltas_and_end()[1], broken)
    with blocking(handler) as client:
        stream = client.generate_stream("Hi")
        assert next(stream).text == "Xin "
        with pytest.raises(CraneError, match="the engine died"):
            next(stream)
    async with awaiting(handler) as async_client:
        with pytest.raises(CraneError, match="engine_dead"):
            _ = [delta async for delta in await async_client.generate_stream("Hi")]


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (deltas_and_end()[:3], "ended before its last event"),
        ([b"data: {broken\n\n"], "{broken"),
        ([event({"index": "x"})], "an event that cannot be read"),
    ],
)
def test_streams_that_cannot_be_used(events: list[bytes], message: str) -> None:
    with blocking(stream_of(*events)) as client, pytest.raises(CraneError, match=message):
        list(client.generate_stream("Hi"))


async def test_opening_a_stream_is_retried_and_refusals_are_typed() -> None:
    served = stream_of(*deltas_and_end())
    attempts = 0

    def third_time(request: httpx.Request) -> httpx.Response:
        nonlocal attempts
        attempts += 1
        assert json.loads(request.content)["stream"] is True
        return served(request) if attempts % 3 == 0 else refusal(503)

    with blocking(third_time) as client:
        assert len(list(client.generate_stream("Hi"))) == 4
    async with awaiting(third_time) as async_client:
        assert len([delta async for delta in await async_client.generate_stream("Hi")]) == 4
    with blocking(lambda _: refusal(404, "unknown_mask")) as client, pytest.raises(CraneError, match="unknown_mask"):
        client.generate_stream("Hi", mask="xx")


async def test_streams_hold_a_slot_until_they_are_left() -> None:
    async with awaiting(stream_of(*deltas_and_end()), concurrency=1) as client:
        async with await client.generate_stream("Hi") as stream:
            assert (await anext(stream)).text == "Xin "
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.generate_stream("Hi"), timeout=0.02)
        second = await asyncio.wait_for(client.generate_stream("Hi"), timeout=1)
        assert len([delta async for delta in second]) == 4
        third = await asyncio.wait_for(client.generate_stream("Hi"), timeout=1)
        await third.aclose()
    async with awaiting(lambda _: refusal(404), concurrency=1) as client:
        for _ in range(2):
            with pytest.raises(CraneError):
                await asyncio.wait_for(client.generate_stream("Hi"), timeout=1)


def test_the_client_half_needs_no_engine() -> None:
    modules = ", ".join(f"clients.{path.stem}" for path in (ROOT / "clients").glob("*.py"))
    check = f"import sys, {modules}; sys.exit(bool({{'torch', 'vllm', 'transformers'}} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)
