"""Masks over HTTP: they are looked at, added, replaced and removed while the service serves."""

import asyncio
import errno
import json
import math
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from crane_serve.common.masks import MaskInfo, MaskLibrary, NeuronMask, StoredMask, decode_mask, encode_mask
from crane_serve.service.api.body import DRAINED_BYTES
from crane_serve.service.settings import ApiSettings
from tests.api.fake_engine import BROKEN, FINGERPRINT, NEURONS, FakeEngine

SIZES = FINGERPRINT.intermediate_sizes
INFO = MaskInfo(language="fr", method="test", fingerprint=FINGERPRINT)
ETAG = '"{}"'.format


def mask_of(*neurons: int) -> NeuronMask:
    return NeuronMask.switching_off([neurons, []], SIZES)


def content_of(*neurons: int) -> bytes:
    return encode_mask("any", mask_of(*neurons), INFO)


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    return error


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "masks"
    directory.mkdir()
    return directory


@pytest.fixture
def engine(directory: Path) -> FakeEngine:
    return FakeEngine(directory)


def files(directory: Path) -> dict[str, str]:
    """Digest by name of what is on the disk. Fails for anything that is not a mask of this model."""
    library = MaskLibrary.load(directory, FINGERPRINT)
    assert library.invalid == {}
    assert sorted(path.name for path in directory.iterdir()) == [f"{name}.safetensors" for name in library.masks]
    return {name: stored.mask.digest for name, stored in library.masks.items()}


def served(engine: FakeEngine) -> dict[str, str]:
    return {name: stored.mask.digest for name, stored in engine.library.masks.items()}


async def test_a_new_mask(client: httpx.AsyncClient, engine: FakeEngine, directory: Path) -> None:
    response = await client.put("/masks/fr", content=content_of(3))
    digest = mask_of(3).digest
    assert response.status_code == 201
    assert response.headers["location"] == "/masks/fr"
    assert response.headers["etag"] == ETAG(digest)
    assert response.json() == (await client.get("/masks/fr")).json()
    assert (response.json()["name"], response.json()["digest"]) == ("fr", digest)
    assert (response.json()["neurons_per_layer"], response.json()["language"]) == ([1, 0], "fr")
    assert served(engine)["fr"] == digest
    assert files(directory) == {"fr": digest}


async def test_a_replaced_mask_serves_new_requests(
    client: httpx.AsyncClient, engine: FakeEngine, directory: Path
) -> None:
    body = {"prompt": "a", "max_tokens": 1, "mask": "fr"}
    for status, neuron in ((201, 3), (200, 4)):
        response = await client.put("/masks/fr", content=content_of(neuron))
        digest = mask_of(neuron).digest
        assert response.status_code == status
        assert ("location" in response.headers) == (status == 201)
        assert response.headers["etag"] == ETAG(digest)
        assert (await client.post("/generate", json=body)).json()["mask"]["digest"] == digest
        assert engine.calls[-1].mask is not None
        assert engine.calls[-1].mask.mask.digest == digest
        assert files(directory) == {"fr": digest}


async def test_a_mask_comes_back_as_the_file_that_was_sent(client: httpx.AsyncClient) -> None:
    intermediate, output = torch.ones(2, 6), torch.ones(2, 4)
    intermediate[0, 1], output[1, 3] = 0.25, 0.0
    mask = NeuronMask(intermediate, SIZES, output)
    info = INFO.model_copy(update={"parameters": {"note": "汉语", "seed": 3}, "budget": 0.5, "corpus_digest": "c" * 64})
    sent = encode_mask("fr", mask, info)
    assert (await client.put("/masks/fr", content=sent)).status_code == 201
    response = await client.get("/masks/fr/file")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["content-disposition"] == 'attachment; filename="fr.safetensors"'
    assert response.headers["etag"] == ETAG(mask.digest)
    assert response.content == sent
    assert decode_mask("fr", response.content, source="answer").mask.digest == mask.digest


async def test_a_file_is_named_after_the_mask_and_not_after_the_question(client: httpx.AsyncClient) -> None:
    response = await client.get("/masks/zh/file")
    assert response.headers["content-disposition"] == 'attachment; filename="attnlrp-zh.safetensors"'
    assert decode_mask("x", response.content, source="answer").mask.neuron_sets() == NEURONS["attnlrp-zh"]


