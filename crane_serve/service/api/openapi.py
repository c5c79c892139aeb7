"""The OpenAPI document of every route that the server answers: its own routes and vLLM's."""

from collections.abc import Mapping
from typing import Any, cast

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.routing import Route

from crane_serve.common.masks.positions import PATTERN
from crane_serve.engine.vllm_routes import CARRYING
from crane_serve.service.api.errors import ANY_ROUTE, responses
from crane_serve.service.api.openai import MODEL, ROUTES
from crane_serve.service.api.schemas import MASK_DESCRIPTION, MASK_IN_BODY, POSITIONS_MEAN

_SCHEMAS = "#/components/schemas/"
_JSON = "application/json"
_ERROR = {"$ref": f"{_SCHEMAS}ErrorAnswer"}
_FASTAPI_ERRORS = frozenset(
    {"HTTPValidationError", "ValidationError"}
)  # neither the service nor vLLM answers with them
_PUBLIC = ("/health", "/ready")
_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
_MASKED = {
    "mask": {**MASK_IN_BODY, "description": MASK_DESCRIPTION},
    "positions": {
        "type": ["string", "null"],
        "pattern": PATTERN,
        "description": POSITIONS_MEAN,
    },
}
_IN_QUERY = [
    {
        "name": "mask",
        "in": "query",
        "description": "Mask name, or names joined with commas; 'none' for no mask",
        "schema": {"type": "string"},
    },
    {
        "name": "positions",
        "in": "query",
        "description": _MASKED["positions"]["description"],
        "schema": {"type": "string", "pattern": PATTERN},
    },
]

_Document = dict[str, Any]


def describe(app: FastAPI, *, asks_for_keys: bool) -> None:
    """Have `app.openapi()` describe all routes of the service; vLLM's from `describe_engine` on."""
    own = app.openapi

    def openapi() -> _Document:
        if app.openapi_schema is None:
            document = own()
            if asks_for_keys:
                _add_keys(document)
        return cast(_Document, app.openapi_schema)

    app.openapi = openapi  # type: ignore[method-assign]


def describe_engine(app: FastAPI) -> None:
    """Add the routes of the vLLM application in the state's `engine`, if it has one. Takes a second."""
    app.openapi_schema = None
    engine_app = app.state.engine.openai
    if isinstance(engine_app, FastAPI):
        _merge(app.openapi(), _description(engine_app))


def _description(engine_app: FastAPI) -> _Document:
    """vLLM's own description of those of its routes that are served."""
    routes = [route for route in engine_app.routes if isinstance(route, Route) and route.path_format in ROUTES]
    return get_openapi(title=engine_app.title, version=engine_app.version, routes=routes)


def _merge(document: _Document, theirs: _Document) -> None:
    """Add vLLM's paths to the document, with the changes that the service makes to them."""
    schemas = document["components"]["schemas"]
    their_schemas = theirs.get("components", {}).get("schemas", {})
    names = {name: f"VLLM{name}" if name in schemas else name for name in their_schemas if name not in _FASTAPI_ERRORS}
    renamed = {_SCHEMAS + name: _SCHEMAS + new for name, new in names.items()}
    schemas.update({new: _rename(their_schemas[name], renamed) for name, new in names.items()})
    for path, item in theirs["paths"].items():
        operation = _rename(item[ROUTES[path].lower()], renamed)
        statuses = {"GET": (400,), "POST": (400, 404, 409)}[ROUTES[path]] if path != MODEL else (400, 404)
        _add_answers(operation, (*statuses, *ANY_ROUTE))
        if path in CARRYING:
            operation["parameters"] = [*operation.get("parameters", ()), *_IN_QUERY]
            content = operation["requestBody"]["content"][_JSON]
            content["schema"] = {"allOf": [content["schema"], {"type": "object", "properties": _MASKED}]}
        document["paths"][path] = {ROUTES[path].lower(): operation}


def _rename(value: Any, renamed: Mapping[str, str]) -> Any:
    """A copy with other references."""
    if isinstance(value, dict):
        return {key: _rename(part, renamed) for key, part in value.items()}
    if isinstance(value, list):
        return [_rename(part, renamed) for part in value]
    return renamed.get(value, value) if isinstance(value, str) else value


def _add_answers(operation: _Document, statuses: tuple[int, ...]) -> None:
    """Our error answers, beside those of vLLM with the same status."""
    answers = operation["responses"]
    answers.pop("422", None)  # FastAPI's default; vLLM answers 400 instead
    for status, ours in responses(*statuses).items():
        theirs = answers.get(str(status), {}).get("content", {}).get(_JSON, {}).get("schema")
        schema = _ERROR if theirs is None else {"anyOf": [_ERROR, theirs]}
        answers[str(status)] = {"description": ours["description"], "content": {_JSON: {"schema": schema}}}


def _add_keys(document: _Document) -> None:
    document["components"]["securitySchemes"] = _SCHEMES
    document["security"] = [{name: []} for name in _SCHEMES]
    for path in _PUBLIC:
        document["paths"][path]["get"]["security"] = []
