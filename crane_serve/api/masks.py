"""GET /masks: which masks this server has."""

from fastapi import APIRouter

from crane_serve.api.dependencies import Engine
from crane_serve.api.errors import responses
from crane_serve.api.schemas import InvalidMaskFile, MaskDetails, MaskList, MaskSummary

router = APIRouter()


@router.get("/masks", response_model=MaskList)
async def masks(engine: Engine) -> MaskList:
    """All masks, and the mask files that cannot be used with the reason."""
    library = engine.library
    return MaskList(
        masks=[MaskSummary.of(stored) for stored in library.masks.values()],
        invalid=[InvalidMaskFile(name=name, reason=reason) for name, reason in library.invalid.items()],
        default_method=library.default_method,
    )


@router.get(
    "/masks/{name}",
    response_model=MaskDetails,
    responses=responses(404, 409, 422),
)
async def mask(name: str, engine: Engine) -> MaskDetails:
    """One mask by name, digest, or bare language."""
    return MaskDetails.of(engine.library.get(name))
