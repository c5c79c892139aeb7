"""What every route needs: the engine, the gate, and the one mask a request means."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, cast

from fastapi import Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Scope

from crane_serve.common.masks import MaskLibrary, Positions, ResolvedMask
from crane_serve.engine.service import EngineService
from crane_serve.service.api.context import RequestContext, context_of
from crane_serve.service.api.downloads import Downloads
from crane_serve.service.api.errors import ApiError, BadRequest
from crane_serve.service.api.gate import Gate
from crane_serve.service.api.schemas import POSITIONS_MEAN, PositionsText


async def get_engine(request: Request) -> EngineService:
    """The running engine, as a dependency of routes."""
    return cast(EngineService, request.app.state.engine)


async def get_gate(request: Request) -> Gate:
    """The gate that counts requests, as a dependency of routes."""
    return cast(Gate, request.app.state.gate)


async def get_downloads(request: Request) -> Downloads:
    """What makes large answers, as a dependency of routes."""
    return cast(Downloads, request.app.state.downloads)


async def get_context(request: Request) -> RequestContext:
    """What is known of the request at hand, as a dependency of routes. Raises ApiError for a mask in its headers."""
    check_headers(request.scope)
    return context_of(request.scope)


def check_headers(scope: Scope) -> None:
    """Raises ApiError for a header that asks for a mask: only answers name their mask in a header."""
    for name, _ in scope["headers"]:
        header = name.decode("latin-1")
        if "crane" in header or "mask" in header:
            message = f"the header {header!r} would be ignored; a mask is named in the query, ?mask=, or in the body"
            raise ApiError(422, "malformed_header", message, header)


class _Query(BaseModel):
    """The query of a request. Other parameters are refused: a misspelt `mask` must not run unmasked."""

    model_config = ConfigDict(extra="forbid")

    mask: list[str] | None = Field(
        None, description="Mask name, or names joined with commas; 'none' or absent for no mask"
    )


class _GenerateQuery(_Query):
    positions: PositionsText | None = Field(None, description=POSITIONS_MEAN)


MaskQuery = Annotated[_Query, Query()]
GenerateQuery = Annotated[_GenerateQuery, Query()]
Engine = Annotated[EngineService, Depends(get_engine)]
TheGate = Annotated[Gate, Depends(get_gate)]
TheDownloads = Annotated[Downloads, Depends(get_downloads)]
Context = Annotated[RequestContext, Depends(get_context)]


def choose_positions(query: str | None, body: str | None, *, masked: bool) -> Positions:
    """The positions of a request that may name them in the query, in the body, or in both if they are the same.

    query, body: in canonical form; masked: whether it names a mask. Raises BadRequest if the request names two, or
    positions without a mask.
    """
    if query is not None and body is not None and query != body:
        raise BadRequest("mask_conflict", f"the query says positions={query}, the body {body}", "positions")
    positions = body if query is None else query
    if positions is not None and not masked:
        raise BadRequest("mask_conflict", f"positions={positions} without a mask", "positions")
    return Positions.ALL if positions is None else Positions.parse(positions)


Asked = str | Mapping[str, Any]
"""A mask expression, or an object that is a mask itself."""


def choose_mask(
    library: MaskLibrary, named: Iterable[tuple[str, Asked]], positions: Positions = Positions.ALL
) -> ResolvedMask | None:
    """The mask of a request that may name it in several places, if they mean the same.

    named: pairs of a place, as in "the query", and what is asked for there. Raises MaskError for a mask that cannot be
    used, BadRequest if the request names two.
    """
    resolved = [(place, expression, library.resolve(expression, positions)) for place, expression in named]
    for place, expression, mask in resolved[1:]:
        first_place, first, first_mask = resolved[0]
        if (mask and mask.wire) != (first_mask and first_mask.wire):
            message = f"{first_place} says mask={_shown(first)}, {place} {_shown(expression)}"
            raise BadRequest("mask_conflict", message, "mask")
    return resolved[0][2] if resolved else None


def _shown(asked: Asked) -> str:
    return asked if isinstance(asked, str) else "an object"


def named_masks(query: list[str] | None, body: Asked | None) -> list[tuple[str, Asked]]:
    """The arguments of `choose_mask` from a query and a body. Raises BadRequest if the query names a mask twice."""
    if query is not None and len(query) > 1:
        raise BadRequest("mask_conflict", "'mask' is given twice in the query; join names with commas", "mask")
    named: list[tuple[str, Asked]] = [("the query", expression) for expression in query or []]
    return named if body is None else [*named, ("the body", body)]
