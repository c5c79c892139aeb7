"""Every error answer has one shape, OpenAI's: {"error": {"message", "type", "param", "code"}}."""

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from crane_serve.common.masks import (
    FingerprintError,
    InlineMasksOff,
    InvalidMask,
    MaskError,
    MaskFileError,
    MaskTableFull,
    UnknownMask,
)
from crane_serve.engine.activations import ActivationsBusy, ActivationsError, ActivationsOff, TooManyActivations
from crane_serve.engine.answers import EngineBusy, EngineDead, FailedRequest, PinnedMasks, RejectedRequest
from crane_serve.service.api.schemas import ErrorAnswer, ErrorBody, ErrorEvent

_log = logging.getLogger("crane.api")
RETRY_AFTER_S = "1"

_DESCRIPTIONS = {
    304: "Not changed: If-None-Match names the current digest",
    400: "Contradictory, or refused by the engine",
    401: "No key, or an unknown one",
    403: "The key's role or the server does not allow this, or a page of another origin has sent it",
    404: "Unknown mask, or unknown model",
    405: "The path has no such method",
    408: "The body arrived too slowly",
    409: "The mask's file is corrupt or belongs to another model, or the masks are a commit of the Hub",
    412: "If-Match names another digest than the current one",
    413: "The body is too large",
    415: "The body has a media type or an encoding that this route does not accept",
    421: "Host names a server that this is not",
    422: "Malformed body or parameter",
    429: "Too much at once, of this key or of the whole server; see Retry-After",
    500: "Unexpected error, or the engine failed at the request",
    503: "The engine has died or is busy, or the server is shutting down",
    504: "The request took longer than the server allows",
    507: "The mask cannot be written to the disk",
}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_NAMED_EVENTS = frozenset({"/v1/messages", "/v1/responses"})  # their clients pass over events without a name
ANY_ROUTE = (401, 403, 408, 413, 415, 421, 422, 429, 503, 504)
"""What any route may answer, except /health and /ready."""


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI description of error answers, and of 304, which has no body, with these statuses."""
    return {
        status: {"description": _DESCRIPTIONS[status]} | ({} if status == 304 else {"model": ErrorAnswer})
        for status in statuses
    }


class ApiError(Exception):
    """An error with its answer: HTTP status, a code for programs, the parameter it is about, and headers."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = dict(headers or {})


class BadRequest(ApiError):
    """A request that contradicts itself."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(400, code, message, param)


class TooBusy(ApiError):
    """Too much at once; temporary, retry later."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(429, code, message)


def describe(error: BaseException) -> tuple[int, ErrorBody, dict[str, str]]:
    """HTTP status, body and headers for an error. An unexpected error becomes a 500 without details, and is logged."""
    param: str | None = None
    headers: dict[str, str] = {}
    match error:
        case ApiError():
            status, code, param, headers = error.status, error.code, error.param, dict(error.headers)
        case UnknownMask():
            status, code, param = 404, "unknown_mask", "mask"
        case InvalidMask():
            status, code, param = 409, "invalid_mask", "mask"
        case InlineMasksOff():
            status, code, param = 403, "inline_masks_off", "mask"
        case MaskTableFull():
            status, code, param = 429, "mask_table_full", "mask"
        case MaskError():
            status, code, param = 400, "malformed_mask", "mask"
        case FingerprintError():
            status, code = 409, "other_model"
        case MaskFileError():
            status, code = 422, "malformed_mask_file"
        case ActivationsOff():
            status, code, param = 400, "activations_off", "activations"
        case TooManyActivations():
            status, code, param = 400, "too_many_activations", "activations"
        case ActivationsBusy():
            status, code, param = 429, "activations_busy", "activations"
        case ActivationsError():
            status, code, param = 400, "malformed_activations", "activations"
        case PinnedMasks():
            status, code = 409, "pinned_masks"
        case RejectedRequest():
            status, code = 400, "rejected_request"
        case FailedRequest():
            status, code = 500, "request_failed"
        case EngineBusy():
            status, code = 503, "engine_busy"
        case EngineDead():
            status, code = 503, "engine_dead"
        case RequestValidationError():
            status, code = 422, "malformed_body"
            param, message = _malformed(error)
            return status, _body(status, code, message, param), headers
        case HTTPException() if error.status_code == 400:  # how FastAPI answers a body that json cannot decode
            return 422, _body(422, "malformed_body", "the body cannot be read as JSON in UTF-8"), headers
        case HTTPException():
            code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
            headers = dict(error.headers or {})  # 405 must say what is allowed
            return error.status_code, _body(error.status_code, code, str(error.detail)), headers
        case _:
            _log.error("unexpected error", exc_info=error)
            return 500, _body(500, "internal_error", "unexpected error; see the server's log"), headers
    if status in (429, 503):
        headers.setdefault("Retry-After", RETRY_AFTER_S)
    return status, _body(status, code, str(error), param), headers