async def test_neurons(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    digest = engine.library.masks["attnlrp-zh"].mask.digest
    response = await client.get("/masks/zh/neurons")
    assert response.headers["etag"] == ETAG(digest)
    assert response.json() == {
        "name": "attnlrp-zh",
        "digest": digest,
        "layers": [{"layer": 0, "neurons": [1, 2], "scales": None}, {"layer": 1, "neurons": [], "scales": None}],
        "output": None,
    }


async def test_neurons_with_scales_and_output_dimensions(client: httpx.AsyncClient) -> None:
    intermediate, output = torch.ones(2, 6), torch.ones(2, 4)
    intermediate[0, 1], intermediate[0, 4], intermediate[1, 2] = 0.0, 0.5, 0.0
    output[1, 0], output[1, 3] = -1.5, 0.0
    content = encode_mask("fr", NeuronMask(intermediate, SIZES, output), INFO)
    assert (await client.put("/masks/fr", content=content)).status_code == 201
    answer = (await client.get("/masks/fr/neurons")).json()
    assert answer["layers"] == [
        {"layer": 0, "neurons": [1, 4], "scales": [0.0, 0.5]},
        {"layer": 1, "neurons": [2], "scales": None},
    ]
    assert answer["output"] == [
        {"layer": 0, "dimensions": [], "scales": None},
        {"layer": 1, "dimensions": [0, 3], "scales": [-1.5, 0.0]},
    ]


@pytest.mark.parametrize("route", ["/masks/zh", "/masks/zh/neurons", "/masks/zh/file", "/masks"])
async def test_an_answer_that_is_known_is_not_sent_again(client: httpx.AsyncClient, route: str) -> None:
    etag = (await client.get(route)).headers["etag"]
    for known in (etag, f"W/{etag}", "*", f'"other", {etag}', f'"a,*" ,{etag}'):
        response = await client.get(route, headers={"If-None-Match": known})
        assert (response.status_code, response.content) == (304, b"")
        assert response.headers["etag"] == etag
        assert "content-type" not in response.headers
    for unknown in ('"other"', '"*"', f'"{etag[1:10]}"', f'W/"other", "{etag[1:-1].upper()}"'):
        assert (await client.get(route, headers={"If-None-Match": unknown})).status_code == 200
    lines = [("If-None-Match", '"other"'), ("If-None-Match", etag)]
    assert (await client.get(route, headers=lines)).status_code == 304


async def test_the_list_changes_its_tag_with_everything_in_it(client: httpx.AsyncClient, directory: Path) -> None:
    (directory / "broken.safetensors").write_bytes(b"broken")
    other_origin = INFO.model_copy(update={"language": "de"})
    tags = [(await client.get("/masks")).headers["etag"]]
    for change in (
        client.put("/masks/fr", content=content_of(3)),
        client.put("/masks/fr", content=encode_mask("fr", mask_of(3), other_origin)),
        client.delete("/masks/broken"),
        client.delete("/masks/fr"),
    ):
        assert (await change).is_success
        tags.append((await client.get("/masks")).headers["etag"])
    assert len(set(tags)) == 5


@pytest.mark.parametrize("route", ["/masks/{}", "/masks/{}/neurons", "/masks/{}/file"])
@pytest.mark.parametrize(
    ("name", "status", "code"),
    [
        ("fr", 404, "unknown_mask"),
        ("none", 404, "unknown_mask"),
        ("zh,vi", 404, "unknown_mask"),
        ("broken", 409, "invalid_mask"),
    ],
)
async def test_masks_that_are_not_there(
    client: httpx.AsyncClient, route: str, name: str, status: int, code: str
) -> None:
    response = await client.get(route.format(name), headers={"If-None-Match": "*"})
    assert (response.status_code, error_of(response)["code"]) == (status, code)


async def test_a_removed_mask_is_gone(client: httpx.AsyncClient, engine: FakeEngine, directory: Path) -> None:
    await client.put("/masks/fr", content=content_of(3))
    response = await client.delete("/masks/fr")
    assert (response.status_code, response.content) == (204, b"")
    assert "content-type" not in response.headers
    assert "fr" not in served(engine)
    assert files(directory) == {}
    for again in (client.delete("/masks/fr"), client.get("/masks/fr"), client.get(f"/masks/{mask_of(3).digest}")):
        response = await again
        assert (response.status_code, error_of(response)["code"]) == (404, "unknown_mask")


async def test_only_exactly_a_name_is_removed(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    before = served(engine)
    for name in ("zh", before["lape-zh"], "none", "lape"):
        response = await client.delete(f"/masks/{name}")
        assert (response.status_code, error_of(response)["code"]) == (404, "unknown_mask")
    assert served(engine) == before


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
async def test_a_file_that_cannot_be_used_can_be_replaced_and_removed(
    client: httpx.AsyncClient, engine: FakeEngine, directory: Path, method: str
) -> None:
    (directory / "broken.safetensors").write_bytes(b"broken")
    assert engine.library.invalid == {"broken": BROKEN}
    response = await client.request(method, "/masks/broken", content=content_of(3) if method == "PUT" else None)
    assert response.status_code == (200 if method == "PUT" else 204)
    assert engine.library.invalid == {}
    assert files(directory) == ({"broken": mask_of(3).digest} if method == "PUT" else {})


OLD = mask_of(3).digest


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({"If-Match": ETAG(OLD)}, True),
        ({"If-Match": f'"other", {ETAG(OLD)}'}, True),
        ({"If-Match": "*"}, True),
        ({"If-Match": '"other"'}, False),
        ({"If-Match": f"W/{ETAG(OLD)}"}, False),
        ({"If-Match": '"*"'}, False),
        ({"If-None-Match": "*"}, False),
        ({"If-None-Match": ETAG(OLD)}, False),
        ({"If-None-Match": f"W/{ETAG(OLD)}"}, False),
        ({"If-None-Match": '"other"'}, True),
        ({"If-Match": ETAG(OLD), "If-None-Match": "*"}, False),
    ],
)
async def test_a_change_on_a_condition(
    client: httpx.AsyncClient, engine: FakeEngine, directory: Path, method: str, headers: dict[str, str], allowed: bool
) -> None:
    await client.put("/masks/fr", content=content_of(3))
    content = content_of(4) if method == "PUT" else None
    response = await client.request(method, "/masks/fr", content=content, headers=headers)
    if allowed:
        assert response.is_success
        assert files(directory) == ({"fr": mask_of(4).digest} if method == "PUT" else {})
    else:
        assert (response.status_code, error_of(response)["code"]) == (412, "condition_failed")
        assert f"its digest is {OLD}" in error_of(response)["message"]
        assert files(directory) == {"fr": OLD}
    assert served(engine).get("fr") == files(directory).get("fr")


