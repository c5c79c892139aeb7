"""The FastAPI application: starts the engine, mounts the routes, stops the engine."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI

import crane_serve
from crane_serve.api import generate, health, masks, score
from crane_serve.api.errors import install_error_handlers
from crane_serve.api.gate import Gate
from crane_serve.engine.service import EngineService
from crane_serve.settings import ApiSettings


def create_app(start_engine: Callable[[], Awaitable[EngineService]], settings: ApiSettings | None = None) -> FastAPI:
    """The service over the engine that `start_engine` starts when the application does."""
    settings = settings or ApiSettings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.engine = await start_engine()
        try:
            yield
        finally:
            app.state.engine.stop()

    app = FastAPI(
        title="crane-serve",
        version=crane_serve.__version__,
        description="Serve a language model so that any single request can run with a language switched off.",
        lifespan=lifespan,
    )
    app.state.gate = Gate(settings.max_sequences, settings.max_requests_per_key)
    install_error_handlers(app)
    for module in (generate, score, masks, health):
        app.include_router(module.router)
    return app
