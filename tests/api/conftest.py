"""The application over a fake engine, called without a socket."""

from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI

from crane_serve.service.api.app import create_app
from tests.api.fake_engine import FakeEngine


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest_asyncio.fixture
async def app(engine: FakeEngine) -> AsyncIterator[FastAPI]:
    async def start() -> FakeEngine:
        return engine

    app = create_app(start)  # type: ignore[arg-type]
    async with app.router.lifespan_context(app):
        yield app


@pytest_asyncio.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://crane") as client:
        yield client