@pytest.mark.parametrize(
    ("name", "headers", "status"),
    [
        ("fr", {"If-None-Match": "*"}, 201),
        ("fr", {"If-Match": "*"}, 412),
        ("fr", {"If-Match": ETAG(OLD)}, 412),
        ("zh", {"If-Match": "*"}, 412),  # a bare language is another name
        ("broken", {"If-None-Match": "*"}, 412),
        ("broken", {"If-Match": ETAG(OLD)}, 412),
        ("broken", {"If-Match": "*"}, 200),
    ],
)
async def test_a_condition_where_no_mask_is(
    client: httpx.AsyncClient, directory: Path, name: str, headers: dict[str, str], status: int
) -> None:
    assert (await client.put(f"/masks/{name}", content=content_of(3), headers=headers)).status_code == status
    assert files(directory) == ({} if status == 412 else {name: OLD})


@pytest.mark.parametrize("method", ["PUT", "DELETE", "GET"])
@pytest.mark.parametrize("condition", ["", "fr", OLD, f'"{OLD}', '"a" "b"', "**", "*, *", '"a",', 'w/"a"', '"ü"'])
async def test_a_malformed_condition_is_refused(
    client: httpx.AsyncClient, directory: Path, method: str, condition: str
) -> None:
    await client.put("/masks/fr", content=content_of(3))
    header = "If-None-Match" if method == "GET" else "If-Match"
    headers = [(header.encode(), condition.encode())]
    content = content_of(4) if method == "PUT" else None
    response = await client.request(method, "/masks/fr", content=content, headers=headers)
    assert response.status_code == 422
    assert error_of(response)["message"].endswith("expected *, or digests in double quotes, joined with commas")
    assert files(directory) == {"fr": OLD}


