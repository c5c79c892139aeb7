"""Every error answer has one shape: {"error": {"code", "message", "param"}}."""

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from crane_serve.api.schemas import ErrorAnswer, ErrorBody
from crane_serve.engine.service import EngineDead, RejectedRequest
from crane_serve.masks import InvalidMask, MaskError, UnknownMask

_log = logging.getLogger("crane.api")

RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "Contradictory, or refused by the engine"},
    404: {"model": ErrorAnswer, "description": "Unknown mask"},
    409: {"model": ErrorAnswer, "description": "The mask's file is corrupt or belongs to another model"},
    422: {"model": ErrorAnswer, "description": "Malformed body"},
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
        case MaskError():
            status, code, param = 400, "malformed_mask", "mask"
        case RejectedRequest():
            status, code = 400, "rejected_request"
        case EngineDead():
            status, code = 503, "engine_dead"
        case RequestValidationError():
            return 422, _malformed(error)
        case HTTPException():
            phrase = HTTPStatus(error.status_code).phrase
            code = phrase.lower().replace(" ", "_")
            return error.status_code, ErrorBody(code=code, message=str(error.detail), param=None)
        case _:
            _log.error("unexpected error", exc_info=error)
            return 500, ErrorBody(code="internal_error", message="unexpected error; see the server's log", param=None)
    return status, ErrorBody(code=code, message=str(error), param=param)


def _malformed(error: RequestValidationError) -> ErrorBody:
    problem = error.errors()[0]
    where = [str(part) for part in problem["loc"] if part != "body"]
    if problem["type"] == "json_invalid":
        return ErrorBody(code="malformed_body", message=f"the body is not JSON: {problem['ctx']['error']}", param=None)
    param = ".".join(where) or None
    message = f"{param}: {problem['msg']}" if param else problem["msg"]
    return ErrorBody(code="malformed_body", message=message, param=param)


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of `app` in the one shape."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        status, body = describe(error)
        return JSONResponse(ErrorAnswer(error=body).model_dump(), status_code=status)

    for kind in (BadRequest, MaskError, RejectedRequest, EngineDead, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
