"""What goes wrong on a real engine: clients that leave or attack, masks that change, full disks, ends and deaths.

The tests share two servers, one after the other over one directory of masks, and run in the order in which they stand.
"""

import asyncio
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from crane_serve.common.masks import MaskInfo, NeuronMask, encode_mask
from crane_serve.common.masks.files import SUFFIX, read_mask
from tests.conftest import TINY_FLAGS, Tiny
from tests.engines import Oracle, Server

pytestmark = pytest.mark.engine

USER, ADMIN, UNKNOWN = "user-6a1f0c2e94b7", "admin-d83b57f1e206", "other-0c9e8d7b6a5f"
PROMPT = "The harbour froze."
BODY_TIMEOUT_S, MAX_BODY_BYTES = 5, 100_000
RUNNING = 8  # sequences at once
ROWS = 2  # different masks at once, on the first server
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
FLAGS = (
    *TINY_FLAGS,
    *("--max-model-len", "2048", "--enforce-eager", "--return-tokens-as-token-ids", "--chat-template", TEMPLATE),
    *("--body-timeout-s", str(BODY_TIMEOUT_S), "--max-body-bytes", str(MAX_BODY_BYTES), "--drain-timeout-s", "240"),
)
DEADLINE_S = 120
SLOW_CLIENTS = 50
ENDLESS = {"prompt": PROMPT, "temperature": 0, "max_tokens": 1900, "ignore_eos": True}
MANY = {"prompt": [PROMPT] * 200, "temperature": 1, "max_tokens": 1900}  # a sampled text ends by itself, but 200 do not
MESSAGES = [{"role": "user", "content": PROMPT}]


def random_mask(tiny: Tiny, name: str, seed: int) -> tuple[NeuronMask, bytes]:
    """A mask that switches off 30 % of the neurons, and its file."""
    fingerprint, draw = tiny.library.fingerprint, random.Random(seed)
    neurons = [draw.sample(range(size), round(0.3 * size)) for size in fingerprint.intermediate_sizes]
    mask = NeuronMask.switching_off(neurons, fingerprint.intermediate_sizes)
    return mask, encode_mask(name, mask, MaskInfo(language="xx", method="attnlrp", fingerprint=fingerprint))


@dataclass
class Place:
    """Where the servers of this module live."""

    directory: Path
    tiny: Tiny
    kept: str = ""
    """The digest of a mask that was uploaded to the first server; one called "gone" was uploaded and removed."""

    @property
    def masks(self) -> Path:
        return self.directory / "masks"

    def start(self, name: str, *flags: str) -> Server:
        """A server whose log goes through a pipe, so that a limit on its files is none on its log."""
        pipe, log = self.directory / f"{name}.pipe", self.directory / f"{name}.log"
        os.mkfifo(pipe)
        threading.Thread(target=_copy, args=(pipe, log), daemon=True).start()
        keys = ("--api-keys-file", str(self.directory / "keys"))
        core = 1 % (os.cpu_count() or 1)
        server = Server.of(self.tiny.checkpoint, self.masks, pipe, *FLAGS, *flags, *keys, core=core)
        server.log = log
        return server.wait()


def _copy(pipe: Path, log: Path) -> None:
    with pipe.open("rb", buffering=0) as source, log.open("wb", buffering=0) as target:
        shutil.copyfileobj(source, target)


def client_of(server: Server, key: str | None = ADMIN) -> httpx.Client:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=server.url, headers=headers, timeout=DEADLINE_S)


@asynccontextmanager
async def async_client_of(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    limits, headers = httpx.Limits(max_connections=None), {"x-api-key": ADMIN}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=DEADLINE_S, limits=limits) as client:
        yield client


@pytest.fixture(scope="module")
def place(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("faults"), tiny)
    shutil.copytree(tiny.masks, place.masks)
    keys = place.directory / "keys"
    keys.touch(0o600)
    keys.write_text(f"reader user {USER}\nkeeper admin {ADMIN}\n")
    return place


