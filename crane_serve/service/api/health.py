"""GET /health (the process answers), GET /ready (the engine serves) and GET /metrics."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

import crane_serve
from crane_serve.engine.answers import EngineDead
from crane_serve.service.api.dependencies import Engine, TheGate
from crane_serve.service.api.errors import ANY_ROUTE, ApiError, responses
from crane_serve.service.api.schemas import Health, Ready

router = APIRouter()


@router.get("/health", response_model=Health, responses=responses(421))
async def health() -> Health:
    """Whether the process answers."""
    return Health()


@router.get("/ready", response_model=Ready, responses=responses(421, 503))
async def ready(engine: Engine, gate: TheGate) -> Ready:
    """Whether requests can be served, and by which model."""
    if gate.closed:
        raise ApiError(503, "shutting_down", "the server is shutting down")
    if engine.is_dead:
        raise EngineDead("the engine has died")
    return Ready(
        model=engine.model_name,
        version=crane_serve.__version__,
        fingerprint=engine.library.fingerprint,
        max_model_tokens=engine.max_model_tokens,
        kv_cache_tokens=engine.kv_cache_tokens,
        prompt_start=list(engine.start_tokens.of_prompt),
        text_start=engine.start_tokens.of_text,
    )


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **responses(*ANY_ROUTE)},
)
async def metrics(request: Request) -> Response:
    """Metrics of the service and of vLLM, for Prometheus."""
    return Response(request.app.state.metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})