async def test_a_crowd_changes_one_mask(client: httpx.AsyncClient, engine: FakeEngine, directory: Path) -> None:
    contents = {mask_of(*neurons).digest: content_of(*neurons) for neurons in _twenty()}
    puts = [client.put("/masks/fr", content=content) for content in contents.values()]
    responses = await asyncio.gather(*puts)
    assert sorted(response.status_code for response in responses) == [200] * 19 + [201]
    assert [response.json()["digest"] for response in responses] == list(contents)
    assert files(directory) == {"fr": served(engine)["fr"]}
    assert served(engine)["fr"] in contents


async def test_of_a_crowd_with_one_condition_one_succeeds(
    client: httpx.AsyncClient, engine: FakeEngine, directory: Path
) -> None:
    await client.put("/masks/fr", content=encode_mask("fr", NeuronMask.switching_off([[], [0]], SIZES), INFO))
    headers = {"If-Match": ETAG(served(engine)["fr"])}
    puts = [client.put("/masks/fr", content=content_of(*neurons), headers=headers) for neurons in _twenty()]
    responses = await asyncio.gather(*puts)
    assert sorted(response.status_code for response in responses) == [200] + [412] * 19
    (winner,) = (response for response in responses if response.status_code == 200)
    assert files(directory) == {"fr": served(engine)["fr"]} == {"fr": winner.json()["digest"]}


def _twenty() -> list[tuple[int, ...]]:
    subsets = [tuple(neuron for neuron in range(6) if number >> neuron & 1) for number in range(1, 21)]
    assert len({mask_of(*neurons).digest for neurons in subsets}) == 20
    return subsets


class SlowEngine(FakeEngine):
    """Each change waits until it is let through."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.changing = asyncio.Event()
        self.go_on = asyncio.Event()

    async def put_mask(self, stored: StoredMask, *, save: bool = False) -> None:
        async def put() -> None:
            self.changing.set()
            await self.go_on.wait()
            await super(SlowEngine, self).put_mask(stored, save=save)

        await asyncio.shield(asyncio.ensure_future(put()))


async def test_a_caller_that_leaves_does_not_break_the_next_ones_condition(directory: Path) -> None:
    engine = SlowEngine(directory)
    async for client in client_of(engine):
        gone = asyncio.create_task(client.put("/masks/fr", content=content_of(3)))
        await engine.changing.wait()
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        engine.changing.clear()
        second = asyncio.create_task(client.put("/masks/fr", content=content_of(4), headers={"If-None-Match": "*"}))
        with pytest.raises(TimeoutError):  # it waits for the change that nobody waits for any more
            await asyncio.wait_for(engine.changing.wait(), timeout=1)
        engine.go_on.set()
        assert (await second).status_code == 412
        assert files(directory) == {"fr": mask_of(3).digest}


async def client_of(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    from crane_serve.service.api.app import create_app

    async def start() -> FakeEngine:
        return engine

    app = create_app(start)  # type: ignore[arg-type]
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://crane") as client:
            yield client


@pytest.mark.parametrize("is_new", [True, False], ids=["new", "replaced"])
async def test_a_full_disk(
    client: httpx.AsyncClient, engine: FakeEngine, directory: Path, monkeypatch: pytest.MonkeyPatch, is_new: bool
) -> None:
    if not is_new:
        await client.put("/masks/fr", content=content_of(3))
    before = served(engine)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        response = await client.put("/masks/fr", content=content_of(4))
    assert response.status_code == 507
    message = "mask 'fr' was not saved and nothing has changed: No space left on device"
    assert error_of(response) == {"message": message, "type": "server_error", "param": None, "code": "mask_not_saved"}
    assert served(engine) == before
    assert files(directory) == ({} if is_new else {"fr": OLD})
    assert (await client.put("/masks/fr", content=content_of(4))).status_code == (201 if is_new else 200)
    assert files(directory) == {"fr": mask_of(4).digest}


async def test_a_file_that_cannot_be_removed(
    client: httpx.AsyncClient, engine: FakeEngine, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await client.put("/masks/fr", content=content_of(3))

    def read_only(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", read_only)
        response = await client.delete("/masks/fr")
    assert (response.status_code, error_of(response)["code"]) == (507, "mask_not_saved")
    message = "mask 'fr' was not removed and nothing has changed: Read-only file system"
    assert error_of(response)["message"] == message
    assert files(directory) == {"fr": OLD} == {"fr": served(engine)["fr"]}


async def test_a_dead_engine_changes_nothing(client: httpx.AsyncClient, engine: FakeEngine, directory: Path) -> None:
    engine.is_dead = True
    for change in (client.put("/masks/fr", content=content_of(3)), client.delete("/masks/lape-zh")):
        response = await change
        assert (response.status_code, error_of(response)["code"]) == (503, "engine_dead")
    assert "fr" not in served(engine)
    assert files(directory) == {}


OTHER_MODEL = FINGERPRINT.model_copy(update={"weights_digest": "c" * 64})
LARGER_MODEL = FINGERPRINT.model_copy(update={"intermediate_sizes": (60, 50)})
FOREIGN = encode_mask("fr", mask_of(3), INFO.model_copy(update={"fingerprint": OTHER_MODEL}))
LARGER = encode_mask(
    "fr", NeuronMask.switching_off([[1], []], (60, 50)), INFO.model_copy(update={"fingerprint": LARGER_MODEL})
)


def too_large() -> bytes:
    """A mask file as an engine without a bound of scales would write it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crane_serve.common.masks.mask.MAX_SCALE", math.inf)
        scales = torch.ones(2, 6)
        scales[0, 1] = 1e38
        return encode_mask("fr", NeuronMask(scales, (6, 5)), INFO)


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        pytest.param(too_large(), 422, "malformed_mask_file", id="a scale beyond the bound"),
        pytest.param(b"", 422, "malformed_mask_file", id="empty"),
        pytest.param(content_of(3)[:-1], 422, "malformed_mask_file", id="cut"),
        pytest.param(content_of(3) + b"\0", 422, "malformed_mask_file", id="longer"),
        pytest.param(content_of(3)[:-1] + b"\xff", 422, "malformed_mask_file", id="changed"),
        pytest.param(bytes(100), 422, "malformed_mask_file", id="zeros"),
        pytest.param(b"\x10\x27\0\0\0\0\0\0" + b"[" * 10_000, 422, "malformed_mask_file", id="deep"),
        pytest.param(b"{}" * 100, 422, "malformed_mask_file", id="JSON"),
        pytest.param(FOREIGN, 409, "other_model", id="another model's"),
        pytest.param(LARGER, 409, "other_model", id="a larger model's"),
    ],
)
async def test_a_body_that_is_no_mask_of_this_model(
    client: httpx.AsyncClient, engine: FakeEngine, directory: Path, content: bytes, status: int, code: str
) -> None:
    before = served(engine)
    response = await client.put("/masks/fr", content=content)
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert "mask 'fr'" in error_of(response)["message"]
    assert (served(engine), files(directory)) == (before, {})