@pytest.fixture(scope="module")
def first(place: Place) -> Iterator[Server]:
    server = place.start("first", "--mask-rows", str(ROWS))
    try:
        with client_of(server) as client:
            for name in ("kept", "gone"):
                put = client.put(f"/masks/{name}", content=random_mask(place.tiny, name, seed=1)[1])
                assert put.status_code == 201
            place.kept = put.json()["digest"]
            assert client.delete("/masks/gone").status_code == 204
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def second(place: Place, first: Server) -> Iterator[Server]:
    first.stop()
    server = place.start("second")
    try:
        yield server
    finally:
        server.stop()


def metric(text: str, name: str, **labels: str) -> float:
    """The sum of a metric over all series that have these labels."""
    lines = [line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    assert lines, f"no metric {name}"
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(float(line.rpartition(" ")[2]) for line in lines if all(label in line for label in wanted))


def finished(text: str) -> float:
    """How many sequences have come to an end of their own."""
    return sum(metric(text, "vllm:request_success_total", finished_reason=reason) for reason in ("stop", "length"))


async def metrics_say(client: httpx.AsyncClient, condition: Callable[[str], bool]) -> str:
    async with asyncio.timeout(DEADLINE_S):
        while not condition(text := (await client.get("/metrics")).text):
            await asyncio.sleep(0.05)
    return text


def is_idle(text: str) -> bool:
    gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "crane_sequences", "crane_mask_rows_used")
    return not any(metric(text, gauge) for gauge in gauges)


def is_under_way(text: str) -> bool:
    return metric(text, "vllm:num_requests_running") > 0 and metric(text, "crane_mask_rows_used") == 1


def logprobs_of(answer: Any) -> tuple[list[int], list[float]]:
    """Token ids and log-probabilities of a completion."""
    logprobs = answer["choices"][0]["logprobs"]
    return [int(token.rpartition(":")[2]) for token in logprobs["tokens"]], logprobs["token_logprobs"]


