"""GET /health (the process answers) and GET /ready (the engine serves)."""

from fastapi import APIRouter

import crane_serve
from crane_serve.api.dependencies import Engine
from crane_serve.api.errors import responses
from crane_serve.api.schemas import Health, Ready
from crane_serve.engine.service import EngineDead

router = APIRouter()


@router.get("/health", response_model=Health)
async def health() -> Health:
    """Whether the process answers."""
    return Health()


@router.get("/ready", response_model=Ready, responses=responses(503))
async def ready(engine: Engine) -> Ready:
    """Whether requests can be served, and by which model."""
    if engine.is_dead:
        raise EngineDead("the engine has died")
    return Ready(
        model=engine.model_name,
        version=crane_serve.__version__,
        fingerprint=engine.library.fingerprint,
        max_model_tokens=engine.max_model_tokens,
    )
