"""The playground's files, which anybody may have, and the routes that it needs beside those of the API."""

import json
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr

from crane_serve.service.api.app import create_app
from crane_serve.service.playground import FILES, is_of_page
from crane_serve.service.settings import ApiSettings
from tests.api.fake_engine import NEURONS, FakeEngine
from tests.evaluations import evaluation_of, made_answers, planned_masks

KEY = "a-user-key-of-some-length"
SOURCES = {path: file.content.decode() for path, file in FILES.items()}


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


def code(response: httpx.Response) -> str:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["code"])


class Links(HTMLParser):
    """What a page loads, and what its policy would keep from working."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.files: list[str] = []
        self.inline: list[str] = []
        self._in_script = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.files += [value for name in ("src", "href") if (value := named.get(name))]
        self.inline += [name for name in named if name.startswith("on") or name == "style"]
        self.inline += [tag] * (tag == "style" or (tag == "script" and "src" not in named))


class TestPage:
    async def test_its_files_are_there(self, client: httpx.AsyncClient) -> None:
        types = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
        for path in FILES:
            response = await client.get(path)
            assert response.status_code == 200, path
            kind = types["html" if path == "/" else path.rpartition(".")[2]]
            assert response.headers["content-type"].partition(";")[0] == kind
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["cache-control"] == "no-cache"
            head = await client.head(path)
            assert (head.status_code, head.content) == (200, b"")
        links = Links(SOURCES["/"])
        assert {f"/{file}" for file in links.files} <= set(FILES)
        imported = {name for text in SOURCES.values() for name in re.findall(r'from "\./(.+?)";', text)}
        assert {f"/playground/{name}" for name in imported} <= set(FILES)
        assert set(FILES) == {"/", *(f"/{file}" for file in links.files), *(f"/playground/{name}" for name in imported)}

    async def test_no_code_but_its_own_and_nothing_from_elsewhere(self, client: httpx.AsyncClient) -> None:
        for path in FILES:
            directives = dict(
                part.strip().split(" ", 1)
                for part in (await client.get(path)).headers["content-security-policy"].split(";")
            )
            assert directives.pop("default-src") == "'none'"
            assert directives.pop("require-trusted-types-for") == "'script'"
            assert set(directives.values()) == {"'self'", "'none'"}
            assert directives["script-src"] == directives["connect-src"] == "'self'"
            assert directives["frame-ancestors"] == directives["base-uri"] == directives["form-action"] == "'none'"
        assert Links(SOURCES["/"]).inline == []
        for path, source in SOURCES.items():
            assert re.findall(r"https?://\S+", source.replace("http://www.w3.org/2000/svg", "")) == [], path
            assert not re.search(
                r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", source
            )
            assert not re.search(r"localStorage|sessionStorage|indexedDB|document\.cookie", source), path

    async def test_with_keys_its_files_are_public_and_nothing_else_is(self, engine: FakeEngine) -> None:
        async with serving(engine, user_key=SecretStr(KEY)) as app, client_of(app) as client:
            for path in FILES:
                response = await client.get(path)
                assert response.status_code == 200, path
                assert not any(name in response.text for name in NEURONS)
            for method, path in (
                ("GET", "/masks"),
                ("GET", "/evaluation"),
                ("POST", "/languages"),
                ("POST", "/"),
                ("GET", "/playground"),
                ("GET", "/playground/"),
                ("GET", "/playground/nothing.js"),
            ):
                assert (await client.request(method, path, json={"text": ["a"]})).status_code == 401, path
            assert engine.calls == []

    async def test_without_it_there_is_nothing(self, engine: FakeEngine) -> None:
        async with serving(engine, playground=False) as app, client_of(app) as client:
            for path in FILES:
                assert code(await client.get(path)) == "not_found"
        async with serving(engine, playground=False, user_key=SecretStr(KEY)) as app, client_of(app) as client:
            assert (await client.get("/")).status_code == 401

    @pytest.mark.parametrize(
        "path",
        [
            "/playground",
            "/playground/",
            "/playground/nothing.js",
            "/playground/index.html",
            "/playground/__init__.py",
            "/playground/../page.js",
            "/playground/%2e%2e/__init__.py",
            "/playground/..%2f__init__.py",
            "/playground/page.js%0a",
            "//",
        ],
    )
    async def test_other_paths(self, client: httpx.AsyncClient, path: str) -> None:
        response = await client.get(httpx.URL("http://crane").copy_with(raw_path=path.encode()))
        assert (response.status_code, code(response)) == (404, "not_found")

    async def test_other_methods_and_a_mask(self, client: httpx.AsyncClient) -> None:
        for method in ("POST", "PUT", "DELETE"):
            assert (await client.request(method, "/")).status_code == 405
        for method in ("GET", "POST"):
            refused = await client.request(method, "/", params={"mask": "vi/tokenize"})
            assert (refused.status_code, code(refused)) == (422, "malformed_query")
        assert (await client.get("/", params={"page": "1"})).status_code == 200

    async def test_other_origins_are_given_nothing(self, client: httpx.AsyncClient) -> None:
        for path in FILES:
            response = await client.get(path, headers={"origin": "http://elsewhere"})
            assert not [name for name in response.headers if name.startswith("access-control")]

    def test_which_paths_are_the_pages(self) -> None:
        assert is_of_page("GET", "/")
        assert is_of_page("HEAD", "/playground/page.js")
        for method, path in (("POST", "/"), ("GET", "//"), ("GET", "/\n"), ("GET", "/playground/page.js\n"),
                             ("GET", "/masks"), ("DELETE", "/playground/page.js"), ("GET", "")):  # fmt: skip
            assert not is_of_page(method, path), (method, path)

    async def test_its_requests_are_quiet_and_named(self, engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG, "crane.access")
        async with serving(engine) as app, client_of(app) as client:
            await client.get("/playground/page.js")
            await client.post("/score", json={"text": ["abc"]})
            metrics = (await client.get("/metrics")).text
        lines = [(record.levelname, record.route) for record in caplog.records if record.name == "crane.access"]
        assert {level for level, route in lines if route == "playground"} == {"DEBUG"}
        assert ("INFO", "/score") in lines
        assert 'crane_requests_total{mask="none",route="playground",status="200"} 1.0' in metrics


class TestLanguages:
    async def test_of_texts(self, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        texts = {
            "the old bridge across the river was closed": "en",
            "cây cầu cũ bắc qua sông đã đóng cửa": "vi",
            "河上的旧桥去年冬天关闭了": "zh",
            "": None,
            "x9": None,
        }
        answer = await client.post("/languages", json={"text": list(texts)})
        assert answer.json() == {"languages": list(texts.values())}
        assert engine.calls == []

    @pytest.mark.parametrize(
        "body", [{}, {"text": "a"}, {"text": []}, {"text": ["a"] * 1025}, {"text": [1]}, {"texts": ["a"]}]
    )
    async def test_what_cannot_be_asked(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        answer = await client.post("/languages", json=body)
        assert (answer.status_code, code(answer)) == (422, "malformed_body")


class TestEvaluation:
    async def test_what_the_operator_named(self, engine: FakeEngine, tmp_path: Path) -> None:
        masks = planned_masks()
        evaluation = evaluation_of(made_answers(masks), masks)
        file = evaluation.write(tmp_path)
        async with serving(engine, evaluation=tmp_path) as app, client_of(app) as client:
            answer = await client.get("/evaluation")
            assert answer.headers["content-type"] == "application/json"
            assert answer.json() == json.loads(file.read_text())
            evaluation.model_copy(update={"name": "another"}).write(tmp_path)
            assert (await client.get("/evaluation")).json()["name"] == "another"

    async def test_none(self, client: httpx.AsyncClient) -> None:
        answer = await client.get("/evaluation")
        assert (answer.status_code, code(answer)) == (404, "no_evaluation")
        assert "--evaluation" in answer.text

    @pytest.mark.parametrize("content", [None, "{}", "not JSON"])
    async def test_what_cannot_be_read(
        self, engine: FakeEngine, tmp_path: Path, content: str | None, caplog: pytest.LogCaptureFixture
    ) -> None:
        if content is not None:
            (tmp_path / "results.json").write_text(content)
        async with serving(engine, evaluation=tmp_path) as app, client_of(app) as client:
            answer = await client.get("/evaluation")
        assert (answer.status_code, code(answer)) == (500, "unreadable_evaluation")
        assert str(tmp_path) not in answer.text
        assert str(tmp_path) in caplog.text
