"""The clients' API key, and their calls that change masks."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from clients import AsyncCraneClient, CraneClient, CraneError, RetryPolicy

KEY = "a-key-that-nobody-knows"
FAST = RetryPolicy(attempts=2, first_wait_s=0.001)
SUMMARY = {"name": "mine", "digest": "d", "neurons": 3, "language": "zh", "method": "own", "budget": None, "new": 1}
NEURONS = {
    "name": "mine",
    "digest": "d",
    "layers": [{"layer": 0, "neurons": [1, 2], "scales": None}, {"layer": 1, "neurons": [5], "scales": [0.5]}],
    "output": [{"layer": 0, "dimensions": [3], "scales": None}],
}


class Server:
    """Answers by method and path; keeps the requests."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if self.status >= 400:
            error = {"message": "not for you", "type": "permission_error", "param": None, "code": "admin_key_required"}
            return httpx.Response(self.status, json={"error": error})
        answers: dict[tuple[str, str], Any] = {
            ("PUT", "/masks/mine"): httpx.Response(201, json=SUMMARY),
            ("DELETE", "/masks/mine"): httpx.Response(204),
            ("GET", "/masks/mine/neurons"): httpx.Response(200, json=NEURONS),
            ("GET", "/masks/mine/file"): httpx.Response(200, content=b"\x00\xff file"),
            ("GET", "/health"): httpx.Response(200, json={"status": "ok"}),
        }
        answer: httpx.Response = answers[request.method, request.url.path]
        return answer


def blocking(server: Server, **settings: Any) -> CraneClient:
    return CraneClient("http://crane.test", retries=FAST, transport=httpx.MockTransport(server), **settings)


def awaiting(server: Server, **settings: Any) -> AsyncCraneClient:
    return AsyncCraneClient("http://crane.test", retries=FAST, transport=httpx.MockTransport(server), **settings)


@pytest.mark.parametrize("as_file", [False, True])
async def test_masks_are_put_as_they_are(tmp_path: Path, as_file: bool) -> None:
    content = b"\x08\x00 a mask file \xff"
    path = tmp_path / "mine.safetensors"
    path.write_bytes(content)
    server = Server()
    with blocking(server) as client:
        assert client.put_mask("mine", path if as_file else content).digest == "d"
    async with awaiting(server) as async_client:
        assert (await async_client.put_mask("mine", path if as_file else content)).neurons == 3
    assert [request.content for request in server.requests] == [content, content]
    assert {request.headers["content-type"] for request in server.requests} == {"application/octet-stream"}


async def test_masks_are_read_and_removed() -> None:
    server = Server()
    with blocking(server) as client:
        neurons = client.mask_neurons("mine")
        assert neurons.layers[1].scales == (0.5,)
        assert neurons.output is not None
        assert (neurons.layers[0].neurons, neurons.output[0].dimensions) == ((1, 2), (3,))
        assert client.mask_file("mine") == b"\x00\xff file"
        client.delete_mask("mine")
    async with awaiting(server) as async_client:
        assert await async_client.mask_neurons("mine") == neurons
        assert await async_client.mask_file("mine") == b"\x00\xff file"
        await async_client.delete_mask("mine")
    assert [request.method for request in server.requests] == ["GET", "GET", "DELETE"] * 2


@pytest.mark.parametrize("name", ["../health", "a/b", "x?y", "%2e%2e"])
async def test_names_stay_in_their_place(name: str) -> None:
    server = Server(404)
    with blocking(server) as client:
        for call in (client.mask_neurons, client.mask_file, client.delete_mask, lambda n: client.put_mask(n, b"")):
            with pytest.raises(CraneError):
                call(name)
    assert all(request.url.raw_path.count(b"/") <= 3 for request in server.requests)
    assert all(request.url.raw_path.startswith(b"/masks/") for request in server.requests)
    assert not any(request.url.query for request in server.requests)


async def test_the_key_goes_with_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRANE_API_KEY", "from-the-environment")
    server = Server()
    with blocking(server, api_key=KEY) as client, blocking(server) as by_environment:
        client.health()
        by_environment.health()
    async with awaiting(server, api_key=KEY) as async_client:
        await async_client.put_mask("mine", b"")
    monkeypatch.delenv("CRANE_API_KEY")
    with blocking(server) as without:
        without.health()
    sent = [request.headers.get("authorization") for request in server.requests]
    assert sent == [f"Bearer {KEY}", "Bearer from-the-environment", f"Bearer {KEY}", None]


def test_an_empty_key_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRANE_API_KEY", "secret")
    server = Server()
    with blocking(server, api_key="") as client:
        client.health()
    assert "authorization" not in server.requests[0].headers


def test_the_key_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    server = Server(403)
    with blocking(server, api_key=KEY) as client, pytest.raises(CraneError) as caught:
        client.put_mask("mine", b"")
    assert len(server.requests) == 1
    assert (caught.value.status, caught.value.code, caught.value.type) == (
        403,
        "admin_key_required",
        "permission_error",
    )
    shown = [str(caught.value), repr(caught.value), json.dumps(vars(caught.value)), repr(client), str(client)]
    assert KEY not in "".join(shown)


@pytest.mark.parametrize("key", ["two words", "line\r\nX-Other: 1", "schlüssel", "tab\t"])
def test_keys_that_cannot_be_sent(key: str) -> None:
    with pytest.raises(ValueError, match="the API key holds blanks") as caught:
        CraneClient(api_key=key)
    assert key not in str(caught.value)


def test_a_key_and_credentials_contradict() -> None:
    with pytest.raises(ValueError, match="only one of them") as caught:
        CraneClient("http://me:hidden@crane.test", api_key=KEY)
    assert KEY not in str(caught.value)
    assert "hidden" not in str(caught.value)