def _body(status: int, code: str, message: str, param: str | None = None) -> ErrorBody:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return ErrorBody(message=message, type=kind, param=param, code=code)


def error_response(error: BaseException) -> JSONResponse:
    """The answer to a request that ends in an error."""
    status, body, headers = describe(error)
    return JSONResponse(ErrorAnswer(error=body).model_dump(), status_code=status, headers=headers)


def error_event(error: BaseException, path: str) -> bytes:
    """The server-sent event that ends an answer on `path` which has begun as a stream of events."""
    body = describe(error)[1]
    if path in _NAMED_EVENTS:
        return b"event: error\ndata: %b\n\n" % ErrorEvent(error=body).model_dump_json().encode()
    return b"data: %b\n\n" % ErrorAnswer(error=body).model_dump_json().encode()


def lone_surrogate(text: str) -> str | None:
    """The problem of a text that contains half of a UTF-16 pair, which cannot be encoded; None for any other text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"the text holds a lone surrogate, U+{ord(text[error.start]):04X}, at character {error.start + 1}"
    return None


def _malformed(error: RequestValidationError) -> tuple[str | None, str]:
    """The parameter that is malformed, None for the whole body, and what is wrong with it."""
    problem = _closest(error.errors())
    if problem["type"] == "json_invalid":
        return None, f"the body is not JSON: {problem['ctx']['error']}"
    if problem["type"] == "model_attributes_type" and len(problem["loc"]) == 1:
        return None, "the body is not a JSON object sent with Content-Type: application/json"
    _, *field = problem["loc"]
    # After the field's name, only list positions come from the caller; names are alternatives of the field's type.
    param = ".".join(str(part) for part in (*field[:1], *(part for part in field[1:] if isinstance(part, int)))) or None
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "string_unicode":
        # The surrogate is in the name of a field: pydantic gives the body as input, not the name.
        value = problem["input"]
        message = (lone_surrogate(value) if isinstance(value, str) else None) or "a name holds a lone surrogate"
    return param, f"{param or 'body'}: {message}"


def _closest(problems: Sequence[Any]) -> Any:
    """Pydantic reports one problem per alternative of a field's type; this is the problem of the alternative that fits
    best."""
    same_field = [problem for problem in problems if problem["loc"][:2] == problems[0]["loc"][:2]]
    return max(same_field, key=lambda problem: (len(problem["loc"]), not problem["type"].endswith("_type")))


def _methods(request: Request) -> list[str]:
    """The methods of all routes of a path; the error knows only those of the first route."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in routes for method in getattr(route, "methods", ())})


def install_error_handlers(app: FastAPI) -> None:
    """Have `app` answer every error in this shape."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        response = error_response(error)
        if response.status_code == HTTPStatus.METHOD_NOT_ALLOWED and (methods := _methods(request)):
            response.headers["Allow"] = ", ".join(methods)
        return response

    known = (
        ApiError,
        MaskError,
        FingerprintError,
        MaskFileError,
        ActivationsError,
        RejectedRequest,
        FailedRequest,
        EngineBusy,
        EngineDead,
    )
    for kind in (*known, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