class Upload:
    """An ASGI client that sends a body in pieces, counts how much of it is read, and may leave in its middle."""

    def __init__(self, pieces: AsyncIterator[bytes], headers: dict[str, str], *, leaves: bool = False) -> None:
        self._pieces = pieces
        self._headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        self._leaves = leaves
        self._is_over = False
        self.read = 0
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""

    async def put(self, app: FastAPI, path: str) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "PUT",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": self._headers,
        }
        await asyncio.wait_for(app(scope, self._receive, self._send), timeout=30)

    async def _receive(self) -> dict[str, Any]:
        async for piece in self._pieces:
            self.read += len(piece)
            return {"type": "http.request", "body": piece, "more_body": True}
        if self._leaves:
            return {"type": "http.disconnect"}
        if self._is_over:
            await asyncio.Event().wait()
        self._is_over = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            self.body += message["body"]


async def pieces_of(content: bytes, piece: int) -> AsyncIterator[bytes]:
    for start in range(0, len(content), piece):
        yield content[start : start + piece]


async def endless() -> AsyncIterator[bytes]:
    while True:
        yield b"\0" * 2**20


async def test_an_upload_in_small_pieces(app: FastAPI, directory: Path) -> None:
    content = content_of(3)
    upload = Upload(pieces_of(content, 7), {})
    await upload.put(app, "/masks/fr")
    assert (upload.status, upload.read) == (201, len(content))
    assert files(directory) == {"fr": OLD}


