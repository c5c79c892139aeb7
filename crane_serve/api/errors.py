"""Every error answer has one shape: {"error": {"code", "message", "param"}}."""

import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from crane_serve.api.schemas import ErrorAnswer, ErrorBody
from crane_serve.engine.service import EngineDead, RejectedRequest
from crane_serve.masks import InvalidMask, MaskError, MaskTableFull, UnknownMask

_log = logging.getLogger("crane.api")
RETRY_AFTER_S = "1"

RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "Contradictory, or refused by the engine"},
    404: {"model": ErrorAnswer, "description": "Unknown mask"},
    409: {"model": ErrorAnswer, "description": "The mask's file is corrupt or belongs to another model"},
    422: {"model": ErrorAnswer, "description": "Malformed body"},
    429: {"model": ErrorAnswer, "description": "As many different masks are in use as the engine has rows for"},
    503: {"model": ErrorAnswer, "description": "The engine has died"},
}


class BadRequest(ValueError):
    """A request that contradicts itself."""

    def __init__(self, code: str, message: str, param: str) -> None:
        super().__init__(message)
        self.code, self.param = code, param


def describe(error: Exception) -> tuple[int, ErrorBody]:
    """HTTP status and body for an error; anything unforeseen is a 500 without details."""
    param: str | None = None
    match error:
        case BadRequest():
            status, code, param = 400, error.code, error.param
        case UnknownMask():
            status, code, param = 404, "unknown_mask", "mask"
        case InvalidMask():
            status, code, param = 409, "invalid_mask", "mask"
        case MaskTableFull():
            status, code, param = 429, "mask_table_full", "mask"
        case MaskError():
            status, code, param = 400, "malformed_mask", "mask"
        case RejectedRequest():
            status, code = 400, "rejected_request"
        case EngineDead():
            status, code = 503, "engine_dead"
        case RequestValidationError():
            return 422, _malformed(error)
        case HTTPException() if error.status_code == 400:  # how FastAPI answers a body that json cannot decode
            return 422, ErrorBody(code="malformed_body", message="the body cannot be read as JSON in UTF-8", param=None)
        case HTTPException():
            phrase = HTTPStatus(error.status_code).phrase
            code = phrase.lower().replace(" ", "_")
            return error.status_code, ErrorBody(code=code, message=str(error.detail), param=None)
        case _:
            _log.error("unexpected error", exc_info=error)
            return 500, ErrorBody(code="internal_error", message="unexpected error; see the server's log", param=None)
    return status, ErrorBody(code=code, message=str(error), param=param)


def _malformed(error: RequestValidationError) -> ErrorBody:
    problem = _closest(error.errors())
    if problem["type"] == "json_invalid":
        return ErrorBody(code="malformed_body", message=f"the body is not JSON: {problem['ctx']['error']}", param=None)
    if problem["type"] == "model_attributes_type":
        message = "the body is not a JSON object sent with Content-Type: application/json"
        return ErrorBody(code="malformed_body", message=message, param=None)
    _, *field = problem["loc"]
    # Behind the field's name only list positions are the caller's words; names there are alternatives of its type.
    param = ".".join(str(part) for part in (*field[:1], *(part for part in field[1:] if isinstance(part, int)))) or None
    message = problem["msg"].removeprefix("Value error, ")
    return ErrorBody(code="malformed_body", message=f"{param or 'body'}: {message}", param=param)


def _closest(problems: Sequence[Any]) -> Any:
    """Of the first field's problems, one per alternative of its type, that of the alternative the value is nearest."""
    same_field = [problem for problem in problems if problem["loc"][:2] == problems[0]["loc"][:2]]
    return max(same_field, key=lambda problem: (len(problem["loc"]), not problem["type"].endswith("_type")))


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of `app` in the one shape."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        status, body = describe(error)
        headers = error.headers if isinstance(error, HTTPException) else None  # 405 must say what is allowed
        if status == 429:
            headers = {"Retry-After": RETRY_AFTER_S}
        return JSONResponse(ErrorAnswer(error=body).model_dump(), status_code=status, headers=headers)

    for kind in (BadRequest, MaskError, RejectedRequest, EngineDead, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
