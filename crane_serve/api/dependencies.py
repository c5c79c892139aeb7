"""What every route needs: the engine, and the one mask a request means."""

from typing import Annotated, cast

from fastapi import Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from crane_serve.api.errors import BadRequest
from crane_serve.engine.service import EngineService
from crane_serve.masks import MaskLibrary, Positions, ResolvedMask


def get_engine(request: Request) -> EngineService:
    return cast(EngineService, request.app.state.engine)


class _Query(BaseModel):
    """The query of a request. Other parameters are refused: a misspelt `mask` must not run unmasked."""

    model_config = ConfigDict(extra="forbid")

    mask: list[str] | None = Field(
        None, description="Mask name, or names joined with commas; 'none' or absent for no mask"
    )


class _GenerateQuery(_Query):
    positions: Positions | None = Field(None, description="The tokens to be masked: all (default), prompt or generated")


MaskQuery = Annotated[_Query, Query()]
GenerateQuery = Annotated[_GenerateQuery, Query()]
Engine = Annotated[EngineService, Depends(get_engine)]


def choose_positions(query: _GenerateQuery, body: Positions | None, body_mask: str | None) -> Positions:
    """The positions of a request that may name them in the query, in the body, or in both if they are the same.

    Raises BadRequest if the request names two, or names positions without a mask.
    """
    in_query = query.positions
    if in_query is not None and body is not None and in_query is not body:
        raise BadRequest("mask_conflict", f"the query says positions={in_query}, the body {body}", "positions")
    asked = body if in_query is None else in_query
    if asked is not None and query.mask is None and body_mask is None:
        raise BadRequest("mask_conflict", f"positions={asked} without a mask", "positions")
    return Positions.ALL if asked is None else asked


def choose_mask(
    library: MaskLibrary, query: _Query, body: str | None, positions: Positions = Positions.ALL
) -> ResolvedMask | None:
    """The mask of a request that may name it in the query, in the body, or in both if they mean the same.

    Raises MaskError for a mask that cannot be used, BadRequest if the request names two.
    """
    in_query = query.mask or []
    if len(in_query) > 1:
        raise BadRequest("mask_conflict", "'mask' is given twice in the query; join names with commas", "mask")
    resolved = [library.resolve(expression, positions) for expression in (*in_query, body) if expression is not None]
    if len({None if mask is None else mask.wire for mask in resolved}) > 1:
        raise BadRequest("mask_conflict", f"the query says mask={in_query[0]}, the body {body}", "mask")
    return resolved[0] if resolved else None
