"""The FastAPI application: starts the engine, mounts the routes behind the middleware, stops the engine."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import crane_serve
from crane_serve.engine.service import EngineService
from crane_serve.service.api import evaluation, generate, health, languages, masks, page, score
from crane_serve.service.api.authentication import Authentication
from crane_serve.service.api.body import BoundedBody
from crane_serve.service.api.downloads import Downloads
from crane_serve.service.api.errors import install_error_handlers
from crane_serve.service.api.evaluation import EvaluationFile
from crane_serve.service.api.gate import Gate
from crane_serve.service.api.keys import KeyRing
from crane_serve.service.api.metrics import Metrics
from crane_serve.service.api.observation import REQUEST_ID, Observation
from crane_serve.service.api.openai import OpenAIRoutes
from crane_serve.service.api.openapi import describe, describe_engine
from crane_serve.service.api.origins import ANY, Origins
from crane_serve.service.api.request_lifetime import RequestLifetime, RequestLifetimes
from crane_serve.service.api.turns import Turns
from crane_serve.service.settings import ApiSettings

_EXPOSED_HEADERS = (REQUEST_ID, "X-Crane-Mask", "X-Crane-Mask-Digest", "ETag", "Retry-After")


def create_app(start_engine: Callable[[], Awaitable[EngineService]], settings: ApiSettings | None = None) -> FastAPI:
    """The service over the engine that `start_engine` starts when the application does.

    settings: None for the defaults, without the playground. The application's state holds `gate`, `lifetimes`,
    `metrics` and, once started, `engine`. Raises ValueError for API keys that cannot be read.
    """
    settings = settings or ApiSettings(playground=False)
    keys = KeyRing.load(settings.api_keys_file, settings.user_key, settings.admin_key)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.engine = await start_engine()
        app.state.metrics.watch(app.state.engine)
        try:
            await asyncio.to_thread(describe_engine, app)
            yield
        finally:
            app.state.engine.stop()

    app = FastAPI(
        title="crane-serve",
        version=crane_serve.__version__,
        description="Serve a language model so that any single request can run with a language switched off.",
        lifespan=lifespan,
        docs_url=None,  # its page runs scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.gate = Gate(settings.max_sequences, settings.max_requests_per_key, settings.max_sequences_per_key)
    app.state.downloads = Downloads()
    app.state.lifetimes = RequestLifetimes()
    app.state.metrics = Metrics(app.state.gate, settings.max_sequences)
    install_error_handlers(app)
    app.state.evaluation = EvaluationFile(settings.evaluation)
    for module in (generate, score, languages, masks, evaluation, health):
        app.include_router(module.router)
    if settings.playground:
        app.include_router(page.router)
    turns = Turns()
    app.router.default = OpenAIRoutes(turns)
    describe(app, asks_for_keys=keys is not None)
    _add_middleware(app, settings, keys, turns)
    return app


def _add_middleware(app: FastAPI, settings: ApiSettings, keys: KeyRing | None, turns: Turns) -> None:
    """From the innermost to the outermost."""
    app.add_middleware(
        RequestLifetime,
        lifetimes=app.state.lifetimes,
        gate=app.state.gate,
        timeout_s=settings.request_timeout_s,
        turns=turns,
    )
    app.add_middleware(
        BoundedBody,
        max_bytes=settings.max_body_bytes,
        max_json_bytes=settings.max_json_bytes,
        max_buffered_bytes=settings.max_buffered_bytes,
        timeout_s=settings.body_timeout_s,
        turns=turns,
    )
    app.add_middleware(Authentication, keys=keys, playground=settings.playground)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_EXPOSED_HEADERS,
        )
    # Browsers send no keys by themselves, so that foreign pages can do nothing where there are keys.
    pages = settings.cors_origins if keys is None else (ANY,)
    app.add_middleware(Origins, hosts=settings.allowed_hosts, pages=pages)
    app.add_middleware(Observation, metrics=app.state.metrics)