@pytest.mark.parametrize(
    ("headers", "read", "status", "code"),
    [
        ({}, ApiSettings().max_body_bytes, 413, "body_too_large"),
        ({"Content-Length": str(2**30)}, 0, 413, "body_too_large"),
        ({"Content-Length": "9" * 5000}, 0, 413, "body_too_large"),
        ({"Content-Encoding": "gzip", "Transfer-Encoding": "chunked"}, 0, 415, "unsupported_encoding"),
    ],
)
async def test_an_endless_upload_is_refused_early(
    app: FastAPI, directory: Path, headers: dict[str, str], read: int, status: int, code: str
) -> None:
    upload = Upload(endless(), headers)
    await upload.put(app, "/masks/fr")
    assert upload.status == status
    # What is read of it, the piece that is too much, and what is thrown away behind the answer.
    assert upload.read <= read + 2**20 + DRAINED_BYTES
    assert json.loads(upload.body)["error"]["code"] == code
    assert files(directory) == {}
    assert upload.headers[b"connection"] == b"close"


async def test_an_upload_that_breaks_off_changes_nothing(
    app: FastAPI, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = content_of(3)
    for piece in (content[:-1], content):
        upload = Upload(pieces_of(piece, 100), {}, leaves=True)
        await upload.put(app, "/masks/fr")
        assert (upload.status, upload.body) == (0, b"")
    assert files(directory) == {}
    assert caplog.records == []


@pytest.mark.parametrize("content_type", [None, "application/octet-stream", "Application/X-Safetensors; charset=x"])
@pytest.mark.parametrize("encoding", [None, "identity", "Identity"])
async def test_the_types_of_a_mask_file(
    client: httpx.AsyncClient, content_type: str | None, encoding: str | None
) -> None:
    headers = {name: value for name, value in (("Content-Type", content_type), ("Content-Encoding", encoding)) if value}
    assert (await client.put("/masks/fr", content=content_of(3), headers=headers)).status_code == 201


@pytest.mark.parametrize(
    ("header", "value", "code", "expected"),
    [
        ("Content-Type", "application/json", "unsupported_media_type", "application/x-safetensors"),
        ("Content-Type", "application/x-www-form-urlencoded", "unsupported_media_type", "application/octet-stream"),
        ("Content-Type", "", "unsupported_media_type", "application/octet-stream"),
        ("Content-Encoding", "gzip", "unsupported_encoding", "identity"),
        ("Content-Encoding", "identity, br", "unsupported_encoding", "identity"),
    ],
)
async def test_other_types_are_refused(
    client: httpx.AsyncClient, directory: Path, header: str, value: str, code: str, expected: str
) -> None:
    response = await client.put("/masks/fr", content=content_of(3), headers={header: value})
    assert (response.status_code, error_of(response)["code"]) == (415, code)
    assert expected in error_of(response)["message"]
    assert files(directory) == {}


NO_NAMES = {
    "traversal": "../x",
    "escaped traversal": "%2e%2e%2fx",
    "doubly escaped traversal": "%252e%252e%252fx",
    "escaped dots": "%2e%2e",
    "slash": "a/b",
    "escaped slash": "a%2Fb",
    "backslash": "..%5Cx",
    "absolute": "%2Ftmp%2Fx",
    "NUL": "a%00b",
    "newline": "a%0A",
    "broken UTF-8": "%FF",
    "unicode": "%E6%B1%89",
    "full width": "%EF%BD%81",
    "capital": "A",
    "suffix": "a.safetensors",
    "hidden": ".a",
    "long": "x" * 129,
    "very long": "x" * 50_000,
    "empty": "",
    "blank": "%20",
    "joined": "zh,vi",
}


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
@pytest.mark.parametrize("case", NO_NAMES)
async def test_what_is_no_name_touches_nothing(
    client: httpx.AsyncClient, engine: FakeEngine, directory: Path, method: str, case: str
) -> None:
    (directory.parent / "x.safetensors").write_bytes(b"not to be touched")
    before = sorted(directory.parent.rglob("*"))
    masks = served(engine)
    response = await client.request(method, f"/masks/{NO_NAMES[case]}", content=content_of(3), follow_redirects=True)
    assert response.status_code in (404, 405, 422)
    error_of(response)
    assert sorted(directory.parent.rglob("*")) == before
    assert (directory.parent / "x.safetensors").read_bytes() == b"not to be touched"
    assert served(engine) == masks


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a" * 64, "name: 64 hexadecimal digits always mean the mask with this digest; expected another name"),
        ("none", "name: mask name 'none' is reserved for unmasked requests"),
        ("A", "name: String should match pattern '^[a-z0-9_-]+$'"),
        ("x" * 129, "name: String should have at most 128 characters"),
    ],
)
async def test_names_that_a_mask_cannot_have(
    client: httpx.AsyncClient, directory: Path, name: str, message: str
) -> None:
    response = await client.put(f"/masks/{name}", content=content_of(3))
    assert response.status_code == 422
    assert (error_of(response)["param"], error_of(response)["message"]) == ("name", message)
    assert files(directory) == {}


