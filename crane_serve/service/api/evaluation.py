"""GET /evaluation: the evaluation that the operator wants shown."""

import asyncio
import logging
from pathlib import Path
from threading import Lock

from fastapi import APIRouter, Request, Response

from clients.errors import EvaluationError
from clients.evaluation import EVALUATION_FILE, Evaluation
from crane_serve.service.api.errors import ANY_ROUTE, ApiError, responses

router = APIRouter()

_log = logging.getLogger("crane.api")
_SCHEMA = {"type": "object", "description": "results.json, as `crane eval` writes it"}


class EvaluationFile:
    """path: directory or file of an evaluation, None for none."""

    def __init__(self, path: Path | None) -> None:
        self._file = path / EVALUATION_FILE if path is not None and path.is_dir() else path
        self._lock = Lock()
        self._content: tuple[float, bytes] | None = None  # with the time of its last change

    def read(self) -> bytes:
        """The file's content as it is now, if it holds an evaluation.

        Raises ApiError, without the file's path, which is the operator's and goes to the log.
        """
        if self._file is None:
            message = "this server was started without an evaluation; --evaluation DIR names one, made by `crane eval`"
            raise ApiError(404, "no_evaluation", message)
        with self._lock:
            try:
                changed = self._file.stat().st_mtime
                if self._content is None or self._content[0] != changed:
                    Evaluation.read(self._file)
                    self._content = changed, self._file.read_bytes()
            except (EvaluationError, OSError) as error:
                _log.warning("the evaluation cannot be shown: %s", error)
                message = "the evaluation of this server cannot be read; its log says why"
                raise ApiError(500, "unreadable_evaluation", message) from error
            return self._content[1]


@router.get(
    "/evaluation",
    response_class=Response,
    responses={200: {"content": {"application/json": {"schema": _SCHEMA}}}, **responses(404, 500, *ANY_ROUTE)},
)
async def evaluation(request: Request) -> Response:
    """The evaluation that `--evaluation` names: what each mask changed in each language."""
    content = await asyncio.to_thread(request.app.state.evaluation.read)
    return Response(content, media_type="application/json")
