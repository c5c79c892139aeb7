"""What every route needs: the engine, and the one mask a request means."""

from typing import Annotated, cast

from fastapi import Depends, Query, Request

from crane_serve.api.errors import BadRequest
from crane_serve.engine.service import EngineService
from crane_serve.masks import MaskLibrary, ResolvedMask


def get_engine(request: Request) -> EngineService:
    return cast(EngineService, request.app.state.engine)


MaskQuery = Annotated[
    list[str] | None,
    Query(alias="mask", description="Mask name, or names joined with commas; 'none' or absent for no mask"),
]
Engine = Annotated[EngineService, Depends(get_engine)]


def choose_mask(library: MaskLibrary, query: list[str] | None, body: str | None) -> ResolvedMask | None:
    """The mask of a request that may name it in the query, in the body, or in both if they mean the same.

    Raises MaskError for a mask that cannot be used, BadRequest if the request names two.
    """
    if query is not None and len(query) > 1:
        raise BadRequest("mask_conflict", "'mask' is given twice in the query; join names with commas", "mask")
    resolved = [library.resolve(expression) for expression in (*(query or ()), body) if expression is not None]
    if len({None if mask is None else mask.wire for mask in resolved}) > 1:
        raise BadRequest("mask_conflict", f"the query says mask={(query or ['none'])[0]}, the body {body}", "mask")
    return resolved[0] if resolved else None