class TestClientsThatLeave:
    """What they asked for would take the engine far longer than these tests wait: nothing of it comes to its end."""

    @pytest.fixture
    async def client(self, first: Server) -> AsyncIterator[httpx.AsyncClient]:
        async with async_client_of(first) as client:
            before = finished(await metrics_say(client, is_idle))
            yield client
            after = finished(await metrics_say(client, is_idle))
            assert after - before < 100

    @pytest.mark.parametrize(
        ("path", "body"),
        [("/generate", {**MANY, "mask": "zh"}), ("/v1/completions", {**MANY, "n": 2, "model": "tiny:zh"})],
    )
    async def test_in_the_middle_of_a_stream(self, client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
        async with client.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200
            assert await anext(response.aiter_bytes())
            await metrics_say(client, is_under_way)

    @pytest.mark.parametrize("path", ["/generate?mask=zh", "/v1/completions?mask=zh"])
    async def test_before_the_answer(self, client: httpx.AsyncClient, path: str) -> None:
        ask = client.post(path, json={**MANY, **({"model": "tiny"} if "v1" in path else {})})
        asking = asyncio.create_task(ask)
        await metrics_say(client, is_under_way)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    async def test_alone_with_one_endless_text(self, client: httpx.AsyncClient) -> None:
        before = await metrics_say(client, is_idle)
        body = {**ENDLESS, "model": "tiny:zh", "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert await anext(response.aiter_bytes())
        after = await metrics_say(client, is_idle)
        tokens = metric(after, "vllm:generation_tokens_total") - metric(before, "vllm:generation_tokens_total")
        assert 0 < tokens < ENDLESS["max_tokens"] / 2


class TestMasks:
    WAYS: tuple[tuple[str, dict[str, Any]], ...] = (
        ("?mask=uploaded", {"model": "tiny"}),
        ("", {"model": "tiny", "mask": "uploaded"}),
        ("", {"model": "tiny:uploaded"}),
    )

    def test_an_upload_is_used_replaced_and_removed(self, place: Place, first: Server, tiny_oracle: Oracle) -> None:
        old, old_file = random_mask(place.tiny, "uploaded", seed=2)
        new, new_file = random_mask(place.tiny, "uploaded", seed=3)
        long = {**ENDLESS, "model": "tiny:uploaded", "max_tokens": 800}
        with client_of(first) as client:
            assert client.get("/masks/uploaded").status_code == 404
            assert client.put("/masks/uploaded", content=old_file).status_code == 201
            self.assert_used(client, old, tiny_oracle)
            alone_under_old = self.text(client.post("/v1/completions", json={**long, "stream": True}))
            with self.streamed(client, long) as under_old:
                put = client.put("/masks/uploaded", content=new_file)
                assert (put.status_code, put.json()["digest"]) == (200, new.digest)
                self.assert_used(client, new, tiny_oracle)
                self.assert_running(client, 1)
            assert under_old == [alone_under_old]
            alone_under_new = self.text(client.post("/v1/completions", json={**long, "stream": True}))
            assert alone_under_new != alone_under_old
            with self.streamed(client, long) as under_new:
                assert client.delete("/masks/uploaded").status_code == 204
                for query, body in self.WAYS:
                    refused = client.post(f"/v1/completions{query}", json={**ENDLESS, **body})
                    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "unknown_mask")
                assert client.post("/generate?mask=uploaded", json={"prompt": PROMPT}).status_code == 404
                self.assert_running(client, 1)
            assert under_new == [alone_under_new]
            assert client.get("/masks/uploaded").status_code == 404
            assert "tiny:uploaded" not in self.models(client)
        assert not (place.masks / f"uploaded{SUFFIX}").exists()

    def test_two_uploads_of_one_name_at_once(self, place: Place, first: Server) -> None:
        made = [random_mask(place.tiny, "race", seed) for seed in (4, 5)]
        digests = {mask.digest for mask, _ in made}
        for _ in range(10):
            both = threading.Barrier(len(made))
            with ThreadPoolExecutor(len(made)) as pool:
                uploads = [pool.submit(upload_at_once, first, "race", file, both) for _, file in made]
                statuses = [upload.result() for upload in uploads]
            with client_of(first) as client:
                served = client.get("/masks/race").json()["digest"]
                used = client.post("/generate?mask=race", json={"prompt": PROMPT, "max_tokens": 1}).json()["mask"]
                on_disk = read_mask(place.masks / f"race{SUFFIX}").mask.digest
                assert client.delete("/masks/race").status_code == 204
            assert sorted(statuses) == [200, 201]
            assert served == used["digest"] == on_disk
            assert served in digests

    def test_a_full_disk(self, place: Place, first: Server) -> None:
        before = files_in(place.masks)
        new, file = random_mask(place.tiny, "kept", seed=6)
        with client_of(first) as client:
            tag = client.get("/masks/kept").headers["ETag"]
            with largest_file(first.process.pid, 512):
                for name in ("kept", "another"):
                    refused = client.put(f"/masks/{name}", content=file)
                    assert (refused.status_code, refused.json()["error"]["code"]) == (507, "mask_not_saved")
                    assert str(place.masks) not in refused.text
                assert files_in(place.masks) == before
                used = client.post("/generate?mask=kept", json={"prompt": PROMPT, "max_tokens": 1})
                assert (used.status_code, f'"{used.json()["mask"]["digest"]}"') == (200, tag)
                assert client.get("/masks/kept").headers["ETag"] == tag
                assert client.get("/masks/another").status_code == 404
            assert client.put("/masks/kept", content=file).status_code == 200
            assert client.get("/masks/kept").json()["digest"] == new.digest
            place.kept = new.digest
        assert files_in(place.masks) == before

    @staticmethod
    def models(client: httpx.Client) -> list[str]:
        return [model["id"] for model in client.get("/v1/models").json()["data"]]

    def assert_used(self, client: httpx.Client, mask: NeuronMask, oracle: Oracle) -> None:
        """All ways to name the mask "uploaded" give what transformers gives under it."""
        assert "tiny:uploaded" in self.models(client)
        prompt = oracle.tokenizer(PROMPT)["input_ids"]
        for query, body in self.WAYS:
            answer = client.post(f"/v1/completions{query}", json={**ENDLESS, "max_tokens": 8, "logprobs": 0, **body})
            assert answer.headers["X-Crane-Mask-Digest"] == mask.digest
            tokens, logprobs = logprobs_of(answer.json())
            assert logprobs == pytest.approx(oracle.logprobs([*prompt, *tokens], mask)[-8:], abs=1e-4)

    @staticmethod
    def assert_running(client: httpx.Client, sequences: int) -> None:
        assert metric(client.get("/metrics").text, "vllm:num_requests_running") == sequences

    @staticmethod
    def text(response: httpx.Response) -> str:
        assert events_in(response.text)[-1] == "[DONE]"
        return "".join(json.loads(event)["choices"][0]["text"] for event in events_in(response.text)[:-1])

    @contextmanager
    def streamed(self, client: httpx.Client, body: dict[str, Any]) -> Iterator[list[str]]:
        """A streamed completion, under way inside; after it its text is in the list."""
        texts: list[str] = []
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            pieces = response.iter_text()
            start = next(pieces)
            yield texts
            texts.append(self.text(httpx.Response(200, text=start + "".join(pieces))))


async def test_a_mask_waits_for_a_row_until_a_client_has_gone(first: Server) -> None:
    long = {"prompt": PROMPT, "max_tokens": 1900, "stream": True, "extra_body": {"ignore_eos": True}}
    short = {"model": "tiny:zh", "prompt": PROMPT, "max_tokens": 2}
    assert ROWS == 2
    async with openai.AsyncOpenAI(
        base_url=f"{first.url}/v1", api_key=USER, max_retries=0, timeout=DEADLINE_S
    ) as client:
        streams = [await client.completions.create(model=f"tiny:{mask}", **long) for mask in ("en", "vi")]
        waiting = asyncio.create_task(client.completions.create(**short))
        await client.completions.create(**{**short, "model": "tiny"})
        assert not waiting.done()
        await streams[0].close()
        assert (await waiting).choices[0].finish_reason == "length"
        await streams[1].close()


def files_in(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def upload_at_once(server: Server, name: str, file: bytes, barrier: threading.Barrier) -> int:
    """Upload a mask on a connection that is open, when all others are as far; the status."""
    with client_of(server) as client:
        assert client.get("/health").status_code == 200
        barrier.wait(DEADLINE_S)
        return client.put(f"/masks/{name}", content=file).status_code


@contextmanager
def largest_file(pid: int, size: int) -> Iterator[None]:
    """Let a process write no file beyond `size` bytes, as if its disk were full."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


class TestAttacks:
    def test_who_may_do_what(self, place: Place, first: Server) -> None:
        file = random_mask(place.tiny, "owned", seed=7)[1]
        generate = {"prompt": PROMPT, "max_tokens": 1}
        calls: list[tuple[str, str, dict[str, Any]]] = [
            ("GET", "/health", {}),
            ("GET", "/ready", {}),
            ("POST", "/generate", {"json": generate}),
            ("POST", "/v1/completions", {"json": {**generate, "model": "tiny"}}),
            ("GET", "/v1/models", {}),
            ("GET", "/masks", {}),
            ("GET", "/metrics", {}),
            ("GET", "/openapi.json", {}),
            ("PUT", "/masks/owned", {"content": file}),
            ("DELETE", "/masks/owned", {}),
        ]
        statuses: dict[str | None, list[int]] = {}
        for key in (None, UNKNOWN, USER, ADMIN):
            with client_of(first, key) as client:
                statuses[key] = [client.request(method, path, **body).status_code for method, path, body in calls]
        assert statuses[None] == statuses[UNKNOWN] == [200, 200] + 8 * [401]
        assert statuses[USER] == 8 * [200] + 2 * [403]
        assert statuses[ADMIN] == 8 * [200] + [201, 204]

    def test_the_openai_package(self, first: Server) -> None:
        def complete(key: str) -> Any:
            with openai.OpenAI(base_url=f"{first.url}/v1", api_key=key, max_retries=0) as client:
                return client.completions.create(model="tiny:zh", prompt=PROMPT, max_tokens=2)

        assert complete(USER).model == "tiny:zh"
        with pytest.raises(openai.AuthenticationError) as refused:
            complete(UNKNOWN)
        assert refused.value.code == "unknown_api_key"

    def test_paths_lead_nowhere_else(self, place: Place, first: Server) -> None:
        file = random_mask(place.tiny, "outside", seed=8)[1]
        before = files_in(place.directory)
        targets = ["../outside", "../../outside", "%2e%2e%2foutside", "%2e%2e/outside", "..%5coutside", "/tmp/outside"]
        targets += [
            "%2ftmp%2foutside",
            f"{place.directory}/outside",
            ".%00/outside",
            "outside%00",
            "outside.safetensors",
        ]
        for target in targets:
            status, _ = exchange(first, f"PUT /masks/{target} HTTP/1.1".encode(), body=file)
            assert status in (400, 404, 405, 422), target
        assert files_in(place.directory) == before
        assert not list(Path("/tmp").glob("outside*"))
        with client_of(first) as client:
            assert "outside" not in client.get("/masks").text

    def test_a_body_that_is_too_large(self, first: Server) -> None:
        with client_of(first) as client:
            for path, body in (("/generate", {}), ("/v1/completions", {"model": "tiny"})):
                refused = client.post(path, json={**body, "prompt": PROMPT * MAX_BODY_BYTES})
                assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
            refused = client.put("/masks/large", content=bytes(2 * MAX_BODY_BYTES))
            assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
            assert client.get("/masks/large").status_code == 404

    async def test_slow_clients_stop_nobody_and_are_sent_away(self, first: Server) -> None:
        began = time.monotonic()
        head = b"POST /generate HTTP/1.1\r\nHost: x\r\nx-api-key: %b\r\nContent-Length: 999\r\n\r\n" % USER.encode()
        slow = [asyncio.create_task(dribble(first, head)) for _ in range(SLOW_CLIENTS)]
        async with async_client_of(first) as client:
            answer = await client.post("/generate", json={"prompt": PROMPT, "max_tokens": 5})
        assert answer.status_code == 200
        assert not any(task.done() for task in slow)
        answers = await asyncio.gather(*slow)
        assert time.monotonic() - began < BODY_TIMEOUT_S + 30
        assert {answer.partition(b"\r\n")[0] for answer in answers} == {b"HTTP/1.1 408 Request Timeout"}

    def test_the_log_keeps_secrets_and_its_lines(self, first: Server) -> None:
        evil = "%0d%0aFORGED%20line%1b%5b31m"
        requests = [
            (f"GET /{evil} HTTP/1.1", 404),
            (f"GET /masks/{evil} HTTP/1.1", 404),
            (f"GET /masks?mask={evil} HTTP/1.1", 422),
            (f"POST /generate?mask={evil} HTTP/1.1", 404),
            ("GET /health HTTP/1.1\r\nX-Request-Id: a FORGED id", 200),
            ("GET /health HTTP/1.1\r\nX-Request-Id: a\x1b[31mFORGED", 200),
            ("GET /health HTTP/1.1\r\nX-Request-Id: a\rFORGED", 400),
            ("GET /FORGED\x1b[31m HTTP/1.1", 400),
        ]
        body = json.dumps({"prompt": PROMPT, "max_tokens": 1}).encode()
        for head, expected in requests:
            content = body if head.startswith("POST") else b""
            status, answer = exchange(first, head.encode(), content, b"Content-Type: application/json")
            assert status == expected, (head, answer)
            assert b"FORGED" not in answer.partition(b"\r\n\r\n")[0]
        with client_of(first) as client:
            assert client.post("/generate", json={"prompt": PROMPT, "max_tokens": "many"}).status_code == 422
            assert client.post("/generate", json={"prompt": PROMPT * 500, "max_tokens": 1}).status_code == 400
            last = client.get("/masks", headers={"X-Request-Id": "the-last-one"})
        assert last.headers["X-Request-Id"] == "the-last-one"
        log_says(first, "the-last-one")
        assert_discreet(first)
        forged = [line for line in first.log.read_text().split("\n") if "FORGED" in line]
        assert len(forged) == 2  # the paths; queries and ids that are no words are not logged
        for line in forged:
            assert " INFO crane.access request request_id=" in line
            assert "\x1b" not in line
            assert "\r" not in line


def exchange(server: Server, head: bytes, body: bytes = b"", *headers: bytes) -> tuple[int, bytes]:
    """Send a request as it stands, with an admin's key; the status and the whole answer."""
    port = int(server.url.rpartition(":")[2])
    more = (b"Host: x", b"Connection: close", b"x-api-key: " + ADMIN.encode(), b"Content-Length: %d" % len(body))
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as connection:
        connection.sendall(b"\r\n".join([head, *more, *headers, b"", b""]) + body)
        answer = b""
        with suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                answer += piece
    return int(answer.split(b" ", 2)[1]), answer


async def dribble(server: Server, start: bytes) -> bytes:
    """Send the start of a request, then a byte a second for as long as the server listens; what it has answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    writer.write(start)

    async def go_on() -> None:
        while True:
            await asyncio.sleep(1)
            writer.write(b"a")

    sending = asyncio.create_task(go_on())
    answer = b""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while piece := await reader.read(2**16):
                answer += piece
        return answer
    except ConnectionResetError:  # what was sent as the server closed; the answer came before
        return answer
    finally:
        sending.cancel()
        writer.close()


def log_says(server: Server, text: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while text not in server.log.read_text():
        assert time.monotonic() < deadline, f"{text} is not logged"
        time.sleep(0.05)


def assert_discreet(server: Server) -> None:
    log = server.log.read_text()
    assert "crane.access" in log
    assert not [secret for secret in (USER, ADMIN, UNKNOWN, "harbour") if secret in log]


@dataclass
class RequestUnderWay:
    """A request under way, and what has come of its answer."""

    path: str
    body: dict[str, Any]
    status: int = 0
    content_type: str = ""
    text: str = ""
    has_begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, client: httpx.AsyncClient) -> "RequestUnderWay":
        async with client.stream("POST", self.path, json=self.body) as response:
            self.status, self.content_type = response.status_code, response.headers["content-type"].partition(";")[0]
            async for piece in response.aiter_text():
                self.text += piece
                self.has_begun.set()
        return self

    @property
    def events(self) -> list[str]:
        assert self.content_type == "text/event-stream", self.text
        return events_in(self.text)


def events_in(text: str) -> list[str]:
    """The data of server-sent events."""
    return [event.rpartition("data: ")[2] for event in text.strip().split("\n\n")]


async def under_way(client: httpx.AsyncClient, requests: int) -> None:
    with_itself = requests + 1
    await metrics_say(client, lambda text: metric(text, "crane_requests_in_flight") == with_itself)


async def ready_says(client: httpx.AsyncClient, code: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while (response := await client.get("/ready")).status_code == 200:
            await asyncio.sleep(0.02)
    assert (response.status_code, response.json()["error"]["code"]) == (503, code)


async def refused_with(client: httpx.AsyncClient, code: str) -> None:
    """New requests get a 503, until the server is not there any more."""
    for path, body in (("/generate", {"prompt": PROMPT}), ("/v1/completions", {"prompt": PROMPT, "model": "tiny"})):
        try:
            refused = await client.post(path, json=body)
        except httpx.ConnectError:
            continue
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, code)


def processes_of(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


async def ends_with(server: Server, processes: list[psutil.Process], code: int, seconds: float) -> None:
    """The server exits with this code in this time, and leaves none of its processes behind."""
    try:
        assert await asyncio.to_thread(server.process.wait, seconds) == code
    except subprocess.TimeoutExpired:
        pytest.fail(f"the server is still there after {seconds} s")
    _, left = await asyncio.to_thread(psutil.wait_procs, processes, timeout=10)
    assert left == []
    await asyncio.to_thread(log_says, server, "Finished server process")
    assert_discreet(server)


async def test_sigterm_lets_everything_under_way_end_whole(first: Server) -> None:
    short = {"prompt": PROMPT, "temperature": 0, "max_tokens": 40}
    stream = {**short, "stream": True}
    v1, chat = {"model": "tiny", "ignore_eos": True}, {"messages": MESSAGES, "temperature": 0, "max_tokens": 40}
    many = RequestUnderWay("/generate", {**short, "prompt": [PROMPT] * 100, "max_tokens": 60})
    generated = [RequestUnderWay("/generate", short) for _ in range(8)]
    streamed = [RequestUnderWay("/generate", stream) for _ in range(8)]
    completed = [RequestUnderWay("/v1/completions", {**short, **v1}) for _ in range(4)]
    completed_in_streams = [RequestUnderWay("/v1/completions", {**stream, **v1}) for _ in range(4)]
    chatted = [RequestUnderWay("/v1/chat/completions", {**chat, **v1, "stream": True}) for _ in range(5)]
    rest = [*generated, *streamed, *completed, *completed_in_streams, *chatted]
    processes = processes_of(first)
    async with async_client_of(first) as client:
        tasks = [asyncio.create_task(many.run(client))]
        # These fill the engine: what comes behind them cannot end before all of them are under way.
        await metrics_say(client, lambda text: metric(text, "crane_sequences") >= 100 - RUNNING)
        tasks += [asyncio.create_task(asked.run(client)) for asked in rest]
        await metrics_say(client, lambda text: metric(text, "crane_sequences") == 100 + len(rest))
        first.process.send_signal(signal.SIGTERM)
        await ready_says(client, "shutting_down")
        await refused_with(client, "shutting_down")
        assert [task.result() for task in tasks if task.done()] == []
        await asyncio.gather(*tasks)
    await ends_with(first, processes, code=0, seconds=60)
    assert {asked.status for asked in (many, *rest)} == {200}
    assert [output["completion_tokens"] for output in json.loads(many.text)["outputs"]] == [60] * 100
    texts = {json.loads(asked.text)["outputs"][0]["text"] for asked in generated}
    for asked in streamed:
        *deltas, last, done = asked.events
        assert (json.loads(last)["outputs"][0]["completion_tokens"], done) == (40, "[DONE]")
        texts.add("".join(json.loads(delta)["text"] for delta in deltas))
    for asked in completed:
        choice = json.loads(asked.text)["choices"][0]
        assert choice["finish_reason"] == "length"
        texts.add(choice["text"])
    for asked in completed_in_streams:
        texts.add(TestMasks.text(httpx.Response(200, text=asked.text)))
    assert len(texts) == 1
    for asked in chatted:
        *chunks, done = asked.events
        assert (json.loads(chunks[-1])["choices"][0]["finish_reason"], done) == ("length", "[DONE]")


def test_masks_outlive_a_restart(place: Place, second: Server) -> None:
    with client_of(second) as client:
        kept = client.get("/masks/kept")
        assert (kept.json()["digest"], kept.headers["ETag"]) == (place.kept, f'"{place.kept}"')
        used = client.post("/generate?mask=kept", json={"prompt": PROMPT, "max_tokens": 1})
        assert used.json()["mask"]["digest"] == place.kept
        assert client.get("/masks/gone").status_code == 404
        assert "gone" not in client.get("/masks").text


async def test_the_death_of_the_engine_is_told_to_everybody(second: Server) -> None:
    v1 = {**ENDLESS, "model": "tiny:zh"}
    many = {**MANY, "prompt": [PROMPT] * 100}  # of all together fewer than one key may have
    chat = {"model": "tiny", "messages": MESSAGES, "max_tokens": 1900}
    begun = [
        RequestUnderWay("/v1/completions", {**v1, "stream": True}),
        RequestUnderWay("/v1/completions", {**v1, "stream": True}),
        RequestUnderWay("/v1/chat/completions", {**chat, "ignore_eos": True, "stream": True}),
        RequestUnderWay("/generate", {**many, "stream": True}),
    ]
    streams = [
        RequestUnderWay("/generate", {**many, "stream": True, "mask": "zh"}),
        RequestUnderWay("/v1/completions", {**v1, "stream": True}),
        RequestUnderWay("/v1/chat/completions", {**chat, "stream": True}),
        *(RequestUnderWay("/v1/messages", {**chat, "stream": True}) for _ in range(2)),
        *(RequestUnderWay("/v1/responses", {"model": "tiny", "input": PROMPT, "stream": True}) for _ in range(2)),
    ]
    plain = [
        *(RequestUnderWay("/generate?mask=vi", many) for _ in range(3)),
        *(RequestUnderWay("/v1/completions", v1) for _ in range(2)),
        RequestUnderWay("/v1/chat/completions", chat),
        RequestUnderWay("/v1/responses", {"model": "tiny", "input": PROMPT}),
        RequestUnderWay("/score", {"text": [f"{number} {PROMPT}" for number in range(50)]}),
        RequestUnderWay("/generate", many),
    ]
    everything = [*begun, *streams, *plain]
    assert len(everything) == 20
    processes = processes_of(second)
    (core,) = (process for process in processes if "EngineCore" in process.name())
    async with async_client_of(second) as client:
        tasks = [asyncio.create_task(asked.run(client)) for asked in begun[:3]]
        await asyncio.gather(*(asked.has_begun.wait() for asked in begun[:3]))
        tasks.append(asyncio.create_task(begun[3].run(client)))
        await begun[3].has_begun.wait()
        tasks += [asyncio.create_task(asked.run(client)) for asked in everything[4:]]
        await under_way(client, 20)
        core.kill()
        await ready_says(client, "engine_dead")
        await refused_with(client, "engine_dead")
        await asyncio.gather(*tasks)
    await ends_with(second, processes, code=1, seconds=45)
    for asked in (*begun, *streams):
        if asked.status == 503:
            assert json.loads(asked.text)["error"]["code"] == "engine_dead"
            continue
        assert "[DONE]" not in asked.events
        assert json.loads(asked.events[-1])["error"] == {
            "message": "the engine has died",
            "type": "service_unavailable_error",
            "param": None,
            "code": "engine_dead",
        }
        is_named = asked.path in ("/v1/messages", "/v1/responses")
        assert asked.text.split("\n\n")[-2].startswith("event: error\ndata: {" if is_named else "data: {")
    assert [asked.status for asked in begun] == [200] * 4
    assert all(len(asked.events) > 1 for asked in begun)
    for asked in plain:
        assert (asked.status, json.loads(asked.text)["error"]["code"]) == (503, "engine_dead"), asked.path
    assert "Traceback" not in "".join(line for line in second.log.read_text().split("\n") if " crane." in line)
