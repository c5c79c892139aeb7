"""The files of the playground, to be read without a key."""

from urllib.parse import parse_qsl

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from crane_serve.service.api.errors import ApiError
from crane_serve.service.playground import FILES, HEADERS, ROUTE

_READING_METHODS = ("GET", "HEAD")


def check_page_query(query: str) -> None:
    """Refuses a mask in a request for the page. A client whose base address ends in `?mask=` sends its paths inside the
    query, and must not get the page as an answer. Raises ApiError."""
    if any(name == "mask" for name, _ in parse_qsl(query, keep_blank_values=True)):
        message = "the page takes no mask; where a path follows the address, name the mask in the model: MODEL:MASK"
        raise ApiError(422, "malformed_query", message, "mask")


async def _file(request: Request) -> Response:
    request.scope["crane_route"] = ROUTE
    check_page_query(request.scope["query_string"].decode("latin-1"))
    if request.method not in _READING_METHODS:
        raise HTTPException(405, headers={"Allow": ", ".join(_READING_METHODS)})
    file = FILES.get(request.scope["path"])
    if file is None:  # a route's pattern also matches its path with a line break behind it
        raise HTTPException(404)
    return Response(file.content, media_type=file.media_type, headers=HEADERS)


router = APIRouter(include_in_schema=False)
for path in FILES:
    router.add_api_route(path, _file, methods=[*_READING_METHODS, "POST"])