@pytest.mark.parametrize("name", ["a", "-", "_", "0", "x" * 128, "a" * 63, "a" * 65, "none-zh"])
async def test_names_that_a_mask_can_have(client: httpx.AsyncClient, directory: Path, name: str) -> None:
    assert (await client.put(f"/masks/{name}", content=content_of(3))).status_code == 201
    assert files(directory) == {name: OLD}
    assert (await client.delete(f"/masks/{name}")).status_code == 204


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/masks"),
        ("GET", "/masks/zh"),
        ("GET", "/masks/zh/neurons"),
        ("GET", "/masks/zh/file"),
        ("PUT", "/masks/fr"),
        ("DELETE", "/masks/lape-zh"),
    ],
)
async def test_a_query_is_refused(
    client: httpx.AsyncClient, engine: FakeEngine, directory: Path, method: str, path: str
) -> None:
    before = served(engine)
    response = await client.request(method, f"{path}?mask=zh", content=content_of(3) if method == "PUT" else None)
    assert response.status_code == 422
    assert error_of(response)["param"] == "mask"
    assert (served(engine), files(directory)) == (before, {})


@pytest.mark.parametrize("parameters", [{"x": float("nan")}, {"x": [[[]]]}, {"x": 10**300}, {"x\n": "\x00\u2028汉"}])
async def test_odd_provenance_can_be_shown(client: httpx.AsyncClient, parameters: dict[str, Any]) -> None:
    content = content_of(3)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = json.loads(header["__metadata__"]["crane"])
    header["__metadata__"]["crane"] = json.dumps({**metadata, "parameters": parameters, "budget": float("nan")})
    encoded = json.dumps(header).encode()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    response = await client.put("/masks/fr", content=len(encoded).to_bytes(8, "little") + encoded + tensors)
    assert response.status_code == 201
    shown = {key: None if value != value else value for key, value in parameters.items()}
    for path in ("/masks/fr", "/masks"):
        answer = (await client.get(path)).json()
        details = answer if path == "/masks/fr" else next(mask for mask in answer["masks"] if mask["name"] == "fr")
        assert details["budget"] is None
    assert (await client.get("/masks/fr")).json()["parameters"] == shown


async def test_openapi_describes_masks(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    paths = document["paths"]
    statuses = {
        ("/masks", "get"): {"200", "304"},
        ("/masks/{name}", "get"): {"200", "304", "404", "409"},
        ("/masks/{name}/neurons", "get"): {"200", "304", "404", "409"},
        ("/masks/{name}/file", "get"): {"200", "304", "404", "409"},
        ("/masks/{name}", "put"): {"200", "201", "403", "409", "412", "415", "507"},
        ("/masks/{name}", "delete"): {"204", "403", "404", "412", "507"},
    }
    for (path, method), expected in statuses.items():
        operation = paths[path][method]
        assert set(operation["responses"]) >= expected | {"401", "408", "413", "422", "503"}
        for status, response in operation["responses"].items():
            assert ("content" in response) == (status not in ("204", "304")), (path, method, status)
            if status == "200":
                assert "ETag" in response["headers"]
    put = paths["/masks/{name}"]["put"]
    binary = {"schema": {"type": "string", "format": "binary"}}
    content = {"application/octet-stream": binary, "application/x-safetensors": binary}
    assert put["requestBody"] == {"required": True, "content": content}
    assert put["responses"]["201"]["headers"].keys() == {"ETag", "Location"}
    assert paths["/masks/{name}/file"]["get"]["responses"]["200"]["content"] == {"application/octet-stream": binary}
    for method in ("put", "delete"):
        name = next(item for item in paths["/masks/{name}"][method]["parameters"] if item["name"] == "name")
        assert (name["schema"]["pattern"], name["schema"]["maxLength"]) == ("^[a-z0-9_-]+$", 128)
