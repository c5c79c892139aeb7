"""The playground behind its gate: what it answers, what it refuses, what it gives away, and what it leaves running."""

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from starlette.types import Receive, Scope, Send

from clients import AsyncCraneClient
from crane_serve.service.api.app import create_app
from crane_serve.service.playground.paths import JOIN, STREAM, is_of_page
from crane_serve.service.playground.transport import InProcessTransport
from crane_serve.service.settings import ApiSettings
from tests.api.exchange import Exchange
from tests.api.fake_engine import NEURONS, FakeEngine

KEY = "a-user-key-of-some-length"
SESSION = "abc123"
OTHERS = (
    "/nope",
    "/v1/nope",
    "/config",
    "/config/",
    "/login",
    "/logout",
    "/monitoring",
    "/monitoring/summary",
    "/pwa_icon",
    "/robots.txt",
    "/svelte/svelte.js",
    "/assets/",
    "/assets/a/b.js",
    "/assets/../../../pyproject.toml",
    "/assets/%2e%2e/%2e%2e/index.html",
    "/assets/..%2findex.html",
    "/static/../index.html",
    "/static/%2e%2e/index.html",
    "/static/",
    "/gradio_api/info",
    "/gradio_api/openapi.json",
    "/gradio_api/upload",
    "/gradio_api/upload_progress",
    "/gradio_api/file=/etc/passwd",
    "/gradio_api/file/etc/passwd",
    "/gradio_api/file=http://127.0.0.1/",
    "/gradio_api/proxy=http://127.0.0.1/",
    "/gradio_api/mcp/sse",
    "/gradio_api/heartbeat/abc",
    "/gradio_api/stream/a/b/c/playlist.m3u8",
    "/gradio_api/component_server",
    "/gradio_api/custom_component/a/client/b/c",
    "/gradio_api/deep_link",
    "/gradio_api/dev/reload",
    "/gradio_api/token",
    "/gradio_api/user",
    "/gradio_api/app_id",
    "/gradio_api/runs",
    "/gradio_api/startup-events",
    "/gradio_api/queue/status",
    "/gradio_api/run/generate",
    "/gradio_api/call/generate",
    "/gradio_api/vibe-code",
    "/gradio_api/queue/data/",
    "/gradio_api/queue/join/",
)
"""Paths that Gradio would answer, some of them with files, and paths that nobody does."""
CHANGES: tuple[dict[str, Any], ...] = (
    {"data": []},
    {"data": ["", "too", "many"]},
    {"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]},
    {"data": [["a", {"path": "/etc/passwd"}]]},
    {"data": [{"url": "http://127.0.0.1/", "meta": {"_type": "gradio.FileData"}}]},
    {"data": "text"},
    {"fn_index": 99},
    {"fn_index": "0"},
    {"fn_index": None},
    {"session_hash": ""},
    {"session_hash": "../x"},
    {"session_hash": None},
    {"event_data": {"a": 1}},
    {"oauth_token": "x"},
    {"event_id": "x"},
)
"""Of an event that the page has, to one that it has not."""
SAMPLING = (6, 0, 1, 1, 0, "all")  # as the controls send it: most tokens, temperature, top p, penalty, seed, positions


@asynccontextmanager
async def serving(engine: FakeEngine, **settings: Any) -> AsyncIterator[FastAPI]:
    async def start() -> FakeEngine:
        return engine

    app = create_app(start, ApiSettings(**settings))  # type: ignore[arg-type]
    async with app.router.lifespan_context(app):
        yield app


def client_of(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://crane")


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(engine) as app, client_of(app) as client:
        yield client


async def config_of(client: httpx.AsyncClient) -> dict[str, Any]:
    """What the page tells the browser."""
    page = (await client.get("/")).text
    start = page.index("window.gradio_config = ") + len("window.gradio_config = ")
    config: dict[str, Any] = json.JSONDecoder().raw_decode(page[start:])[0]
    return config


async def event(client: httpx.AsyncClient, name: str, *values: Any) -> dict[str, Any]:
    """The body of the event of this name. values: of its inputs, the key first."""
    number = next(one["id"] for one in (await config_of(client))["dependencies"] if one["api_name"] == name)
    return {"data": [*values], "fn_index": number, "session_hash": SESSION, "trigger_id": 1, "event_data": None}


async def shown(client: httpx.AsyncClient, name: str, *values: Any) -> list[Any]:
    """What the outputs of an event are set to in the end."""
    joined = await client.post(JOIN, json=await event(client, name, *values))
    assert joined.status_code == 200, joined.text
    stream = await client.get(STREAM, params={"session_hash": SESSION})
    messages = [json.loads(part.removeprefix("data: ")) for part in stream.text.strip().split("\n\n")]
    completed = [message for message in messages if message["msg"] == "process_completed"]
    assert len(completed) == 1
    assert completed[0]["success"], completed
    data: list[Any] = completed[0]["output"]["data"]
    return data


def code(response: httpx.Response) -> str:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["code"])


class TestPage:
    async def test_it_loads_and_forbids_the_browser_to_go_elsewhere(self, client: httpx.AsyncClient) -> None:
        response = await client.get("/")
        assert response.status_code == 200
        assert "crane-serve playground" in response.text
        policy = response.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "http" not in policy
        assert response.headers["cache-control"] == "no-store"

    async def test_every_file_that_the_page_links_is_there(self, client: httpx.AsyncClient) -> None:
        config = await config_of(client)
        assert config["connect_heartbeat"] is False
        assert config["analytics_enabled"] is False
        assert config["run_history"] is False
        for path in ("/theme.css", "/favicon.ico", "/manifest.json", "/static/img/logo_nosize.svg"):
            assert (await client.get(path)).status_code == 200, path
        assert (await client.head("/")).status_code == 200

    async def test_assets_may_be_kept_for_ever(self, client: httpx.AsyncClient) -> None:
        page = (await client.get("/")).text
        asset = page.split('src="./assets/')[1].split('"')[0]
        response = await client.get(f"/assets/{asset}")
        assert response.status_code == 200
        assert "immutable" in response.headers["cache-control"]

    async def test_with_keys_it_loads_without_one_and_tells_nothing(self, engine: FakeEngine) -> None:
        async with serving(engine, user_key=SecretStr(KEY)) as app, client_of(app) as client:
            page = (await client.get("/")).text
            assert not any(name in page for name in NEURONS)
            assert engine.model_name not in (await config_of(client))["components"].__repr__()
            row, connection, masks, _ = await shown(client, "connect", "")
            assert row["visible"] is True
            assert "asks for an API key" in connection
            assert masks["choices"] == [["none", "none"]]
            _, connection, _, _ = await shown(client, "connect", "some-other-key-of-a-length")
            assert "no such API key" in connection
            for name, values in (
                ("generate", ("", "a", ["zh"], *SAMPLING)),
                ("score", ("", "a", ["zh"])),
                ("look", ("", ["zh"])),
                ("show", ("", None)),
            ):
                assert "no API key" in "".join(map(str, await shown(client, name, *values))), name
            assert engine.calls == []
            _, connection, masks, _ = await shown(client, "connect", KEY)
            assert "Connected to tiny, with 4 masks" in connection
            assert [name for name, _ in masks["choices"]] == ["none", *sorted(NEURONS)]

    async def test_the_key_of_the_process_itself_is_not_used(
        self, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CRANE_API_KEY", KEY)
        async with serving(engine, user_key=SecretStr(KEY)) as app, client_of(app) as client:
            assert "asks for an API key" in (await shown(client, "connect", ""))[1]

    async def test_a_key_is_kept_nowhere(self, engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        async with serving(engine, user_key=SecretStr(KEY)) as app, client_of(app) as client:
            await shown(client, "score", KEY, "abc", ["none"])
            state = app.router.default._otherwise._gradio.state_holder.session_data
            assert SESSION in state
            kept = [*state[SESSION].config_values.values(), *vars(app.router.default._otherwise._queue).values()]
            assert KEY not in repr(kept)
        assert KEY not in caplog.text
        assert len(engine.calls) == 1

    async def test_without_it_there_is_nothing(self, engine: FakeEngine) -> None:
        async with serving(engine, playground=False) as app, client_of(app) as client:
            for method, path in (("GET", "/"), ("GET", "/theme.css"), ("POST", JOIN), ("GET", STREAM)):
                assert code(await client.request(method, path)) == "not_found"
        async with serving(engine, playground=False, user_key=SecretStr(KEY)) as app, client_of(app) as client:
            assert (await client.get("/")).status_code == 401


class TestRefusals:
    async def test_other_routes_of_gradio(self, client: httpx.AsyncClient) -> None:
        for path in OTHERS:
            url = httpx.URL("http://crane").copy_with(raw_path=path.encode())
            for response in (await client.get(url), await client.post(url, json={})):
                assert (response.status_code, code(response)) == (404, "not_found"), path

    async def test_other_methods(self, client: httpx.AsyncClient) -> None:
        for method, path in (("POST", "/"), ("PUT", JOIN), ("GET", JOIN), ("OPTIONS", JOIN)):
            assert code(await client.request(method, path)) == "not_found", (method, path)

    async def test_queries_are_dropped(self, client: httpx.AsyncClient) -> None:
        link = await client.get("/", params={"deep_link": "a", "page": "nowhere", "view": "api"})
        assert link.status_code == 200
        assert '"deep_link_state":"none"' in link.text.replace(" ", "")

    async def test_other_origins_are_given_nothing(self, client: httpx.AsyncClient) -> None:
        for path in ("/", "/theme.css"):
            response = await client.get(path, headers={"origin": "http://elsewhere"})
            assert not [name for name in response.headers if name.startswith("access-control")]

    async def test_what_vllm_answers_is_still_there(self, client: httpx.AsyncClient) -> None:
        assert (await client.get("/v1/models")).json() == {"answered": "by vLLM"}
        assert (await client.get("/docs")).status_code == 200

    async def test_an_unknown_file_of_gradio(self, client: httpx.AsyncClient) -> None:
        for path in ("/assets/nothing.js", "/static/fonts/nothing/nothing.woff2"):
            response = await client.get(path)
            assert (response.status_code, code(response)) == (404, "not_found")

    async def test_events_that_the_page_does_not_have(self, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        known = await event(client, "stop", "")
        for change in CHANGES:
            response = await client.post(JOIN, json={**known, **change})
            assert (response.status_code, code(response)) == (422, "malformed_body"), change
            assert "/etc/passwd" not in response.text
        assert engine.calls == []

    async def test_bodies_that_are_no_event(self, client: httpx.AsyncClient) -> None:
        for body in (b"", b"{", b"[]", b"\xff", b"null"):
            response = await client.post(JOIN, content=body, headers={"content-type": "application/json"})
            assert (response.status_code, code(response)) == (422, "malformed_body"), body

    async def test_what_a_form_of_another_page_could_send(self, client: httpx.AsyncClient) -> None:
        body = json.dumps(await event(client, "connect", ""))
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
            response = await client.post(JOIN, content=body, headers={"content-type": kind})
            assert (response.status_code, code(response)) == (415, "unsupported_media_type")

    async def test_a_text_that_is_too_long(self, client: httpx.AsyncClient) -> None:
        response = await client.post(JOIN, json=await event(client, "score", "", "x" * 2**18, ["none"]))
        assert (response.status_code, code(response)) == (413, "body_too_large")

    async def test_a_stream_of_a_session_that_has_nothing_under_way(self, client: httpx.AsyncClient) -> None:
        for session in ("", "unknown", "a&session_hash=b"):
            response = await client.get(STREAM, params={"session_hash": session})
            assert (response.status_code, code(response)) == (404, "not_found"), session

    async def test_events_that_nobody_comes_for_are_forgotten(
        self, client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("crane_serve.service.playground.playground._MAX_WAITING", 3)
        body = await event(client, "score", "", "abc", ["none"])
        for number in range(8):
            response = await client.post(JOIN, json={**body, "session_hash": f"s{number}"})
            assert response.status_code == 200
            async with asyncio.timeout(10):
                while len(engine.calls) <= number:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
        engine.wait_after_tokens = 0
        answers = [await client.post(JOIN, json={**body, "session_hash": f"t{number}"}) for number in range(8)]
        assert [answer.status_code for answer in answers][-1] == 429
        assert code(answers[-1]) == "queue_full"

    def test_which_paths_are_the_pages(self) -> None:
        assert is_of_page("GET", "/")
        assert is_of_page("HEAD", "/assets/index-AbC_1.js")
        assert is_of_page("POST", JOIN)
        for method, path in (("POST", "/"), ("GET", JOIN), ("GET", "//"), ("GET", "/assets/.x"), ("GET", "/\n"),
                             ("GET", "/theme.css\n"), ("GET", "/masks"), ("DELETE", "/assets/a.js")):  # fmt: skip
            assert not is_of_page(method, path), (method, path)


class TestWhatItShows:
    async def test_completions_under_several_masks(self, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        status, cards = await shown(client, "generate", "", "a <b>", ["none", "zh", "zh,vi", "zh@0.5"], *SAMPLING)
        assert "Done under 4 masks" in status
        assert cards.count('<li class="card"') == 4
        assert cards.count("abcdef") == 4
        assert "a &lt;b&gt;" in cards
        masks = [None if call.mask is None else call.mask.name for call in engine.calls]
        assert sorted(masks, key=str) == sorted(
            [None, "attnlrp-zh", "attnlrp-vi,attnlrp-zh", "attnlrp-zh@0.5"], key=str
        )
        assert all(call.stream for call in engine.calls)
        assert engine.calls[0].sampling is not None
        assert engine.calls[0].sampling.max_tokens == 6

    async def test_a_mask_that_there_is_not_fails_alone(self, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        status, cards = await shown(client, "generate", "", "a", ["none", "xx", "zh@much"], *SAMPLING)
        assert "2 of 3 masks failed" in status
        assert "unknown mask &#39;xx&#39;" in cards
        assert "is no factor" in cards
        assert len(engine.calls) == 1

    async def test_what_cannot_be_asked(self, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        for prompt, masks, said in (
            ("", ["zh"], "Write a prompt"),
            (None, ["zh"], "Write a prompt"),
            ("a", [], "Choose at least one mask"),
            ("a", "zh", "Choose at least one mask"),
            ("a", [f"m{number}" for number in range(17)], "At most 16 masks"),
        ):
            status, cards = await shown(client, "generate", "", prompt, masks, *SAMPLING)
            assert said in status
            assert 'role="alert"' in status
            assert cards == ""
        assert engine.calls == []

    async def test_what_the_service_refuses(self, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        status, cards = await shown(client, "generate", "", "a", ["zh"], "many", 0, 1, 1, 0, "all")
        assert "1 of 1 mask failed" in status
        assert "max_tokens" in cards
        _, cards = await shown(client, "generate", "", "a", ["zh"], 4, 0, 1, 1, 0, "sometimes")
        assert "positions" in cards
        assert engine.calls == []

    async def test_positions_go_with_masks_only(self, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        await shown(client, "generate", "", "a", ["none", "zh"], 4, 0, 1, 1, None, "prompt")
        assert {call.mask.positions if call.mask else None for call in engine.calls} == {None, "prompt"}

    async def test_losses(self, client: httpx.AsyncClient) -> None:
        status, table = await shown(client, "score", "", "abc", ["none", "zh", "xx"])
        assert "Scored under 2 masks. 1 failed." in status
        rows = table.split("<tr>")[2:]
        assert len(rows) == 3
        assert "unknown mask" in rows[2]
        levels = [float(row.split("<td>")[1].split("<")[0]) for row in rows[:2]]
        assert levels[1] == pytest.approx(2 * levels[0], abs=0.002)

    async def test_layers_and_overlap(self, client: httpx.AsyncClient) -> None:
        status, content = await shown(client, "look", "", ["none", "zh,vi@0.5", "lape-zh", "attnlrp-zh"])
        assert "3 masks" in status
        assert "attnlrp-zh: 2 neurons in 1 of 2 layers, most of them, 2, in layer 0" in content
        assert content.count("<svg") == 3
        assert "0.000" in content
        assert "2 shared" in content
        assert "has no neurons" in (await shown(client, "look", "", ["none"]))[0]
        assert "unknown mask" in (await shown(client, "look", "", ["xx"]))[0]

    async def test_expressions(self, client: httpx.AsyncClient) -> None:
        masks, _ = await shown(client, "add", "", ["none"], ["attnlrp-zh", "attnlrp-vi"], 0)
        assert masks["value"] == ["none", "attnlrp-zh,attnlrp-vi"]
        masks, _ = await shown(client, "add", "", [], ["attnlrp-zh"], 0.5)
        assert masks["value"] == ["attnlrp-zh@0.5"]
        assert "Choose at least one" in (await shown(client, "add", "", [], [], 0))[1]

    async def test_no_evaluation(self, client: httpx.AsyncClient) -> None:
        _, status, content = await shown(client, "show", "", None)
        assert "started without an evaluation" in status
        assert content == ""

    @pytest.mark.parametrize("content", [None, "{}", "not JSON"])
    async def test_an_evaluation_that_cannot_be_read(
        self, engine: FakeEngine, tmp_path: Path, content: str | None, caplog: pytest.LogCaptureFixture
    ) -> None:
        if content is not None:
            (tmp_path / "results.json").write_text(content)
        async with serving(engine, evaluation=tmp_path) as app, client_of(app) as client:
            _, status, _ = await shown(client, "show", "", None)
        assert "cannot be read" in status
        assert str(tmp_path) not in status
        assert str(tmp_path) in caplog.text

    async def test_markup_in_what_is_shown_stays_text(self, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        engine.answers = {None: ("<script>alert(1)</script>", "${value}", "{{value}}")}
        _, cards = await shown(client, "generate", "", "<img src=x>", ["none"], 3, 0, 1, 1, 0, "all")
        assert "<script" not in cards
        assert "<img" not in cards
        assert "${value}{{value}}" in cards


class TestLeaving:
    async def test_requests_of_a_visitor_who_leaves_are_aborted(self, engine: FakeEngine) -> None:
        engine.wait_after_tokens = 2
        async with serving(engine) as app, client_of(app) as client:
            body = await event(client, "generate", "", "a", ["none", "zh", "vi"], *SAMPLING)
            assert (await client.post(JOIN, json=body)).status_code == 200
            visit = Exchange("GET", STREAM, query=f"session_hash={SESSION}".encode()).give()
            watching = asyncio.create_task(visit.call(app))
            async with asyncio.timeout(10):
                while engine.running < 3 or b"ab<" not in _received(visit):
                    await asyncio.sleep(0.01)
            visit.hang_up()
            await watching
            async with asyncio.timeout(5):
                while engine.running:
                    await asyncio.sleep(0.01)
            assert engine.aborted == 3
            assert app.state.gate.sequences == 0
            assert app.state.lifelines.active == 0

    async def test_stop_ends_what_runs(self, engine: FakeEngine) -> None:
        engine.wait_after_tokens = 2
        async with serving(engine) as app, client_of(app) as client:
            body = await event(client, "generate", "", "a", ["none", "zh"], *SAMPLING)
            await client.post(JOIN, json=body)
            async with asyncio.timeout(10):
                while engine.running < 2:
                    await asyncio.sleep(0.01)
            await client.post(JOIN, json=await event(client, "stop", ""))
            stream = await client.get(STREAM, params={"session_hash": SESSION})
            assert "Stopped." in stream.text
            assert engine.aborted == 2

    async def test_events_go_through_the_limits_of_the_service(self, engine: FakeEngine) -> None:
        engine.wait_after_tokens = 1
        async with serving(engine, max_sequences=1) as app, client_of(app) as client:
            await client.post(JOIN, json={**await event(client, "score", "", "a", ["none"]), "session_hash": "other"})
            engine.wait_after_tokens = 0
            blocked = asyncio.create_task(client.post("/generate", json={"prompt": "a"}))
            async with asyncio.timeout(10):
                while app.state.gate.sequences == 0:
                    await asyncio.sleep(0.01)
            _, cards = await shown(client, "generate", "", "a", ["none"], *SAMPLING)
            assert "1 prompts are waiting or running" in cards
            blocked.cancel()

    async def test_a_request_that_takes_too_long(self, engine: FakeEngine) -> None:
        engine.wait_after_tokens = 2
        async with serving(engine, request_timeout_s=0.3) as app, client_of(app) as client:
            status, cards = await shown(client, "generate", "", "a", ["none"], *SAMPLING)
            assert "1 of 1 mask failed" in status
            assert "took longer than 0.3 s" in cards

    async def test_when_the_engine_is_dead(self, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        engine.is_dead = True
        _, cards = await shown(client, "generate", "", "a", ["none"], *SAMPLING)
        assert "the engine has died" in cards

    async def test_an_open_stream_keeps_nobody_from_stopping(self, engine: FakeEngine) -> None:
        engine.wait_after_tokens = 2
        async with serving(engine) as app, client_of(app) as client:
            await client.post(JOIN, json=await event(client, "generate", "", "a", ["none"], *SAMPLING))
            visit = Exchange("GET", STREAM, query=f"session_hash={SESSION}".encode()).give()
            watching = asyncio.create_task(visit.call(app))
            async with asyncio.timeout(10):
                while not engine.running or not visit.sent:
                    await asyncio.sleep(0.01)
            assert app.state.lifelines.active == 1  # the generation, and not the stream that tells of it
            visit.hang_up()
            await watching


class TestLogAndMetrics:
    async def test_the_pages_requests_are_quiet_and_named(
        self, engine: FakeEngine, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG, "crane.access")
        async with serving(engine) as app, client_of(app) as client:
            await shown(client, "score", "", "abc", ["none"])
            metrics = (await client.get("/metrics")).text
        lines = [(record.levelname, record.route) for record in caplog.records if record.name == "crane.access"]
        assert {level for level, route in lines if route == "playground"} == {"DEBUG"}
        assert ("INFO", "/score") in lines
        assert 'crane_requests_total{mask="none",route="playground",status="200"}' in metrics
        assert 'crane_requests_total{mask="none",route="/score",status="200"} 1.0' in metrics


def _received(visit: Exchange) -> bytes:
    return b"".join(message.get("body", b"") for message in visit.sent)


class TestInProcessTransport:
    async def test_pieces_come_as_they_are_sent_and_closing_is_told(self) -> None:
        told = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            assert (await receive())["body"] == b"asked"
            await send({"type": "http.response.start", "status": 201, "headers": [(b"x-a", b"b")]})
            await send({"type": "http.response.body", "body": b"one", "more_body": True})
            told.append((await receive())["type"])
            await asyncio.sleep(0.05)
            told.append("ended")

        async with httpx.AsyncClient(transport=InProcessTransport(app, ("1.2.3.4", 5))) as client:
            async with client.stream("POST", "http://here/x", content=b"asked") as response:
                assert (response.status_code, response.headers["x-a"]) == (201, "b")
                assert await anext(response.aiter_bytes()) == b"one"
                assert told == []
            assert told == ["http.disconnect", "ended"]

    async def test_an_answer_that_is_cut_off(self, caplog: pytest.LogCaptureFixture) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200})
            await send({"type": "http.response.body", "body": b"one", "more_body": True})
            raise RuntimeError("broken")

        async with httpx.AsyncClient(transport=InProcessTransport(app, None)) as client:
            with pytest.raises(httpx.ReadError):
                await client.get("http://here/x")
        assert "cut off" in caplog.text

    async def test_the_scope_is_a_servers(self) -> None:
        seen: list[Scope] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(scope)
            await send({"type": "http.response.start", "status": 204})
            await send({"type": "http.response.body"})

        async with httpx.AsyncClient(transport=InProcessTransport(app, ("1.2.3.4", 5))) as client:
            await client.get("http://here/a%20b?mask=zh%2Cvi", headers={"X-Api-Key": "k"})
        scope = seen[0]
        assert (scope["path"], scope["raw_path"], scope["query_string"]) == ("/a b", b"/a%20b", b"mask=zh%2Cvi")
        assert (b"x-api-key", b"k") in scope["headers"]
        assert scope["client"] == ("1.2.3.4", 5)

    async def test_our_client_streams_over_it(self, engine: FakeEngine) -> None:
        engine.wait_after_tokens = 2
        async with serving(engine, playground=False) as app:
            transport = InProcessTransport(app, None)
            async with AsyncCraneClient(transport=transport, api_key="") as client:
                stream = await client.generate_stream("a", max_tokens=5)
                assert [(await anext(stream)).text, (await anext(stream)).text] == ["a", "b"]
                await stream.aclose()
            assert (engine.running, engine.aborted) == (0, 1)


_APART = """
import socket, sys
asked = []
def refuse(*arguments, **options):
    asked.append(arguments)
    raise OSError("no network here")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
import asyncio, httpx, server
from crane_serve.service.api.app import create_app
from crane_serve.service.settings import ApiSettings
from tests.api.fake_engine import FakeEngine

async def start():
    return FakeEngine()

async def main():
    create_app(start, ApiSettings(playground=False))
    assert "gradio" not in sys.modules
    app = create_app(start, ApiSettings())
    assert "gradio" in sys.modules
    async with app.router.lifespan_context(app):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://crane") as client:
            assert (await client.get("/")).status_code == 200
        await asyncio.sleep(1)
    assert asked == [], asked

asyncio.run(main())
"""


def test_gradio_is_imported_for_the_page_only_and_calls_nobody(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _APART], cwd=root, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
